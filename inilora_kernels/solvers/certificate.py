"""How much of Σ_{i≤r} σ_i² a Krylov space can have missed at most, without a full SVD.

M = WᵀW (n×n) has eigenvalues λ_1 ≥ λ_2 ≥ …. Q (n×m) is an orthonormal basis of a block Krylov space that starts from
b Gaussian columns Ω = QR. They are drawn from a stream that the hash of W decides, so that no W can be chosen against
them. MQ = QT + NL with N orthogonal to Q, and (θ_j, x_j) are the Ritz pairs: T = S·diag(θ)·Sᵀ, x_j = Qs_j, with
residuals Mx_j − θ_j·x_j = N·g_j, g_j = Ls_j; and ρ_j = Rᵀs_j is what Ω has along x_j. Three steps:

1. The count: M has no more than p eigenvalues above μ, where θ_p > μ > θ_{p+1}. Let Mu = λu, |u| = 1, and t = Nᵀu.
   From QᵀMu = λQᵀu follows x_jᵀu = g_jᵀt/(λ − θ_j), and Ω lies in the space, so that

       Ωᵀu = Σ_j ρ_j·x_jᵀu = F(λ)·t,     F(λ) = Σ_j ρ_j·g_jᵀ/(λ − θ_j),     |t| ≤ 1.

   F falls as fast as a polynomial with zeros at the θ_j grows, since its terms cancel, and is large near each θ_j
   alone. Part (μ, ∞) into p cells, each around one of the first p. If there were p + 1 eigenvalues, two that follow
   each other, λ_i and λ_{i+1}, i ≤ p, would share a cell k; and a unit vector u in the plane of their eigenvectors
   would be orthogonal to x_k. Of it, z_1·u_i + z_2·u_{i+1}, the same sum without the k-th term says that

       |Ωᵀu| = |z_1·F_{−k}(λ_i)·t_i + z_2·F_{−k}(λ_{i+1})·t_{i+1}| ≤ √2·max |F_{−k}| over the cell.

   But along all of the plane, |Ωᵀu| is at least the least singular value of a b×2 matrix of normal numbers. Its square
   has the density of the smaller eigenvalue of a 2×2 Wishart matrix; with l_1 − l_2 ≤ l_1 and e^(−l_2/2) ≤ 1 in that,
   it is below √2·ε for one of p planes with a probability of at most

       δ = p·2^((b−1)/2)·Γ((b+1)/2)/Γ(b)·(√2·ε)^(b−1).

   So max |F_{−k}| ≤ ε in every cell proves the count. The terms of the first p but k are bounded one by one, the rest
   of F by its Taylor series on intervals from μ to ||W||_F² ≥ λ_1. By it, with X the first p Ritz vectors and C' what
   M is outside of them, M = [[Θ, Gᵀ], [G, C']], Θ ≻ μ: since Θ − μ has p positive eigenvalues, Schur's complement has
   none (Haynsworth), C' − μ − G·(Θ − μ)⁻¹·Gᵀ ⪯ 0, and

       λ_max(C') ≤ c' = μ + Σ_{j≤p} |g_j|²/(θ_j − μ).

2. Where values are so close that this takes too long, c' comes from a second space. C = (I − QQᵀ)M(I − QQᵀ) is what M
   does outside the first, and the second, of C, starts from b fresh Gaussian columns Ω, drawn once Q is fixed. Let
   λ = λ_max(C) and u its unit eigenvector: one vector now, so that with probability 1 − δ

       |Ωᵀu| > ε,     (ε²/2)^(b/2) / Γ(b/2 + 1) = δ,

   and again Ωᵀu = F(λ)·t, with the second space's own ϑ, ρ and g, if λ is above the largest ϑ. So |F(λ)| > ε, and every
   c above the largest ϑ with |F| ≤ ε from c on is a bound on λ_max(C). That |F| ≤ ε on an interval [l − x, l + x],
   x < l − ϑ_1, follows from the Taylor series, for |y| ≤ x

       |F(l + y)| ≤ Σ_{i<I} x^i·|Σ_j ρ_j·g_jᵀ/(l − ϑ_j)^(i+1)| + (x/(l − ϑ_1))^I·Σ_j |ρ_j|·|g_j|/(l − ϑ_j),

   and that it holds beyond (1 + y²)ϑ_1, sinh((2q−1)·asinh y) = √b·|column of Ω|/ε, q the blocks of the space, from
   Chebyshev's polynomials: a column of Ω has a part along u of ε/√b at least. Let τ = λ/(1 + y²), and
   p(x) = T_{2q−1}(√(1−x/τ))/√(1−x/τ), of degree q − 1: then (τ−x)p(x)² ≤ τ on [0, τ] and
   (λ−τ)p(λ)² = τ·sinh²((2q−1)·asinh y), so that the Rayleigh quotient of p(C) times the column, which lies in the
   space, is above τ; so ϑ_1 is. (Kuczyński and Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13.) A later, larger Q
   can only reduce λ_max(C), so the bound stays valid.

   C' is M outside of the s ≥ r leading Ritz vectors X. In the basis of the other Ritz vectors and the complement of Q
   it is [[Θ', Gᵀ], [G, C]], Θ' = diag(θ_{s+1}, …), G = N·(g_{s+1}, …), so by Schur's complement c' ≥ λ_max(C') if
   c' > θ_{s+1} and

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
their sum with 2u for u. It is added to c', and twice where c' comes from a count or from c, whose projections are from
two bases; it enters through the gap alone. Entries of T far from its diagonal are nothing but the rounding of these
projections, for without it they were zero; so M + E' with zeros there is as near, and `decomposed` takes that. Rounding
also turns the eigenvectors of M + E, and so changes Ωᵀu, by some 1e-5 in float32: with T's far entries |F| falls no
further. That has nothing to do with where Ω fails; but if it conspired, δ would be (1 + 1e-5/ε)^(b−1) times as large,
1.3 times at most. With more columns ε is larger, and a wider block is taken where it would come near to that.
"""

