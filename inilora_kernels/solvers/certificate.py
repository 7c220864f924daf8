"""How much of Σ_{i≤r} σ_i² a Krylov space can have missed at most, without a full SVD.

M = WᵀW (n×n) has eigenvalues λ_1 ≥ λ_2 ≥ …. Q (n×m) is an orthonormal basis of a Krylov space, MQ = QT + NL with
N orthogonal to Q, and (θ_j, x_j) are the Ritz pairs: T = S·diag(θ)·Sᵀ, x_j = Qs_j, with residuals
Mx_j − θ_j·x_j = N·g_j, g_j = Ls_j. C = (I − QQᵀ)M(I − QQᵀ) is what M does outside the space. Three steps:

1. c ≥ λ_max(C). A second Krylov space, of C, starts from b fresh Gaussian columns Ω: they are drawn once Q is fixed,
   from a stream that the hash of W decides, so that no W can be chosen against them. Let λ = λ_max(C) and u its unit
   eigenvector. Ωᵀu is b independent standard normal numbers, so that with probability 1 − δ

       |Ωᵀu| > ε,     (ε²/2)^(b/2) / Γ(b/2 + 1) = δ.

   Let P be the second space's basis, CP = PT' + N'L', T' = S'·diag(ϑ)·S'ᵀ, Ω = P_1·R + (what it has along Q) with the
   first b columns P_1 of P, and h = Pᵀu, t = N'ᵀu. Then λh = T'h + L'ᵀt, and if λ is above the largest ϑ,

       Ωᵀu = Rᵀh_1 = F(λ)·t,     F(λ) = Σ_k ρ_k·g'_kᵀ / (λ − ϑ_k),     |t| ≤ 1,

   where ρ_k = Rᵀ·(the first b entries of s'_k) and g'_k = L's'_k. So |F(λ)| > ε, and every c above the largest ϑ with
   |F| ≤ ε from c on is a bound. F falls as fast as a polynomial with zeros at the ϑ_k grows, since the terms cancel.
   That |F| ≤ ε on a whole interval [l, l + x], x < l − ϑ_1, follows from its Taylor series,

       |F(l + y)| ≤ Σ_{j<J} x^j·|Σ_k ρ_k·g'_kᵀ/(l − ϑ_k)^(j+1)| + (x/(l − ϑ_1))^J·Σ_k |ρ_k|·|g'_k|/(l − ϑ_k),

   and that it holds beyond (1 + y²)ϑ_1, sinh((2q−1)·asinh y) = √b·|column of Ω|/ε, q the blocks of P, from Chebyshev's
   polynomials: a column of Ω has a part along u of ε/√b at least. Let τ = λ/(1 + y²), and
   p(x) = T_{2q−1}(√(1−x/τ))/√(1−x/τ), of degree q − 1: then (τ−x)p(x)² ≤ τ on [0, τ] and
   (λ−τ)p(λ)² = τ·sinh²((2q−1)·asinh y), so that the Rayleigh quotient of p(C) times the column, which lies in the
   space, is above τ; so ϑ_1 is. (Kuczyński and Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13.) A later, larger Q
   can only reduce λ_max(C), so the bound stays valid.

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
has done to X and to Wᵀ(WX), whose direction is not R's, so that R does not become smaller by it. T, L and what step 1
takes come from products with M in the space's own arithmetic. Those are exact for some M + E, and E has two parts. A
product is off by about u·σ_1·||W||_F at most: partial sums of a row of W with a unit vector are about as large as the
row, and their roundings are independent. A projection takes m rows of Q from a vector of length λ_1 at most, in m sums
that are each rounded: √m·u·λ_1, which is the larger part where W is little more than one direction. `rounding` is
their sum with 2u for u. It is added to c', and twice to c, since a projection for C is one from both bases; they
enter through the gap alone.
"""

from __future__ import annotations

import math

from torch import Tensor

# The probability that the bound on c is wrong, over the draw of the second space's start.
FAILURE_PROBABILITY = 1e-12
# What step 1's bound exceeds the largest Ritz value by, on real spectra, as a share of what Chebyshev's polynomials
# alone would give: 0.46 to 0.67 after 6 to 14 passes.
_SHARPER = 0.5


def least_part(block: int) -> float:
    """ε of step 1: b normal numbers are shorter with the probability FAILURE_PROBABILITY.

    >>> round(least_part(4), 5), round(least_part(16), 3)
    (0.00168, 0.488)
    """
    return math.sqrt(2 * (FAILURE_PROBABILITY * math.gamma(block / 2 + 1)) ** (2 / block))


def expected_factor(n: int, block: int, passes: int) -> float:
    """By how much step 1's bound is likely to exceed the largest Ritz value of so many blocks, for an n×n matrix.

    >>> round(expected_factor(4096, block=4, passes=9), 3)
    1.29
    """
    y = math.sinh(math.asinh(math.sqrt(block * n) / least_part(block)) / (2 * passes - 1))
    return 1 + _SHARPER * y**2


def bound_outside(T: Tensor, leaving: Tensor, begun: Tensor, passes: int) -> tuple[float, float]:
    """c of step 1 and the largest ϑ, by a space of T = PᵀCP (m×m) with CP = PT + N'·leaving (b×m), in float64.

    begun (b×b): R. passes: q. The start has to be Gaussian.

    >>> import torch
    >>> T, none = torch.diag(torch.tensor([1.0, 0.5])).double(), torch.zeros(1, 2).double()
    >>> bound, largest = bound_outside(T, none, torch.ones(1, 1).double(), passes=2)
    >>> round(bound, 4), largest
    (1.0, 1.0)
    """
    from ..kernels.cpu import missed

    bound, largest = missed.bound_outside(
        T.contiguous().numpy(), leaving.contiguous().numpy(), begun.contiguous().numpy(), passes, least_part(len(begun))
    )
    return float(bound), float(largest)
