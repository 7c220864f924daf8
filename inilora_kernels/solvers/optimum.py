"""f*, the least that ||W − BA||_F² can be at a rank: what every result is measured against (Eckart–Young)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRIP_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Optimum:
    """loss: f* = Σ_{i>r} σ_i².  energy: ||W||_F² = Σ σ_i²."""

    loss: float
    energy: float


def optimum(W: Tensor, rank: int) -> Optimum:
    """f* and ||W||² of a matrix W (d×k) of any float dtype.

    The σ_i² are the eigenvalues of the smaller of WWᵀ and WᵀW, formed and solved in float64: f* is the sum of the
    small ones, exact to about 1e-16·||W||², far below what float32 factors can reach.

    >>> optimum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    Optimum(loss=5.0, energy=14.0)
    """
    if W.shape[0] > W.shape[1]:
        W = W.T
    gram = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64, device=W.device)
    columns = max(1, _STRIP_ELEMENTS // W.shape[0])
    for start in range(0, W.shape[1], columns):
        strip = W[:, start : start + columns].double()
        gram.addmm_(strip, strip.T)
    squares = torch.linalg.eigvalsh(gram).clamp_(min=0.0)
    return Optimum(loss=float(squares[: len(squares) - rank].sum()), energy=float(gram.trace()))
