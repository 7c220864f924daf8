"""A block Krylov space of M = WᵀW, kept orthonormal by full reorthogonalization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.streaming import gram_reader


class KrylovSpace:
    """An orthonormal basis Q (k×m) of span{Ω, CΩ, …} with its images MQ (k×m), where C = PMP and P = I − XXᵀ.

    W (d×k): read once by each `expand`. start: Ω (k×b), in the dtype of all arithmetic.
    deflate: X (k×s), orthonormal, that the space is kept orthogonal to; None: P = I, C = M.
    most: how many blocks there may be. Their memory is taken as they come.
    threads: that read W; see `streaming.reading_threads`.
    """

    def __init__(self, W: Tensor, start: Tensor, most: int, threads: int, deflate: Tensor | None = None) -> None:
        self.passes = 0
        self.block = start.shape[1]
        self._read = gram_reader(W, self.block, start.dtype, threads)
        self._most = most
        self._fixed = [] if deflate is None else [deflate.T.contiguous()]
        # A row of these is a column of the basis, so that a block added later touches memory of its own. All blocks lie
        # so while they are worked on.
        self._rows_Q = start.new_empty(most * self.block, W.shape[1])
        self._rows_MQ = torch.empty_like(self._rows_Q)
        self._rows_WQ = start.new_empty(most * self.block, W.shape[0])
        self._T = torch.zeros(most * self.block, most * self.block, dtype=torch.float64, device=start.device)
        self._next, self._coupling = self._orthonormal(start.T)

    @property
    def size(self) -> int:
        """m: the dimension of the space."""
        return self.passes * self.block

    @property
    def Q(self) -> Tensor:
        return self._rows_Q[: self.size].T

    @property
    def MQ(self) -> Tensor:
        return self._rows_MQ[: self.size].T

    @property
    def WQ(self) -> Tensor:
        return self._rows_WQ[: self.size].T

    @property
    def T(self) -> Tensor:
        """QᵀMQ (m×m), float64."""
        return self._T[: self.size, : self.size]

    @property
    def full(self) -> bool:
        """Whether the space has all its blocks, or another would no longer fit beside the others."""
        held = self.size + sum(len(X) for X in self._fixed)
        return self.passes == self._most or held + 2 * self.block > self._rows_Q.shape[1]

    def expand(self) -> None:
        """Take the next block into the basis: one reading of W."""
        Y, Z = self._read(self._next)
        new = slice(self.size, self.size + self.block)
        self._rows_Q[new], self._rows_MQ[new], self._rows_WQ[new] = self._next, Z, Y
        self.passes += 1
        column = (self._rows_Q[: self.size] @ Z.T).double()
        self._T[: self.size, new], self._T[new, : self.size] = column, column.T
        self._T[new, new] = (column[new] + column[new].T) / 2
        self._next, self._coupling = self._orthonormal(Z)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m, descending), vectors in the basis (m×m), and the norm of each pair's residual; float64."""
        values, vectors = torch.linalg.eigh(self.T)
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = torch.linalg.vector_norm(self._coupling.double() @ vectors[-self.block :], dim=0)
        return values, vectors, residuals

    def _orthonormal(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal block X orthogonal to all the others, and the coupling β with βᵀX = the new part of Z.

        Twice is enough (Kahan, in Parlett 1980): the first projection leaves rounding in proportion to Z, the second in
        proportion to what was new in it. Where nothing was, QR's directions are its own, and made orthogonal by it too.
        """
        X, first = _orthonormal_rows(self._project(Z))
        X, second = _orthonormal_rows(self._project(X))
        return X, second @ first

    def _project(self, Z: Tensor) -> Tensor:
        for held in (*self._fixed, self._rows_Q[: self.size]):
            Z = torch.addmm(Z, Z @ held.T, held, alpha=-1)
        return Z


def _orthonormal_rows(Z: Tensor) -> tuple[Tensor, Tensor]:
    X, triangle = torch.linalg.qr(Z.T)
    return X.T, triangle
