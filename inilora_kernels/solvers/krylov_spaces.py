"""Many block Krylov spaces that grow in step, on a GPU: the host only enqueues, and reads nothing back.

`KrylovSpace` for one matrix asks after each pass what was new and repeats what was not; each answer would keep a GPU
waiting. Here every pass does the same work whatever it finds:

- three rounds of projection and Cholesky QR, with Gram matrices in float64, where two are enough as a rule (Kahan, in
  Parlett 1980) and a third mends what the first left of a block that had little new in it;
- a direction that nothing new was found along is replaced by a random one, by a mask, with zeros in β;
- every row gets a random part of the size of float32's rounding, so that the Gram matrix of a block of equal rows has a
  Cholesky factor too: their condition is then at most 2²⁴ or so, and that of their Gram matrix within float64's.

So MQᵀ = QᵀT + NL, as certificate.py has it, holds within `UNIT` of each row's length, which the caller adds to what
the products round away.

Every pass is also the same launches on tensors of the same shapes, with places that are counted on the device, so that
a graph of one repeats for all: 80 launches of a few microseconds each, which take a host 3 ms to enqueue one by one.
The vectors lie in PARTS parts, since few rows keep a GPU busy only where their long sums are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.backend import Captured, no_graph

# float32's unit, in which rounding and the random part of a row are counted.
UNIT = 2.0**-23
# What a projection leaves of a row is rounding if it is below this many units of its length.
_ROUNDING_UNITS = 8
_MORE_ROUNDS = 2
# Of a vector; its length is a multiple of them.
PARTS = 8

# X (c×b×n) ↦ XM, for each matrix of the batch; the result is overwritten by the next call.
Multiply = Callable[[Tensor], Tensor]


class KrylovSpaces:
    """An orthonormal basis Q (m×n, rows) of a block Krylov space of M = WᵀW, for each of c matrices.

    start (c×b×n): Ω of each, float32, zero beyond a matrix's own size, and nowhere all zero. rooms: numbers of vectors,
    ascending; a pass works on a basis of the first that is enough, in zeros where it has none yet, and the last is the
    most that the spaces may have. captured: makes a pass a graph.
    """

    def __init__(self, multiply: Multiply, start: Tensor, rooms: Sequence[int], captured: Captured = no_graph) -> None:
        count, block, length = start.shape
        device, room = start.device, rooms[-1]
        self._multiply, self._captured, self._rooms = multiply, captured, tuple(rooms)
        self._inside = _in_parts((start != 0).any(dim=1, keepdim=True))
        # Each pass takes other rows of it: they stand one column further on.
        stream = torch.Generator().manual_seed(0)
        noise = torch.randn(block, length + room // block + 2, generator=stream, dtype=torch.float32)
        self._random, self._columns = noise.to(device), torch.arange(length, device=device)
        self._rows = start.new_zeros(count, PARTS, room, length // PARTS)
        self._T = torch.zeros(count, room, room, dtype=torch.float64, device=device)
        self._identity = torch.eye(block, dtype=torch.float64, device=device)
        # The places of the next block.
        self._places = torch.arange(block, device=device)
        self.size = self.passes = 0
        # The graph of a pass, once there is one. Not `_grow` itself: an object that holds its own method dies late, and
        # with it the batch's weights.
        self._room = rooms[0]
        self._graph: Callable[[], None] | None = None
        # Ω is begunᵀ times the first rows of the basis.
        self._next, self.begun, _ = self._orthonormal(_in_parts(start))
        self._coupling = torch.zeros_like(self.begun)
        self._columns += 1

    @property
    def Q(self) -> Tensor:
        """(c×m×n), float32."""
        return _whole(self._rows[:, :, : self.size])

    @property
    def T(self) -> Tensor:
        """QMQᵀ (c×m×m), float64, on the device."""
        return self._T[:, : self.size, : self.size]

    @property
    def count(self) -> int:
        """How many spaces there are: c."""
        return len(self._rows)

    @property
    def room(self) -> int:
        """The most vectors that a space may have."""
        return self._rooms[-1]

    @property
    def device(self) -> torch.device:
        """What all of this is on."""
        return self._rows.device

    def expand(self) -> None:
        """Take the next block of every space into its basis: one product with every W. Reads nothing back."""
        block, first = len(self._places), self.size in (0, *self._rooms)
        self.size += block
        self.passes += 1
        if first:
            # Not as a graph: what libraries set up when they are called first is no part of one.
            self._room, self._graph = next(room for room in self._rooms if room >= self.size), None
        elif self.size - 2 * block in (0, *self._rooms):
            self._graph = self._captured(self._grow)
        (self._graph or self._grow)()

    def here(self) -> tuple[Tensor, Tensor]:
        """T and the β (c×b×b) of the last block, on the CPU: the host waits for the device here."""
        return on_host(self.T), on_host(self._coupling)

    def leaving(self, coupling: Tensor) -> Tensor:
        """L (b×m) of one space, given the β (b×b) of its last block: what MQᵀ has outside of it."""
        found = coupling.new_zeros(len(coupling), self.size)
        found[:, self.size - coupling.shape[1] :] = coupling
        return found

    def combined(self, coefficients: Tensor) -> Tensor:
        """The combinations (c×s×n) of each basis with these coefficients (c×s×room, float32), orthonormal in float64.

        As kernels/dense.py's `combine`: NaN where a matrix's coefficients are not independent; a row of zeros stays so.
        """
        weights = coefficients.to(self._rows.device, non_blocking=True)
        X = torch.stack([torch.bmm(weights, self._rows[:, part]).double() for part in range(PARTS)], dim=1)
        gram = _gram(X)
        gram.diagonal(dim1=1, dim2=2).add_((weights == 0).all(dim=2).to(gram))
        triangle, failed = torch.linalg.cholesky_ex(gram)
        triangle = triangle.masked_fill((failed > 0)[:, None, None], torch.nan)
        identity = torch.eye(len(gram[0]), dtype=gram.dtype, device=gram.device).expand_as(gram)
        return _whole(_times(torch.linalg.solve_triangular(triangle, identity, upper=False), X))

    def _grow(self) -> None:
        self._rows.index_copy_(2, self._places, self._next)
        image = _in_parts(self._multiply(_whole(self._next)))
        following, coupling, along = self._orthonormal(image)
        own = along.index_select(1, self._places)
        along.index_copy_(1, self._places, (own + own.mT) / 2)
        T = self._T[:, : self._room, : self._room]
        T.index_copy_(2, self._places, along)
        T.index_copy_(1, self._places, along.mT)
        self._next.copy_(following)
        self._coupling.copy_(coupling)
        self._places += len(self._places)
        self._columns += 1

    def _orthonormal(self, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows X, orthonormal and orthogonal to all the others, β and Z's part along the basis; see KrylovSpace."""
        lengths = _lengths(Z)
        noise = _in_parts(self._random.index_select(1, self._columns)[None]) * self._inside
        noise = noise / _lengths(noise)
        X, along = self._project(Z)
        new = _lengths(X) > _ROUNDING_UNITS * UNIT * lengths
        # Of the scale of each row's rounding; alone where there is nothing else.
        X, triangle = self._orthonormal_rows(torch.where(new, X + UNIT * lengths * noise, noise))
        coupling = torch.where(new[:, 0], triangle.mT, 0.0).mT
        for _ in range(_MORE_ROUNDS):
            X, part = self._project(X)
            along = torch.baddbmm(along, part, coupling)
            X, triangle = self._orthonormal_rows(X)
            coupling = triangle @ coupling
        return X, coupling, along

    def _project(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Z without what it has along the basis, and that (c×m×b), in float64."""
        Q, rows = self._rows[:, :, : self._room].flatten(0, 1), Z.flatten(0, 1)
        along = torch.bmm(Q, rows.mT).view(-1, PARTS, self._room, len(self._places)).sum(dim=1)
        weights = along.mT[:, None].expand(-1, PARTS, -1, -1).flatten(0, 1)
        return torch.baddbmm(rows, weights, Q, alpha=-1).view_as(Z), along.double()

    def _orthonormal_rows(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """X, orthonormal rows, and upper triangles (c×b×b) with Z = triangleᵀ·X, from Gram matrices in float64."""
        wide = Z.double()
        gram = _gram(wide)
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-300)[:, :, None]
        triangle, _ = torch.linalg.cholesky_ex(gram / (lengths * lengths.mT))
        identity = self._identity.expand_as(gram)
        inverse = torch.linalg.solve_triangular(triangle, identity, upper=False) / lengths.mT
        return _times(inverse, wide).float(), (lengths * triangle).mT


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor on the CPU that a GPU reads and writes itself; torch keeps its memory for the next."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def on_host(found: Tensor) -> Tensor:
    """A copy on the CPU."""
    return host_memory(found.shape, found.dtype, found.device).copy_(found)


def _in_parts(X: Tensor) -> Tensor:
    """(c×b×n) as (c×PARTS×b×n/PARTS)."""
    count, rows, length = X.shape
    return X.reshape(count, rows, PARTS, length // PARTS).transpose(1, 2).contiguous()


def _whole(X: Tensor) -> Tensor:
    """What `_in_parts` was made of."""
    return X.transpose(1, 2).flatten(2)


def _lengths(X: Tensor) -> Tensor:
    """Of each row (c×1×b×1)."""
    lengths: Tensor = torch.linalg.vector_norm(X, dim=(1, 3), keepdim=True)
    return lengths


def _gram(X: Tensor) -> Tensor:
    """XXᵀ (c×b×b)."""
    rows = X.flatten(0, 1)
    return torch.bmm(rows, rows.mT).view(-1, PARTS, X.shape[2], X.shape[2]).sum(dim=1)


def _times(square: Tensor, X: Tensor) -> Tensor:
    """Square (c×b×b) matrices times the rows of X."""
    return torch.bmm(square[:, None].expand(-1, PARTS, -1, -1).flatten(0, 1), X.flatten(0, 1)).view_as(X)
