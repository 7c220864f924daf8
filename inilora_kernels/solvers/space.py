"""A block Krylov space of M = WᵀW, kept orthonormal by full reorthogonalization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.passes import gram_product


class KrylovSpace:
    """An orthonormal basis Q (k×m) of span{Ω, CΩ, …} with its images MQ (k×m), where C = PMP and P = I − XXᵀ.

    W (d×k): read once by each `expand`. start: Ω (k×b), in the dtype of all arithmetic.
    deflate: X (k×s), orthonormal, that the space is kept orthogonal to; None: P = I, C = M.
    """

    def __init__(self, W: Tensor, start: Tensor, deflate: Tensor | None = None) -> None:
        self.W = W
        self.block = start.shape[1]
        self._fixed = [] if deflate is None else [deflate]
        self.Q = start[:, :0]
        self.MQ = start[:, :0]
        self.WQ = start.new_empty(W.shape[0], 0)
        self.T = torch.zeros(0, 0, dtype=torch.float64, device=start.device)
        self._next, self._coupling = self._orthonormal(start)

    @property
    def passes(self) -> int:
        """Readings of W so far: the q of K_q."""
        return self.Q.shape[1] // self.block

    @property
    def full(self) -> bool:
        """Whether another block would no longer fit beside the others."""
        held = self.Q.shape[1] + sum(X.shape[1] for X in self._fixed)
        return held + 2 * self.block > self.Q.shape[0]

    def expand(self) -> None:
        """Take the next block into the basis: one reading of W."""
        block = self._next
        Y, Z = gram_product(self.W, block)
        self.Q, self.MQ, self.WQ = (torch.cat(pair, dim=1) for pair in ((self.Q, block), (self.MQ, Z), (self.WQ, Y)))
        column = (self.Q.T @ Z).double()
        size = self.T.shape[0]
        T = column.new_zeros(size + self.block, size + self.block)
        T[:size, :size] = self.T
        T[:, size:] = column
        T[size:, :] = column.T
        T[size:, size:] = (column[size:] + column[size:].T) / 2
        self.T = T
        self._next, self._coupling = self._orthonormal(Z)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m, descending), vectors in the basis (m×m), and the norm of each pair's residual; float64."""
        values, vectors = torch.linalg.eigh(self.T)
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = torch.linalg.vector_norm(self._coupling.double() @ vectors[-self.block :], dim=0)
        return values, vectors, residuals

    def _orthonormal(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal block X orthogonal to all the others, and the coupling β with Xβ = the new part of Z."""
        Z = self._project(self._project(Z))
        X, coupling = torch.linalg.qr(Z)
        # Where Z added nothing new, QR returned directions of its own; they are made orthogonal to the others too.
        X, _ = torch.linalg.qr(self._project(X))
        return X, coupling

    def _project(self, Z: Tensor) -> Tensor:
        for held in (*self._fixed, self.Q):
            Z = torch.addmm(Z, held, held.T @ Z, alpha=-1)
        return Z
