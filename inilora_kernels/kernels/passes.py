"""What one reading of a large W computes in plain torch, a strip of rows at a time, on any device.

W stays in the checkpoint's own dtype; only a strip of it is ever held in the dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# A strip of W in float32 is 8 MiB: long enough for the matrix product, short enough for a last-level cache.
_STRIP_ELEMENTS = 1 << 21


def strips(W: Tensor, elements: int = _STRIP_ELEMENTS) -> Iterator[slice]:
    """The rows of W in runs of about so many elements."""
    rows = max(1, elements // max(1, W.shape[1]))
    for start in range(0, W.shape[0], rows):
        yield slice(start, min(start + rows, W.shape[0]))


def gram_product(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """WX (d×b) and WᵀWX (k×b) in the dtype of X (k×b), from one reading of W (d×k): 4dkb FLOPs.

    >>> gram_product(torch.eye(2, dtype=torch.bfloat16) * 2, torch.tensor([[1.0], [3.0]]))
    (tensor([[2.],
            [6.]]), tensor([[ 4.],
            [12.]]))
    """
    Y = X.new_empty(W.shape[0], X.shape[1])
    Z = torch.zeros_like(X)
    for rows in strips(W):
        strip = W[rows].to(X.dtype)
        Y[rows] = strip @ X
        Z.addmm_(strip.T, Y[rows])
    return Y, Z


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
    for rows in strips(W, _STRIP_ELEMENTS // 4):
        strip = W[rows].double()
        energy += float(torch.linalg.vector_norm(strip)) ** 2
        for i, (A, B) in enumerate(wide):
            found[i] += float(torch.linalg.vector_norm(torch.addmm(strip, B[rows], A, alpha=-1))) ** 2
    return energy, found
