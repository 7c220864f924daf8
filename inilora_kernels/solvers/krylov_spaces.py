"""Many block Krylov spaces that grow in step, on a GPU: the host only enqueues, and waits for nothing.

`KrylovSpace` for one matrix asks after each pass what was new and repeats what was not; each answer would keep a GPU
waiting. Here every pass does the same work whatever it finds:

- three rounds of projection and Cholesky QR, with Gram matrices in float64, where two are enough as a rule (Kahan, in
  Parlett 1980) and a third mends what the first left of a block that had little new in it;
- a direction that nothing new was found along is replaced by a random one, by a mask, with zeros in β;
- every row gets a random part of the size of float32's rounding, so that the Gram matrix of a block of equal rows has a
  Cholesky factor too: their condition is then at most 2²⁴ or so, and that of their Gram matrix within float64's.

So MQᵀ = QᵀT + NL, as certificate.py has it, holds within `UNIT` of each row's length, which the caller adds to what
the products round away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# float32's unit, in which rounding and the random part of a row are counted.
UNIT = 2.0**-23
# What a projection leaves of a row is rounding if it is below this many units of its length.
_ROUNDING_UNITS = 8
_ROUNDS = 3

# X (c×b×n) ↦ XM, for each matrix of the batch; the result is overwritten by the next call.
Multiply = Callable[[Tensor], Tensor]


class KrylovSpaces:
    """An orthonormal basis Q (m×n, rows) of a block Krylov space of M = WᵀW, for each of c matrices.

    start (c×b×n): Ω of each, float32, zero beyond a matrix's own size, and nowhere all zero. room: vectors that the
    spaces may have.
    """

    def __init__(self, multiply: Multiply, start: Tensor, room: int) -> None:
        count, self._block, length = start.shape
        self._multiply = multiply
        self._inside = (start != 0).any(dim=1, keepdim=True)
        # Each pass takes other rows of it: they stand one column further on.
        stream = torch.Generator().manual_seed(0)
        noise = torch.randn(self._block, length + room // self._block + 2, generator=stream, dtype=torch.float32)
        self._random = noise.to(start.device)
        self._rows = start.new_zeros(count, room + self._block, length)
        self._T = torch.zeros(count, room, room, dtype=torch.float64, device=start.device)
        self.size = self.passes = 0
        # Ω is begunᵀ times the first rows of the basis.
        self._next, self.begun, _ = self._orthonormal(start)
        self._coupling = torch.zeros(count, self._block, self._block, dtype=torch.float64, device=start.device)

    @property
    def Q(self) -> Tensor:
        """(c×m×n), float32."""
        return self._rows[:, : self.size]

    @property
    def T(self) -> Tensor:
        """QMQᵀ (c×m×m), float64, on the device."""
        return self._T[:, : self.size, : self.size]

    def expand(self) -> None:
        """Take the next block of every space into its basis: one product with every W, and no wait for the device."""
        first, last = self.size, self.size + self._block
        self._rows[:, first:last] = self._next
        self.size = last
        self.passes += 1
        image = self._multiply(self._next)
        self._next, self._coupling, along = self._orthonormal(image)
        self._T[:, :last, first:last] = along
        self._T[:, first:last, :last] = along.mT
        own = along[:, first:]
        self._T[:, first:last, first:last] = (own + own.mT) / 2

    def here(self) -> tuple[Tensor, Tensor]:
        """T and the β (c×b×b) of the last block, on the CPU: the host waits for the device here, and nowhere else."""
        return self.T.cpu(), self._coupling.cpu()

    def leaving(self, coupling: Tensor) -> Tensor:
        """L (b×m) of one space, given the β (b×b) of its last block: what MQᵀ has outside of it."""
        found = coupling.new_zeros(len(coupling), self.size)
        found[:, self.size - coupling.shape[1] :] = coupling
        return found

    def _orthonormal(self, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows X, orthonormal and orthogonal to all the others, β and Z's part along the basis; see KrylovSpace."""
        count, block, _ = Z.shape
        along = torch.zeros(count, self.size, block, dtype=torch.float64, device=Z.device)
        coupling = torch.eye(block, dtype=torch.float64, device=Z.device).expand(count, block, block)
        lengths = torch.linalg.vector_norm(Z, dim=2, keepdim=True)
        noise = self._random[:, self.passes :][:, : Z.shape[2]] * self._inside
        noise = noise / torch.linalg.vector_norm(noise, dim=2, keepdim=True)
        X = Z
        for attempt in range(_ROUNDS):
            X, part = self._project(X)
            along = along + part @ coupling
            left = torch.linalg.vector_norm(X, dim=2, keepdim=True)
            new = left > _ROUNDING_UNITS * UNIT * lengths
            if attempt == 0:
                # Of the scale of each row's rounding; alone where there is nothing else.
                X = torch.where(new, X + UNIT * lengths * noise, noise)
            X, triangle = _orthonormal_rows(X)
            coupling = torch.where(new, triangle.mT, 0.0).mT @ coupling if attempt == 0 else triangle @ coupling
            lengths = torch.ones_like(lengths)
        return X, coupling, along

    def _project(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        if self.size == 0:
            return Z, torch.zeros(len(Z), 0, Z.shape[1], dtype=torch.float64, device=Z.device)
        along = self.Q @ Z.mT
        return torch.baddbmm(Z, along.mT, self.Q, alpha=-1), along.double()


def _orthonormal_rows(Z: Tensor) -> tuple[Tensor, Tensor]:
    """X (c×b×n), orthonormal rows, and upper triangles with Z = triangleᵀ·X, from the Gram matrices in float64."""
    wide = Z.double()
    lengths = torch.linalg.vector_norm(wide, dim=2, keepdim=True).clamp(min=1e-300)
    rows = wide / lengths
    triangle, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    return torch.linalg.solve_triangular(triangle, rows, upper=False).float(), (lengths * triangle).mT
