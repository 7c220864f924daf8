"""How much of Σ_{i≤r} σ_i² a Krylov space can have missed at most, without a full SVD.

M = WᵀW (n×n) has eigenvalues λ_1 ≥ λ_2 ≥ …. Q (n×m) is an orthonormal basis of a Krylov space, MQ = QT + NL with
N orthogonal to Q, and (θ_j, x_j) are the Ritz pairs: T = S·diag(θ)·Sᵀ, x_j = Qs_j, with residuals
Mx_j − θ_j·x_j = N·g_j, g_j = Ls_j. C = (I − QQᵀ)M(I − QQᵀ) is what M does outside the space. Three steps:

1. c ≥ λ_max(C). A second Krylov space, of C, starts from b fresh Gaussian columns: they are drawn once Q is fixed, from
   a stream that the hash of W decides, so that no W can be chosen against them. If the largest Ritz value of its q
   blocks is ϑ, then with probability 1 − δ

       λ_max(C) ≤ (1 + y²)ϑ,     sinh((2q−1)·asinh y) = √(2n/π)·δ^(−1/b).

   Why: let λ = λ_max(C), u its eigenvector, τ = λ/(1 + y²), g a column of the start, g_u its part along u. For
   p(x) = T_{2q−1}(√(1−x/τ))/√(1−x/τ), a polynomial of degree q − 1 (T: Chebyshev), (τ−x)p(x)² ≤ τ on [0, τ], and
   (λ−τ)p(λ)² = τ·sinh²((2q−1)·asinh y). So the Rayleigh quotient of p(C)g, which lies in the space, is above τ unless
   |g_u|/|g| ≤ 1/sinh((2q−1)·asinh y); for a uniform direction the chance of that is at most √(2n/π) times the
   right-hand side, and all b columns are independent. (Kuczyński and Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13,
   is the case b = 1.) A later, larger Q can only reduce λ_max(C), so the bound stays valid.

2. c' ≥ λ_max(C'), C' being M outside of the s ≥ r leading Ritz vectors X. In the basis of the other Ritz vectors and
   the complement of Q it is [[Θ', Gᵀ], [G, C]], Θ' = diag(θ_{s+1}, …), G = N·(g_{s+1}, …), so by Schur's complement
   c' is a bound if c' > θ_{s+1} and

       λ_max(Σ_{j>s} g_j·g_jᵀ/(c' − θ_j)) ≤ c' − c,

   a b×b matrix; the least such c' is found by bisection.

3. In the basis [X, X⊥] M is [[Θ, Rᵀ], [R, C']], and since 2yᵀRx ≤ |Rx|²/t + t|y|² for every t > 0,

       M ⪯ diag(Θ + RᵀR/t, (c' + t)I),     so     Σ_{i≤r} λ_i ≤ the r largest eigenvalues of the right-hand side.

   With t = θ_r − c' > 0 these are those of Θ + RᵀR/t: what is missed is quadratic in the residual. Values nearly equal
   to σ_r belong in X, which is why s may exceed r: t then spans the gap behind them.

Rounding. X is orthonormal, and Θ = (WX)ᵀ(WX) and R = MX − XΘ computed by one last pass over W, in float64 but for
Wᵀ(WX), which is summed in float32 where the space is: Θ enters the sum linearly, and in float32 its error, about
1e-7·λ_1, would be what two nearly equal singular values differ by; R enters by its square, and contains what float32
has done to X and to Wᵀ(WX), whose direction is not R's, so that R does not become smaller by it. T, L and ϑ come from products with M in the space's own arithmetic. Those are
exact for some M + E, and E has two parts. A product is off by about u·σ_1·||W||_F at most: partial sums of a row of W
with a unit vector are about as large as the row, and their roundings are independent. A projection takes m rows of Q
from a vector of length λ_1 at most, in m sums that are each rounded: √m·u·λ_1, which is the larger part where W is
little more than one direction. `rounding` is their sum with 2u for u. It is added to c and c', which enter through the
gap alone.
"""

from __future__ import annotations

import math

# The probability that the bound on c is wrong, over the draw of the second space's start.
FAILURE_PROBABILITY = 1e-12


def missed_factor(n: int, block: int, passes: int) -> float:
    """1 + y²: by how much λ_max of an n×n matrix can exceed the largest Ritz value of such a Krylov space.

    >>> round(missed_factor(4096, block=16, passes=5), 3)
    1.587
    """
    odds = math.sqrt(2 * n / math.pi) * FAILURE_PROBABILITY ** (-1 / block)
    return 1 + math.sinh(math.asinh(odds) / (2 * passes - 1)) ** 2
