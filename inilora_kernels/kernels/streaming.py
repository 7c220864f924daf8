"""What one pass over a large W computes, a strip of rows at a time, on any device.

W stays in the checkpoint's own dtype; only a strip of it is ever held in the dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import fsum
from typing import TypeVar

import torch
from torch import Tensor

from ..memory import returned
from .threads import one_torch_thread, share

# A strip of W in float32 is 8 MiB: long enough for the matrix product, short enough for a last-level cache.
_STRIP_ELEMENTS = 1 << 21
# On a device the host would take longer to ask for short strips than they do: 128 MiB in float64.
_DEVICE_STRIP_ELEMENTS = 1 << 24
# What is held beside others at a time: 256 KiB in float64.
FEW_ELEMENTS = 1 << 15
# Up to so many rows of X the fused kernels are faster than torch, in float64 and where the second product is float32's.
_FUSED_ROWS = {torch.float64: 16, torch.float32: 64}
# torch takes a part of W of so many bytes, once converted, at a time: four times as many are no faster, and every
# thread has its own.
_PART_BYTES = 1 << 20


def strips(W: Tensor, elements: int = _STRIP_ELEMENTS) -> Iterator[slice]:
    """The rows of W in runs of about this many elements."""
    rows = max(1, elements // max(1, W.shape[1]))
    for start in range(0, W.shape[0], rows):
        yield slice(start, min(start + rows, W.shape[0]))


GramReader = Callable[[Tensor], tuple[Tensor, Tensor]]


def gram_multiplier(W: Tensor, dtype: torch.dtype, threads: int) -> GramReader:
    """X ↦ XWᵀ (b×d) and XWᵀW (b×k) in `dtype`, for any X (b×k): 4dkb FLOPs and one pass over W.

    By the fused kernels of cpu/gram.py where W is on a CPU, otherwise in plain torch. The same bits for any number of
    threads.

    >>> gram_multiplier(2 * torch.eye(2, dtype=torch.bfloat16), torch.float32, threads=1)(torch.tensor([[1.0, 3.0]]))
    (tensor([[2., 6.]]), tensor([[ 4., 12.]]))
    """
    if _fused(W, dtype):
        from .cpu.gram import FusedGramReaders

        return FusedGramReaders(W, threads, dtype)
    return lambda X: gram_product(W, X)


def _fused(W: Tensor, dtype: torch.dtype) -> bool:
    if W.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    from .cpu.gram import takes

    return takes(W, dtype)


def gram_product(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """XWᵀ (b×d) and XWᵀW (b×k) in the dtype of X (b×k), a strip of rows of W at a time.

    >>> gram_product(2 * torch.eye(2, dtype=torch.bfloat16), torch.tensor([[1.0, 3.0]]))
    (tensor([[2., 6.]]), tensor([[ 4., 12.]]))
    """
    # torch multiplies a few rows several times as fast as a few columns.
    X = X.contiguous()
    parts: list[Tensor] = []
    Z = X
    for rows in strips(W, _STRIP_ELEMENTS if W.device.type == "cpu" else _DEVICE_STRIP_ELEMENTS):
        strip = W[rows].to(X.dtype)
        parts.append(X @ strip.T)
        Z = Z.addmm_(parts[-1], strip) if len(parts) > 1 else parts[-1] @ strip
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), Z


def energy(W: Tensor) -> float:
    """||W||_F², summed in float64."""
    if _fused(W, torch.float64):
        from .cpu.moments import moments

        return moments(W).squares
    return sum(float(torch.linalg.vector_norm(W[rows].double())) ** 2 for rows in strips(W, _STRIP_ELEMENTS // 4))


def product(W: Tensor, X: Tensor, threads: int = 1) -> Tensor:
    """XWᵀ (s×d) in float64 for X (s×k) in float64, to the same bits for any number of threads.

    >>> product(2 * torch.eye(2), torch.ones(1, 2).double())
    tensor([[2., 2.]], dtype=torch.float64)
    """
    if _fused(W, torch.float64):
        from .cpu.gram import wide_product

        return wide_product(W, X, threads)
    return torch.cat([X @ W[rows].double().T for rows in strips(W)], dim=1)


def products(W: Tensor, X: Tensor, threads: int, image: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """XWᵀ (s×d) in float64 and XWᵀW (s×k) for X (s×k) in float64, to the same bits for any number of threads.

    image: the dtype that the second product is summed in, where float64 takes longer; it may be returned in either.

    >>> products(2 * torch.eye(2), torch.ones(1, 2).double(), threads=1)[1]
    tensor([[4., 4.]], dtype=torch.float64)
    """
    if not _fused(W, torch.float64):
        return gram_product(W, X)
    from .cpu.gram import FusedGramReader

    if len(X) <= _FUSED_ROWS[image]:
        return FusedGramReader(W, len(X), threads, torch.float64, image)(X)
    d, k = W.shape
    Y, Z = product(W, X, threads), returned((len(X), k), image)
    given = returned(Y.shape, image).copy_(Y)

    runs = _runs(k, d, image)

    def multiply_columns(mine: Iterator[slice]) -> None:
        # Copies, also of float32: what torch makes of numbers may depend on where in a cache line they begin. They lie
        # as W does, one after the other in the same place.
        room = returned((runs[0].stop * d,), image)
        for columns in mine:
            part = W[:, columns]
            count = part.shape[1]
            by_rows = room[: d * count].view(d, count)
            copy = by_rows if part.stride(1) == 1 else room[: d * count].view(count, d).T
            torch.mm(given, copy.copy_(part), out=Z[:, columns])

    share(multiply_columns, runs, threads)
    return Y, Z


def _runs(count: int, length: int, dtype: torch.dtype) -> list[slice]:
    """`count` vectors of this length in runs that a thread multiplies at a time."""
    step = max(8, min(256, _PART_BYTES // dtype.itemsize // length // 8 * 8))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def losses(W: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
    """||W||_F² and, for each (A, B), ||W − BA||_F² from the residual itself, in float64, from one pass over W.

    The same bits for any number of threads: each strip belongs to one thread, and the sums over strips are exact.

    >>> losses(3 * torch.eye(1), [(torch.tensor([[1.0]]), torch.tensor([[2.0]]))])
    (9.0, [1.0])
    """
    wide = [(A.to(W.device, torch.float64), B.to(W.device, torch.float64)) for A, B in factors]

    def of_strip(rows: slice) -> list[float]:
        strip = W[rows].double()
        squares = [float(torch.linalg.vector_norm(strip)) ** 2]
        for A, B in wide:
            squares.append(float(torch.linalg.vector_norm(torch.addmm(strip, B[rows], A, alpha=-1))) ** 2)
        return squares

    with one_torch_thread() as threads:
        runs = list(strips(W, _STRIP_ELEMENTS // 8))
        squares = _shared(of_strip, runs, threads if W.device.type == "cpu" else 1)
        energy, *reached = map(fsum, zip(*squares, strict=True))
    return energy, reached


_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def _shared(work: Callable[[_Part], _Result], parts: Sequence[_Part], threads: int) -> list[_Result]:
    """`work` on each part, in order; the threads share the parts."""
    if threads == 1 or len(parts) == 1:
        return list(map(work, parts))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, parts))
