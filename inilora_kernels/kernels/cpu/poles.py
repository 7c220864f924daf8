"""Bounds on F(λ) = Σ_k ρ_k·g_kᵀ/(λ − θ_k), which certificate.py's first two steps rest on, in compiled code.

θ (m, descending), ρ (m×b) and g (m×c) are float64; λ is above all θ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .jit import njit


@njit(cache=True, nogil=True)
def numerators(rho: Any, g: Any) -> Any:
    """ρ_k·g_kᵀ as rows (m, b·c), and their norms |ρ_k|·|g_k| (m)."""
    (m, b), c = rho.shape, g.shape[1]
    products, norms = np.empty((m, b * c)), np.empty(m)
    for k in range(m):
        norms[k] = math.sqrt(square(rho[k]) * square(g[k]))
        for i in range(b):
            for j in range(c):
                products[k, i * c + j] = rho[k, i] * g[k, j]
    return products, norms


@njit(cache=True, nogil=True)
def largest_about(theta: Any, terms: Any, middle: float, radius: float, share: float, most: float) -> float:
    """A bound on |F(λ)| for |λ − middle| ≤ radius < middle − θ_1, by a Taylor series; infinite once above `most`.

    terms: `numerators`. share: what is left of the series may be that much. Reads the products once for each term.
    """
    products, norms = terms
    m, count = products.shape
    weights, form = np.empty(m), np.empty(count)
    rest, total = 0.0, 0.0
    for k in range(m):
        weights[k] = 1.0 / (middle - theta[k])
        rest += weights[k] * norms[k]
    while rest > share:
        form[:] = 0.0
        for k in range(m):
            for i in range(count):
                form[i] += weights[k] * products[k, i]
            weights[k] *= radius / (middle - theta[k])
        total += math.sqrt(square(form))
        if not total < most:
            return np.inf
        rest *= radius / (middle - theta[0])
    return total + rest


@njit(cache=True, nogil=True)
def square(row: Any) -> float:
    """|row|²."""
    total = 0.0
    for c in range(len(row)):
        total += row[c] ** 2
    return total
