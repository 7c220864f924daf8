"""A block Krylov space of M = WᵀW, kept orthonormal by full reorthogonalization."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.streaming import GramReader
from ..kernels.threads import helped
from ..memory import returned
from .certificate import bound_outside
from .ritz import RitzPairs, largest_eigenvalue, ritz_pairs

# What a projection leaves of a vector is rounding if it is below this many units in the last place of its length.
_ROUNDING_UNITS = 8
# Cholesky QR in float64 is used if the triangle's diagonal spans less than this.
_WELL_CONDITIONED = 1e-6
# A unit vector that a projection leaves this long was orthogonal except for rounding.
_STILL_LONG = 0.5
_MOST_PROJECTIONS = 5
# Rows of memory taken at a time for the basis.
_ROWS_AT_ONCE = 64
# For float32, as the kernels take them.
LIMITS = (_ROUNDING_UNITS * torch.finfo(torch.float32).eps, _WELL_CONDITIONED, _STILL_LONG)
_NO_STOPS = np.empty((0, 2))


class KrylovSpace:
    """An orthonormal basis Q (m×n, rows) of a block Krylov space of C = PMP, P = I − XᵀX.

    multiply: V (b×n) ↦ VWᵀ, VM. start: Ω (b×n), in the dtype of all arithmetic. fixed: X (s×n), orthonormal rows, that
    the space is kept orthogonal to; None: P = I, C = M. draw: fresh Gaussian rows, for directions that a block lacks.
    """

    def __init__(self, multiply: GramReader, start: Tensor, draw: torch.Generator, fixed: Tensor | None = None) -> None:
        self._multiply, self._draw, self._fixed = multiply, draw, fixed
        self._rows = start.new_empty(_ROWS_AT_ONCE, start.shape[1])
        self._T = torch.zeros(_ROWS_AT_ONCE, _ROWS_AT_ONCE, dtype=torch.float64)
        self.size = self.passes = 0
        # Ω is begunᵀ times the first rows of the basis, and what it has along X.
        self._next, self._begun, _ = self._orthonormal(start)
        self._leaving = torch.zeros(len(start), 0, dtype=torch.float64)

    @property
    def Q(self) -> Tensor:
        return self._rows[: self.size]

    @property
    def T(self) -> Tensor:
        """QMQᵀ (m×m), float64, on the CPU."""
        return self._T[: self.size, : self.size]

    @property
    def block(self) -> int:
        """Vectors of the next pass."""
        return len(self._next)

    @property
    def room(self) -> bool:
        """Whether another block fits next to this space and what it is kept orthogonal to."""
        held = self.size + (0 if self._fixed is None else len(self._fixed))
        return held + 2 * len(self._next) <= self._rows.shape[1]

    def grow(self, size: float, passes: int, stops: NDArray[np.float64] | None = None) -> None:
        """Take blocks into the basis until it holds `size` rows, or `passes` of them are taken, or there is no room.

        stops (passes, 2): also end after the i-th where λ_max(QMQᵀ) is below stops[i, 0] or not below stops[i, 1].
        """
        first = self.passes
        stopped = False
        while passes > 0 and self.size < size and self.room and not stopped:
            block = len(self._next)
            held = 0 if self._fixed is None else len(self._fixed)
            fitting = (self._rows.shape[1] - self.size - held) // block - 1
            wanted = int(min(passes, fitting, math.ceil((min(size, self._rows.shape[1]) - self.size) / block)))
            # Where it may end at any time, space for all passes would be cleared in vain.
            left = _NO_STOPS if stops is None else stops[self.passes - first :][: max(1, _ROWS_AT_ONCE // block)]
            taken, stopped = self._expand_compiled(wanted if stops is None else min(wanted, len(left)), left)
            if taken == 0:
                self.expand()
                stopped = len(left) > 0 and self.stopped(*left[0])
            passes -= max(1, taken)

    def expand(self) -> None:
        """Take the next block into the basis: one pass over W."""
        block = self._next
        first, last = self.size, self.size + len(block)
        self._hold(last)
        self._rows[first:last] = block
        self.size = last
        _, image = self._multiply(block)
        self._follow(image, first)

    def _follow(self, image: Tensor, first: int) -> None:
        """The end of a step: make MX of the basis's last rows, `first` on, the next block, and keep QMQᵀ."""
        last = self.size
        self.passes += 1
        self._next, coupling, along = self._orthonormal(image)
        column = along.cpu()
        self._T[:last, first:last] = column
        self._T[first:last, :last] = column.T
        own = column[first:]
        self._T[first:last, first:last] = (own + own.T) / 2
        self._leaves(coupling.cpu(), first)

    def _leaves(self, coupling: Tensor, first: int) -> None:
        self._leaving = torch.zeros(len(self._next), self.size, dtype=torch.float64)
        self._leaving[:, first:] = coupling

    def stopped(self, below: float, above: float) -> bool:
        """Whether λ_max(QMQᵀ) is below the first or not below the second, if they are numbers that it can be."""
        return (below > 0.0 or above < math.inf) and not below <= self.largest() < above

    def largest(self) -> float:
        """λ_max(QMQᵀ)."""
        return largest_eigenvalue(self.T)

    def bound_outside(self) -> tuple[float, float]:
        """c ≥ λ_max(C) of certificate.py's first step, if the start was Gaussian, and λ_max(QCQᵀ)."""
        return bound_outside(self.T, self._leaving, self._begun.cpu(), self.passes)

    def _expand_compiled(self, passes: int, stops: NDArray[np.float64]) -> tuple[int, bool]:
        """As many passes in one compiled call, where the kernels have one.

        Returns how many were taken, and whether one of the stops was reached.
        """
        if self._rows.device.type != "cpu" or self._rows.dtype != torch.float32:
            return 0, False
        from ..kernels.cpu.expansion import assist, expand
        from ..kernels.cpu.gram import FusedGramReaders
        from ..kernels.cpu.orthonormal import projection_space
        from ..kernels.cpu.team import job

        if not isinstance(self._multiply, FusedGramReaders):
            return 0, False
        block = len(self._next)
        reader = self._multiply.of(block)
        self._hold(self.size + passes * block)
        self._next = self._next.contiguous()
        fixed = self._rows[:0] if self._fixed is None else self._fixed
        coupling = torch.empty(block, block, dtype=torch.float64)
        rows, held = self._rows.numpy(), fixed.numpy()
        space, shared = projection_space(block, max(len(rows), len(held)), rows.shape[1]), job()
        with helped(partial(assist, *reader.compiled, rows, held, space, shared), reader.threads - 1):
            taken, whole, stopped = expand(
                *reader.compiled,
                rows,
                self._T.numpy(),
                held,
                space,
                self._next.numpy(),
                self._begun.numpy(),
                coupling.numpy(),
                self.size,
                passes,
                LIMITS,
                stops[:passes],
                shared,
                False,
            )
        self.size += taken * block
        self.passes += taken
        if whole:
            self._leaves(coupling, self.size - block)
        else:
            self.passes -= 1
            self._follow(self._next, self.size - block)
        return int(taken), bool(stopped)

    def take(self, other: KrylovSpace) -> None:
        """Join the space of C that was kept orthogonal to this one. The next block is as wide as both."""
        first, last = self.size, self.size + other.size
        self._hold(last)
        self._rows[first:last] = other.Q
        # Everything that leaves this space does so along its next block: MQᵀ = QᵀT + next·leaving.
        across = (other.Q @ self._next.T).double().cpu() @ self._leaving
        self._T[first:last, :first], self._T[:first, first:last] = across, across.T
        self._T[first:last, first:last] = other.T
        remaining = self._next - (self._next @ other.Q.T) @ other.Q
        leaving = torch.zeros(len(self._next) + len(other._next), last, dtype=torch.float64)
        leaving[: len(self._next), :first] = self._leaving
        leaving[len(self._next) :, first:] = other._leaving
        self.size = last
        self.passes += other.passes
        self._next, mixing, _ = self._orthonormal(torch.cat([remaining, other._next]))
        self._leaving = mixing.cpu() @ leaving

    def ritz(self) -> RitzPairs:
        return ritz_pairs(self.T, self._leaving, self._begun.cpu(), torch.finfo(self._rows.dtype).eps)

    def _hold(self, size: int) -> None:
        if size > len(self._rows):
            # Rows that are never written take no memory on a CPU, and copies would take it twice.
            shape = size + max(_ROWS_AT_ONCE, size // 2), self._rows.shape[1]
            wider = returned(shape, self._rows.dtype, self._rows.device)
            wider[: self.size] = self.Q
            self._rows = wider
        if size > len(self._T):
            side = size + size // 8
            T = returned((side, side), self._T.dtype)
            T[: self.size, : self.size] = self.T
            self._T = T

    def _orthonormal(self, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows X (b×n), orthonormal and orthogonal to all the others, with Z = βᵀX + (what Z has along the basis).

        Returns X, β (b×b) and Z's part along the basis (m×b), float64. Twice is enough (Kahan, in Parlett 1980): the
        first projection leaves rounding in proportion to Z, the second in proportion to what was new in it. Where
        nothing was new, random directions take its place, with zeros in β.
        """
        rounding = _ROUNDING_UNITS * torch.finfo(Z.dtype).eps
        if Z.device.type == "cpu" and Z.dtype == torch.float32:
            from ..kernels.cpu.orthonormal import orthonormal_against

            found = orthonormal_against(
                self.Q, self._fixed, Z, vanished=rounding, spread=_WELL_CONDITIONED, long=_STILL_LONG
            )
            if found is not None:
                return found
        along = torch.zeros(self.size, len(Z), dtype=torch.float64, device=Z.device)
        coupling = torch.eye(len(Z), dtype=torch.float64, device=Z.device)
        X = Z
        lengths = torch.linalg.vector_norm(Z, dim=1, dtype=torch.float64)
        for attempt in range(_MOST_PROJECTIONS):
            X, part = self._project(X)
            along += part @ coupling
            left = torch.linalg.vector_norm(X, dim=1, dtype=torch.float64)
            X, triangle = self._orthonormal_rows(X, left > rounding * lengths)
            coupling = triangle @ coupling
            lengths = torch.ones_like(lengths)
            if attempt > 0 and float(left.min()) > _STILL_LONG:
                break
        return X, coupling, along

    def _project(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        if self._fixed is not None:
            Z = torch.addmm(Z, Z @ self._fixed.T, self._fixed, alpha=-1)
        if self.size == 0:
            return Z, torch.zeros(0, len(Z), dtype=torch.float64, device=Z.device)
        along = self.Q @ Z.T
        return torch.addmm(Z, along.T, self.Q, alpha=-1), along.double()

    def _orthonormal_rows(self, Z: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """X (b×n), orthonormal, and an upper triangle with Z = triangleᵀ·X; rows that are not `new` count as zero.

        By Cholesky QR, with the Gram matrix in float64; by Householder's where that would lose digits.
        """
        wide = Z.double()
        if bool(new.all()):
            triangle, failed = torch.linalg.cholesky_ex(wide @ wide.T, upper=True)
            diagonal = triangle.diagonal()
            if not int(failed) and float(diagonal.min()) > _WELL_CONDITIONED * float(diagonal.max()):
                return torch.linalg.solve_triangular(triangle.T, wide, upper=False).to(Z.dtype), triangle
        order = torch.cat([new.nonzero()[:, 0], (~new).nonzero()[:, 0]])
        count = int(new.sum())
        fresh = torch.randn(len(Z) - count, Z.shape[1], generator=self._draw, dtype=torch.float64).to(Z.device)
        found, upper = torch.linalg.qr(torch.cat([wide[order[:count]], fresh]).T)
        triangle = torch.zeros_like(upper)
        triangle[:, order[:count]] = upper[:, :count]
        return found.T.to(Z.dtype).contiguous(), triangle
