"""f*, the minimum of ||W − BA||_F² at a rank, which every result is measured against (Eckart–Young)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.dense import few
from ..kernels.streaming import product
from ..kernels.threads import one_torch_thread
from .krylov import GRAM_SIZE, principal
from .triplets import LEADING, ROUNDING_SHARE, Principal

# `loss_near`: the loss as a share of ||W||² below which it is read off W, and ||D||² of factors rounded to float32.
_READ_BELOW, _ROUNDING = 0.01, 1e-12
# Normal vectors that ||D||² of many rows is read off.
_PROBES = 8
_STRIP_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Optimum:
    """The least error at a rank.

    loss: f* = Σ_{i>r} σ_i², or a proven lower bound just below it. energy: ||W||_F² = Σ σ_i². leading: the first σ_i,
    at most 64. certified: whether the bound is within its tolerance of f*; False where W's spectrum did not allow that.
    """

    loss: float
    energy: float
    leading: tuple[float, ...]
    certified: bool = True


def optimum(W: Tensor, rank: int) -> Optimum:
    """f* and ||W||² of a matrix W (d×k) of any float dtype.

    Where the smaller side is at most 512, the σ_i² are all the eigenvalues of the smaller of WWᵀ and WᵀW, formed and
    solved in float64, less their rounding. Larger matrices are never squared: `principal` finds the leading singular
    triplets and proves how much they can have left behind, so f* is never above the true one, and below it by at most
    1e-8 of it unless `certified` is False. W is read in strips in its own dtype.

    >>> found = optimum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    >>> round(found.loss, 9), found.energy
    (5.0, 14.0)
    """
    return optima(W, [rank])[rank]


def optima(W: Tensor, ranks: Sequence[int]) -> dict[int, Optimum]:
    """`optimum` for each of several ranks, from the same passes over W."""
    if min(W.shape) <= GRAM_SIZE:
        squares, energy = _all_squares(W)
        leading = tuple(squares[:LEADING].sqrt().tolist())
        return {
            rank: Optimum(max(0.0, float(squares[rank:].sum()) - ROUNDING_SHARE * energy), energy, leading)
            for rank in ranks
        }
    return optima_from(principal(W, ranks), ranks)


def optima_from(found: Principal, ranks: Sequence[int]) -> dict[int, Optimum]:
    """What leading singular triplets and their shortfalls prove about f* at each of several ranks."""
    return {rank: Optimum(found.optimum(rank), found.energy, found.leading, found.certified[rank]) for rank in ranks}


def loss_near(found: Principal, rank: int, A: Tensor, B: Tensor) -> float | None:
    """||W − BA||² of factors that come from the leading triplets, without reading W; None if it must be read.

    With R = W − USVᵀ and D = BA − USVᵀ it is ||R||² + 2⟨R, D⟩ + ||D||². ||R||² is ||W||² − Σ_{i≤r} s_i², as US = WV.
    ⟨R, D⟩ is nothing but rounding: RV = 0, so only what A has outside of V meets R, 2⁻²⁴ of A, and of it B sees UᵀR,
    what the triplets lack, 10⁻⁴ of s_1 at most where they are certified. That is below 10⁻¹¹·||W||², and W is read
    where it might be 10⁻⁹ of the loss, or where BA is no rounding of the triplets' product.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> found = principal(W, [1])
    >>> round(loss_near(found, 1, found.V[:, :1].T.float(), (found.U * found.S)[:, :1].float()), 6)
    5.0
    """
    U, S, V = found.U[:, :rank], found.S[:rank], found.V[:, :rank]
    captured = float(S @ S)
    apart = max(0.0, _apart(A, B.T, U.T, S, V.T))
    rest = found.energy - captured
    if rest < _READ_BELOW * found.energy or apart > _ROUNDING * found.energy or not found.certified[rank]:
        return None
    return rest + apart


def _apart(A: Tensor, columns: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    """||D||² of `loss_near` of the rows A, Bᵀ, Uᵀ and Vᵀ; of many rows, as what D makes of a few normal vectors says.

    That is ||D||² within a half, which the loss takes no notice of where it is rounding, and far above rounding where D
    is: below a millionth of it with a probability of 1e-23.
    """
    if few(A, columns, U, V):
        from ..kernels.cpu import few_rows

        sides = (columns, A, U, S, V)
        return float(few_rows.apart(*(side.contiguous().numpy() for side in sides)))
    probes = torch.randn(_PROBES, A.shape[1], generator=torch.Generator().manual_seed(0)).double().to(A.device)
    with one_torch_thread():
        D = product(columns.T, product(A, probes)) - product(U.T, S * product(V, probes))
    return float(D.square().sum()) / _PROBES


def rank_for_energy(W: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps `share` (0 to 1) of W's energy: Σ_{i≤r} σ_i² ≥ share·||W||².

    >>> rank_for_energy(torch.diag(torch.tensor([3.0, 2.0, 1.0])), share=0.9)
    2
    """
    full = min(W.shape)
    if full <= GRAM_SIZE:
        squares, energy = _all_squares(W)
        return _first_to_keep(squares, share * energy)
    guess = 16
    while True:
        guess = min(guess, full)
        found = principal(W, [guess])
        squares = found.S.square()
        if guess == full or float(squares.sum()) >= share * found.energy:
            return _first_to_keep(squares, share * found.energy)
        guess *= 2


def _first_to_keep(squares: Tensor, wanted: float) -> int:
    kept = squares.cumsum(0) >= wanted * (1 - 1e-12)
    return int(kept.nonzero()[0]) + 1 if bool(kept.any()) else len(squares)


def _all_squares(W: Tensor) -> tuple[Tensor, float]:
    """σ_i² (descending) and their sum, through the float64 Gram matrix of the smaller side."""
    if W.shape[0] > W.shape[1]:
        W = W.T
    # One thread, so that the bits do not depend on how many there are.
    with one_torch_thread():
        gram = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64, device=W.device)
        columns = max(1, _STRIP_ELEMENTS // W.shape[0])
        for start in range(0, W.shape[1], columns):
            strip = W[:, start : start + columns].double()
            gram.addmm_(strip, strip.T)
        return torch.linalg.eigvalsh(gram).clamp_(min=0.0).flip(0), float(gram.trace())
