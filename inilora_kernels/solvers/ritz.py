"""Ritz pairs of M = WᵀW on a Krylov space: what the certificate and the triplets are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.threads import share, worth
from ..memory import returned

# Vectors that a thread turns at a time.
_ROWS_AT_ONCE = 16

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Ritz pairs of M, on the CPU in float64.

    theta: θ (m), descending.
    g (m×b): row i holds the residual Mx_i − θ_i·x_i in an orthonormal basis of what leaves the space, so its norm is
        the residual's.
    rho (m×b): row i holds what Ω has along x_i; None where the start is not known.
    T (m×m): QMQᵀ, of which θ are the eigenvalues.
    reduced: T's tridiagonal form, as eigen.py has it.
    """

    theta: Array
    g: Array
    T: Array
    rho: Array | None = None
    reduced: tuple[Array, Array, Array, Array, float, bool] | None = None

    def without_vectors(self) -> RitzPairs:
        """θ and g alone, without the m² numbers that `vectors` takes."""
        return RitzPairs(self.theta, self.g, np.empty((0, 0)))

    def vectors(self, count: int, threads: int = 1) -> Tensor:
        """The first `count` Ritz vectors in the basis Q (count×m, rows)."""
        from ..kernels.cpu.eigen import leading_vectors, turn_back

        m = len(self.theta)
        found = np.empty((count, m))
        if self.reduced is not None and leading_vectors(self.reduced, self.theta, found):

            def turn(several: Iterator[slice]) -> None:
                for rows in several:
                    turn_back(self.reduced, found[rows])

            runs = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, count, _ROWS_AT_ONCE)]
            share(turn, runs, worth(threads, 2 * m * m * count))
            return torch.from_numpy(found)
        every: Tensor = torch.linalg.eigh(torch.from_numpy(self.T)).eigenvectors.T.flip(0)
        return every[:count]


def ritz_pairs(T: Tensor, leaving: Tensor, begun: Tensor | None = None, unit: float = 0.0) -> RitzPairs:
    """The Ritz pairs of a space with QMQᵀ = T (m×m) and M·Qᵀ = QᵀT + N·leaving (b×m), float64, on the CPU.

    begun (b×b): the start is begunᵀ times the first rows of Q. unit: of the arithmetic of a space of one start; what T
    has far from its diagonal counts as zero if it is rounding in that.

    >>> pairs = ritz_pairs(torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double(), torch.tensor([[0.0, 0.5]]).double())
    >>> pairs.theta.tolist(), abs(pairs.g).tolist()
    ([4.0, 1.0], [[0.5], [0.0]])
    """
    from ..kernels.cpu.eigen import decomposed

    form, b = T.numpy(), len(leaving)
    known = begun is not None and len(begun) <= len(T)
    rows = leaving
    if begun is not None and known:
        rows = torch.cat([leaving, leaving.new_zeros(begun.shape[1], len(T))])
        rows[b:, : len(begun)] = begun.T
    # For a part of a larger array numba would compile all of it once more.
    copy = returned((len(T), len(T)), T.dtype).copy_(T)
    theta, both, reduced, converged = decomposed(copy.numpy(), rows.numpy(), unit)
    if not converged:
        values, vectors = torch.linalg.eigh(T)
        theta, both, reduced = values.flip(0).numpy(), (rows @ vectors.flip(1)).T.numpy(), None
    return RitzPairs(theta, both[:, :b].copy(), form, both[:, b:].copy() if known else None, reduced)


def largest_eigenvalue(T: Tensor) -> float:
    """λ_max of a symmetric T (m×m), float64, on the CPU.

    >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)))
    3.0
    """
    from ..kernels.cpu import eigen

    found = float(eigen.largest_eigenvalue(T.contiguous().numpy()))
    return found if found == found else float(torch.linalg.eigvalsh(T)[-1])
