"""`principal` for a batch of matrices on a GPU: many searches in step, and the same certificate for each.

certificate.py and goal.py say what is proven and how; krylov_spaces.py how a space grows without the host. The host
looks at the spaces where a real spectrum is proven, and then where the last look says. A matrix's looks depend on
itself alone, so that its bits do not depend on its neighbours. What the batch does not settle, as with singular values
that are equal or of a precision beyond float32's, is left to `principal`, one matrix after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from ..kernels.backend import WIDTH, GramBatch
from ..kernels.threads import each_of
from .goal import Goal, next_count
from .krylov import FLOAT32_RANGE, GRAM_SIZE
from .krylov_search import digest, gaussian, least_counting, trusted_stream
from .krylov_spaces import UNIT, KrylovSpaces, host_memory
from .last_passes import Promise, proven_together
from .ritz import RitzPairs, ritz_pairs
from .triplets import Principal

# A tensor core's product of float32 parts, with what it drops and truncates, is within a few units of float32's; one
# more is the random part of krylov_spaces.py. bench/gpu.py measures it.
PRODUCT_UNIT = 5 * UNIT
# Vectors that a real spectrum needs to be proven by blocks of 16: so many times the rank, plus a constant, whichever
# pair gives fewer.
_VECTORS = ((6.0, 96), (3.5, 160))
# And by how much less, as they come to be a large share of W's smaller side, since its spectrum has an end.
_LESS = 0.22
# The space may grow to this many times that, and this share of the smaller side.
_GROWTH, _MOST = 3, 7 / 8
# Where nothing says how many more it takes, so large a share of them.
_FURTHER = 0.2
# Beside so many vectors a look takes longer than a pass: one more than is expected for each time as many.
_VECTORS_A_PASS = 256


def expected_vectors(rank: int, n: int) -> int:
    """Vectors that a search of this rank is expected to take for W of this smaller side, in whole blocks of 16.

    >>> expected_vectors(8, 4096), expected_vectors(128, 4096), expected_vectors(128, 768)
    (144, 608, 544)
    """
    vectors = min(a_rank * rank + more for a_rank, more in _VECTORS)
    return WIDTH * ceil(vectors / (1 + _LESS * (vectors / n) ** 2) / WIDTH)


def room(n: int, ranks: Sequence[int]) -> int:
    """Vectors that a search may take for a matrix of this smaller side; 0: no search.

    >>> room(4096, [8]), room(384, [8]), room(768, [128])
    (432, 0, 672)
    """
    expected = expected_vectors(max(ranks), n)
    most = min(_GROWTH * expected, int(_MOST * n) // WIDTH * WIDTH)
    return most if n > GRAM_SIZE and most >= expected else 0


def passes_expected(rank: int, n: int) -> int:
    """Products with W, to the first look, at which a real spectrum is proven."""
    return expected_vectors(rank, n) // WIDTH


def start_of(W: Tensor, threads: int) -> Tensor:
    """The block (16×n) that a search for W begins with, n its smaller side: drawn by the stream that W's hash decides.

    threads: for the hash.
    """
    return gaussian(WIDTH, min(W.shape), trusted_stream(digest(W, threads)))


@dataclass
class _Searched:
    """The matrix at `index`. look: after so many passes. promise: if there is one. lost: the batch cannot settle it."""

    index: int
    goal: Goal
    look: int
    promise: Promise | None = None
    lost: bool = False
    before: int = 0
    then: float = math.inf

    def judge(self, pairs: RitzPairs, size: int) -> None:
        """At `size` vectors: whether it is proven, or lost; or how many more may prove it."""
        if self.goal.too_coarse(pairs):
            self.lost = True
            return
        kept, outside, bound = self.goal.counted(pairs, least_counting(WIDTH, self.goal.rank))
        if kept > 0:
            # A copy, since T is a part of all the batch's.
            pairs = replace(pairs, T=pairs.T.copy())
            self.promise = Promise(self.index, self.goal, pairs, kept, size, outside)
        else:
            self.lost = bound == math.inf and not self.goal.separable(pairs)
            # Alone with the GPU, it would take far longer than a few passes more.
            target = next_count(size, WIDTH, bound, self.before, self.then) or size * (1 + _FURTHER)
            self.look = max(self.look + 1, ceil(target / WIDTH) + size // _VECTORS_A_PASS)
            self.before, self.then = size, bound


def principals(
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, starts: Sequence[Tensor], vectors: int
) -> list[Principal | None]:
    """The leading singular triplets of each W of the batch, certified for each of its ranks; None where they are not.

    starts: `start_of` each. vectors: what `room` allows each of them. The triplets are on the CPU, the rest as for
    `principal`.
    """
    with full_precision():
        return _principals(batch, ranks, tolerance, starts, vectors)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, torch multiplies float32 matrices on a GPU in float32, whatever the user allows; afterwards as before.

    torch has an older switch and a newer one, and the older one raises where the newer alone was used.
    """
    matmul = torch.backends.cuda.matmul
    if getattr(matmul, "fp32_precision", "tf32") != "tf32":
        yield
        return
    precision = ""
    switch: tuple[str, str | bool] = ("fp32_precision", "ieee")
    with suppress(RuntimeError):
        precision = torch.get_float32_matmul_precision()
        switch = ("allow_tf32", False)
    name, off = switch
    before = getattr(matmul, name)
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)
        if precision == "medium":
            torch.set_float32_matmul_precision(precision)


