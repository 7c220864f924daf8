"""How much of Σ_{i≤r} σ_i² approximate singular vectors can have left behind at most, without a full SVD.

Let M = WᵀW (n×n) have eigenvalues λ_1 ≥ λ_2 ≥ …, X (n×s) be orthonormal with XᵀMX = Θ = diag(θ_1 ≥ …), residual
R = MX − XΘ (orthogonal to X), and c ≥ λ_max of C = (I − XXᵀ)M(I − XXᵀ). In the basis [X, X⊥] M is [[Θ, Rᵀ], [R, C]],
and since 2yᵀRx ≤ |Rx|²/t + t|y|² for every t > 0,

    M ⪯ diag(Θ + RᵀR/t, (c + t)I),     so     Σ_{i≤r} λ_i ≤ the r largest eigenvalues of the right-hand side.

With t = θ_r − c > 0 these are those of Θ + RᵀR/t: what is left behind is quadratic in the residual.

c comes from a second Krylov space, of C, whose Gaussian start is drawn after X is fixed. If its q blocks of b columns
have the largest Ritz value ϑ, then with probability 1 − δ

    c ≤ (1 + y²)ϑ,     sinh((2q−1)·asinh y) = √(2n/π)·δ^(−1/b).

Why: let λ = λ_max(C), u its eigenvector, τ = λ/(1 + y²), g a column of the start, g_u its part along u. For
p(x) = T_{2q−1}(√(1−x/τ))/√(1−x/τ), a polynomial of degree q − 1 (T: Chebyshev), (τ−x)p(x)² ≤ τ on [0, τ], and
(λ−τ)p(λ)² = τ·sinh²((2q−1)·asinh y). So the Rayleigh quotient of p(C)g, which lies in the space, is above τ unless
|g_u|/|g| ≤ 1/sinh((2q−1)·asinh y); for a uniform direction the chance of that is at most √(2n/π) times the right-hand
side, and all b columns are independent. (Kuczyński and Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13, is the case
b = 1.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .krylov_space import KrylovSpace

# The chance that the bound on c is wrong, over the draw of the second space's start.
FAILURE_PROBABILITY = 1e-12
MOST_PASSES = 24
_BLOCK = 8
# A product of M with a unit vector is off by about so many units in the last place of σ_1².
_ROUNDING_UNITS = 4


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs of M (n×n): X (n×s), values θ (s, descending), RᵀR (s×s); float64."""

    X: Tensor
    values: Tensor
    residual_gram: Tensor


def ritz_pairs(space: KrylovSpace, vectors: Tensor) -> tuple[Ritz, Tensor]:
    """The Ritz pairs that belong to some eigenvectors (m×s) of a space's T, made clean in float64, and their
    coefficients (m×s) in the space's basis.

    The images MX come from the space, in its arithmetic. What their rounding can hide is added to each residual.
    """
    X, triangle = torch.linalg.qr(space.Q.double() @ vectors)
    coefficients = torch.linalg.solve_triangular(triangle, vectors, upper=True, left=False)
    image = space.MQ.double() @ coefficients
    theta = X.T @ image
    values, rotation = torch.linalg.eigh((theta + theta.T) / 2)
    values, rotation = values.flip(0), rotation.flip(1)
    X, image, coefficients = X @ rotation, image @ rotation, coefficients @ rotation
    residual = image - X * values
    residual -= X @ (X.T @ residual)
    hidden = _ROUNDING_UNITS * torch.finfo(space.Q.dtype).eps * float(values[0])
    residual_gram = residual.T @ residual
    residual_gram.diagonal().add_(hidden**2)
    return Ritz(X, values, residual_gram), coefficients


def missed_factor(n: int, block: int, passes: int) -> float:
    """1 + y²: by how much λ_max of an n×n matrix can exceed the largest Ritz value of such a Krylov space.

    >>> round(missed_factor(4096, block=16, passes=5), 3)
    1.587
    """
    odds = math.sqrt(2 * n / math.pi) * FAILURE_PROBABILITY ** (-1 / block)
    return 1 + math.sinh(math.asinh(odds) / (2 * passes - 1)) ** 2


def shortfall(ritz: Ritz, rank: int, missed: float) -> float:
    """The upper bound on Σ_{i≤r} λ_i − Σ_{i≤r} θ_i, given c = missed.

    >>> X, values = torch.eye(4)[:, :2], torch.tensor([5.0, 3.0])
    >>> round(shortfall(Ritz(X, values, torch.diag(torch.tensor([0.0, 0.02]))), rank=2, missed=1.0), 6)
    0.01
    """
    smallest = float(ritz.values[rank - 1])
    gap = smallest - missed
    splits = [missed * 10.0**-power for power in range(1, 13)] if missed > 0 else []
    if gap > 0:
        splits = [gap, *splits]
    best = math.inf
    for split in splits:
        if split <= 0:
            continue
        upper = torch.linalg.eigvalsh(torch.diag(ritz.values) + ritz.residual_gram / split)
        elsewhere = upper.new_full((rank,), missed + split)
        highest = torch.cat([upper, elsewhere]).topk(rank).values
        best = min(best, float(highest.sum() - ritz.values[:rank].sum()))
        if split == gap:
            break
    return max(0.0, best)


def shortfalls(
    W: Tensor, ritz: Ritz, allowed: Mapping[int, float], dtype: torch.dtype, threads: int
) -> tuple[dict[int, float], float, int]:
    """A bound for each rank in `allowed`, from as many readings of W (d×k) as it takes to come below the value there.

    Returns the bounds, the bound c on what lies outside the Ritz vectors, and the number of readings.
    """
    n = W.shape[1]
    generator = torch.Generator().manual_seed(1)
    block = min(_BLOCK, n - ritz.X.shape[1])
    start = torch.randn(n, block, generator=generator).to(W.device, dtype)
    space = KrylovSpace(W, start, MOST_PASSES, threads, deflate=ritz.X.to(dtype))
    smallest = float(ritz.values[max(allowed) - 1])
    while True:
        space.expand()
        done = space.full
        missed = missed_factor(n, block, space.passes) * float(torch.linalg.eigvalsh(space.T)[-1])
        if missed < smallest or done:
            bounds = {rank: shortfall(ritz, rank, missed) for rank in allowed}
            # From half of θ_r on, a lower c could no more than halve the bounds: the residuals decide.
            if done or missed <= smallest / 2 or all(bounds[rank] <= most for rank, most in allowed.items()):
                return bounds, missed, space.passes