from __future__ import annotations

import math

from torch import Tensor

# The probability that the count, or the bound on c, is wrong, over the draw of the space's start.
FAILURE_PROBABILITY = 1e-10
# What step 2's bound on c exceeds the largest Ritz value by, on real spectra, as a share of what Chebyshev's
# polynomials alone would give: 0.46 to 0.67 after 6 to 14 passes.
_SHARPER = 0.5


def least_part(block: int) -> float:
    """ε of step 2: b normal numbers are shorter with the probability FAILURE_PROBABILITY.

    >>> round(least_part(4), 5), round(least_part(16), 3)
    (0.00532, 0.651)
    """
    return math.sqrt(2 * (FAILURE_PROBABILITY * math.gamma(block / 2 + 1)) ** (2 / block))


def least_of_pairs(block: int, count: int) -> float:
    """ε of the count: for one of `count` planes, Ω's least singular value is below √2·ε with the probability δ.

    >>> round(least_of_pairs(4, 12) * 1e4, 3), round(least_of_pairs(8, 132), 5)
    (1.675, 0.02209)
    """
    constant = 2 ** ((block - 1) / 2) * math.gamma((block + 1) / 2) / math.gamma(block)
    return math.sqrt(0.5) * math.pow(FAILURE_PROBABILITY / (count * constant), 1 / (block - 1))


def expected_factor(n: int, block: int, passes: int) -> float:
    """By how much step 2's bound on c is likely to exceed the largest Ritz value of so many blocks, for an n×n matrix.

    >>> round(expected_factor(4096, block=4, passes=9), 3)
    1.23
    """
    y = math.sinh(math.asinh(math.sqrt(block * n) / least_part(block)) / (2 * passes - 1))
    return 1 + _SHARPER * y**2


def bound_outside(T: Tensor, leaving: Tensor, begun: Tensor, passes: int) -> tuple[float, float]:
    """c of step 2 and the largest ϑ, by a space of T = PᵀCP (m×m) with CP = PT + N'·leaving (b×m), in float64.

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
