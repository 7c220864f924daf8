"""What one reading of a large W computes, a strip of rows at a time, on any device.

W stays in the checkpoint's own dtype; only a strip of it is ever held in the dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# A strip of W in float32 is 8 MiB: long enough for the matrix product, short enough for a last-level cache.
_STRIP_ELEMENTS = 1 << 21
# Up to this size W stays in the caches between two readings, and torch multiplies it as fast as the fused kernels.
_CACHED_ELEMENTS = 1 << 21


def strips(W: Tensor, elements: int = _STRIP_ELEMENTS) -> Iterator[slice]:
    """The rows of W in runs of about so many elements."""
    rows = max(1, elements // max(1, W.shape[1]))
    for start in range(0, W.shape[0], rows):
        yield slice(start, min(start + rows, W.shape[0]))


GramReader = Callable[[Tensor], tuple[Tensor, Tensor]]


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Hold torch to one thread for a while. Gives the number that it has else, and has again afterwards.

    The number is the process's, for threads that have not asked for it yet.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def reading_threads(W: Tensor, dtype: torch.dtype) -> Iterator[int]:
    """How many threads a `gram_reader` may use. Where those are its own, torch is held to one in the meantime.

    For milliseconds after each of its parallel regions torch's threads wait for the next one without sleeping, on the
    cores that the reader's threads then have to share with them.
    """
    if _fused(W, dtype):
        with one_torch_thread() as threads:
            yield threads
    else:
        yield torch.get_num_threads()


def gram_reader(W: Tensor, width: int, dtype: torch.dtype, threads: int) -> GramReader:
    """X ↦ XWᵀ (b×d) and XWᵀW (b×k) in `dtype`, for any X (b×k) of one width b: 4dkb FLOPs and one reading of W.

    By the fused kernels of cpu/gram.py where W is on a CPU and the products in float32, else in plain torch.

    >>> gram_reader(2 * torch.eye(2, dtype=torch.bfloat16), 1, torch.float32, threads=1)(torch.tensor([[1.0, 3.0]]))
    (tensor([[2., 6.]]), tensor([[ 4., 12.]]))
    """
    if _fused(W, dtype):
        from .cpu.gram import FusedGramReader

        return FusedGramReader(W, width, threads)
    return lambda X: gram_product(W, X)


def _fused(W: Tensor, dtype: torch.dtype) -> bool:
    if W.device.type != "cpu" or dtype != torch.float32 or W.numel() <= _CACHED_ELEMENTS:
        return False
    from .cpu.gram import takes

    return takes(W)


def gram_product(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """XWᵀ (b×d) and XWᵀW (b×k) in the dtype of X (b×k), a strip of rows of W at a time.

    >>> gram_product(2 * torch.eye(2, dtype=torch.bfloat16), torch.tensor([[1.0, 3.0]]))
    (tensor([[2., 6.]]), tensor([[ 4., 12.]]))
    """
    Y = X.new_empty(W.shape[0], X.shape[0])
    Z = torch.zeros_like(X.T)
    for rows in strips(W):
        strip = W[rows].to(X.dtype)
        Y[rows] = strip @ X.T
        Z.addmm_(strip.T, Y[rows])
    return Y.T, Z.T


def energy(W: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """||W||_F², each strip summed in `dtype`."""
    return sum(float(torch.linalg.vector_norm(W[rows].to(dtype))) ** 2 for rows in strips(W))


def losses(W: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
    """||W||_F² and, for each (A, B), ||W − BA||_F² from the residual itself, in float64, from one reading of W.

    >>> losses(3 * torch.eye(1), [(torch.tensor([[1.0]]), torch.tensor([[2.0]]))])
    (9.0, [1.0])
    """
    wide = [(A.to(W.device, torch.float64), B.to(W.device, torch.float64)) for A, B in factors]
    energy, found = 0.0, [0.0] * len(wide)
    runs = list(strips(W, _STRIP_ELEMENTS // 4))
    # Allocated once: fresh pages for every strip would cost more than the arithmetic.
    residual = torch.empty(runs[0].stop, W.shape[1], dtype=torch.float64, device=W.device)
    for rows in runs:
        part = residual[: rows.stop - rows.start]
        energy += float(torch.linalg.vector_norm(part.copy_(W[rows]))) ** 2
        for i, (A, B) in enumerate(wide):
            if i > 0:
                part.copy_(W[rows])
            found[i] += float(torch.linalg.vector_norm(part.addmm_(B[rows], A, alpha=-1))) ** 2
    return energy, found