def _principals(
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, starts: Sequence[Tensor], vectors: int
) -> list[Principal | None]:
    energies = batch.energies.tolist()
    searched = [
        _Searched(
            index,
            Goal(energy, tuple(dict.fromkeys(wanted)), tolerance, PRODUCT_UNIT, exact=False),
            # The basis has this length for all matrices of the batch: what decides its shapes is theirs alone.
            min(passes_expected(max(wanted), batch.shape[2]), vectors // WIDTH),
        )
        for index, (energy, wanted) in enumerate(zip(energies, ranks, strict=False))
    ]
    for one in searched:
        one.lost = not FLOAT32_RANGE[0] < one.goal.energy < FLOAT32_RANGE[1]
    spaces = _proven(batch, searched, starts, vectors)
    promises = [one.promise for one in searched if one.promise is not None]
    found = proven_together(batch, spaces, promises, max(map(max, ranks)))
    return [found.get(index) for index in range(len(searched))]


def _dense(batch: GramBatch, starts: Sequence[Tensor]) -> Tensor:
    """These blocks, zero beyond each matrix's own size; ones where there is no matrix."""
    device = batch.energies.device
    dense = host_memory(batch.shape, torch.float32, device).fill_(1.0)
    for index, (n, start) in enumerate(zip(batch.sizes, starts, strict=False)):
        dense[index, :, n:] = 0.0
        dense[index, :, :n] = start
    return dense.to(device, non_blocking=True)


def _proven(batch: GramBatch, searched: Sequence[_Searched], starts: Sequence[Tensor], vectors: int) -> KrylovSpaces:
    """Grow all spaces until each is proven or lost, or at its end."""
    # As many as the first look needs, and that many more at a time.
    first = WIDTH * max(one.look for one in searched)
    spaces = KrylovSpaces(batch, _dense(batch, starts), [*range(first, vectors, first), vectors], batch.captured)
    begun = spaces.begun.cpu()
    going = {index for index, one in enumerate(searched) if not one.lost}
    batch.keep(going)
    while going and spaces.size + WIDTH <= vectors:
        spaces.expand()
        full = spaces.size + WIDTH > vectors
        due = [index for index in sorted(going) if full or searched[index].look <= spaces.passes]
        if not due:
            continue
        T, coupling = spaces.here()

        def look(index: int, T: Tensor = T, coupling: Tensor = coupling) -> None:
            searched[index].judge(ritz_pairs(T[index], spaces.leaving(coupling[index]), begun[index]), spaces.size)

        each_of(look, due, flops=2 * spaces.size**3)
        going -= {index for index in due if searched[index].lost or searched[index].promise is not None}
        batch.keep(going)
    return spaces
