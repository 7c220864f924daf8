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

from ..kernels.backend import GramBatch
from ..kernels.dense import combine
from ..kernels.streaming import gram_product
from ..kernels.threads import one_torch_thread, side_by_side
from .goal import Goal, next_count
from .krylov import FLOAT32_RANGE, GRAM_SIZE
from .krylov_search import gaussian, least_counting, trusted_stream
from .krylov_spaces import UNIT, KrylovSpaces
from .ritz import RitzPairs, ritz_pairs
from .triplets import LastPass, Principal, concluded

# A tensor core's product of float32 parts, with what it drops and truncates, is within a few units of float32's; one
# more is the random part of krylov_spaces.py. bench/gpu.py measures it.
PRODUCT_UNIT = 5 * UNIT
# Vectors that a real spectrum needs to be proven by blocks of 16: so many times the rank, plus a constant, whichever
# pair gives fewer.
_VECTORS = ((6.0, 96), (3.5, 160))
# The space may grow to this many times that.
_GROWTH = 2


def expected_vectors(rank: int) -> int:
    """Vectors that a search of this rank is expected to take, in whole blocks of 16.

    >>> expected_vectors(8), expected_vectors(128)
    (144, 608)
    """
    return 16 * ceil(min(a_rank * rank + more for a_rank, more in _VECTORS) / 16)


def room(n: int, ranks: Sequence[int]) -> int:
    """Vectors that a search may take for matrices whose smaller side is n, or is rounded up to n; 0: no search.

    >>> room(4096, [8]), room(384, [8]), room(768, [128])
    (288, 0, 0)
    """
    expected = expected_vectors(max(ranks))
    most = min(_GROWTH * expected, n // 2 // 16 * 16)
    return most if n > GRAM_SIZE and most >= expected else 0


def passes_expected(rank: int) -> int:
    """Products with W, to the first look, at which a real spectrum is proven."""
    return expected_vectors(rank) // 16


@dataclass
class _Searched:
    """One matrix. look: after so many passes. pairs: of its space of so many vectors, once that is proven by `kept`.

    outside: c' of certificate.py. lost: whether the batch cannot settle it.
    """

    goal: Goal
    n: int
    look: int
    pairs: RitzPairs | None = None
    vectors: int = 0
    kept: int = 0
    outside: float = math.inf
    lost: bool = False
    before: int = 0
    then: float = math.inf

    def judge(self, pairs: RitzPairs, size: int) -> None:
        """At `size` vectors: whether it is proven, or lost; or how many more may prove it."""
        if self.goal.too_coarse(pairs):
            self.lost = True
            return
        kept, self.outside, bound = self.goal.counted(pairs, least_counting(16, self.goal.rank))
        if kept > 0:
            self.pairs, self.kept, self.vectors = pairs, kept, size
        else:
            target = next_count(size, 16, bound, self.before, self.then)
            self.lost = target == 0
            self.look = max(self.look + 1, ceil(target / 16))
            self.before, self.then = size, bound


def principals(
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, digests: Sequence[bytes], vectors: int
) -> list[Principal | None]:
    """The leading singular triplets of each W of the batch, certified for each of its ranks; None where they are not.

    vectors: what `room` allows each of them. The rest as for `principal`.
    """
    with full_precision():
        return _principals(batch, ranks, tolerance, digests, vectors)


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
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, digests: Sequence[bytes], vectors: int
) -> list[Principal | None]:
    energies = batch.energies.tolist()
    searched = [
        _Searched(
            Goal(energy, tuple(dict.fromkeys(wanted)), tolerance, PRODUCT_UNIT, exact=False),
            n,
            passes_expected(max(wanted)),
        )
        for energy, wanted, n in zip(energies, ranks, batch.sizes, strict=False)
    ]
    for one in searched:
        one.lost = not FLOAT32_RANGE[0] < one.goal.energy < FLOAT32_RANGE[1]
    spaces = _proven(batch, searched, digests, vectors)
    # What is computed on the CPU has the same bits for any number of threads, which MKL changes with the load.
    with one_torch_thread():
        return [
            _finished(batch, index, one, spaces.Q[index]) if one.pairs is not None and not one.lost else None
            for index, one in enumerate(searched)
        ]


def _starts(batch: GramBatch, blocks: Sequence[Tensor | None]) -> Tensor:
    """These blocks, zero beyond each matrix's own size; where there is none, and no matrix, ones."""
    starts = torch.ones(batch.shape, dtype=torch.float32)
    for index, (n, block) in enumerate(zip(batch.sizes, blocks, strict=False)):
        starts[index] = 0.0
        starts[index, :, :n] = 1.0 if block is None else block
    return starts.to(batch.energies.device)


def _proven(batch: GramBatch, searched: Sequence[_Searched], digests: Sequence[bytes], vectors: int) -> KrylovSpaces:
    """Grow all spaces until each is proven or lost, or at its end."""

    def drawn(index: int) -> Tensor | None:
        if searched[index].lost:
            return None
        return gaussian(batch.shape[1], batch.sizes[index], trusted_stream(digests[index]))

    with one_torch_thread() as threads:
        starts = list(side_by_side(drawn, range(len(searched)), threads))
    spaces = KrylovSpaces(batch, _starts(batch, starts), vectors)
    begun = spaces.begun.cpu()
    going = {index for index, one in enumerate(searched) if not one.lost}
    batch.keep(going)
    while going and spaces.size + 16 <= vectors:
        spaces.expand()
        due = [index for index in sorted(going) if searched[index].look <= spaces.passes]
        if not due:
            continue
        T, coupling = spaces.here()

        def look(index: int, T: Tensor = T, coupling: Tensor = coupling) -> None:
            searched[index].judge(ritz_pairs(T[index], spaces.leaving(coupling[index]), begun[index]), spaces.size)

        # On one thread each: MKL's bits change with the number.
        with one_torch_thread() as threads:
            list(side_by_side(look, due, threads))
        going -= {index for index in due if searched[index].lost or searched[index].pairs is not None}
        batch.keep(going)
    return spaces


def _finished(batch: GramBatch, index: int, one: _Searched, Q: Tensor) -> Principal | None:
    """The triplets from one more product in float64; None where they are not certified for all."""
    assert one.pairs is not None
    pairs, W = one.pairs, batch.tall(index)
    X = combine(Q[: one.vectors, : one.n], pairs.vectors(one.kept), threads=1)
    Y, image = gram_product(W, X)
    found = concluded(
        one.goal,
        pairs,
        one.outside,
        LastPass(X, Y, image),
        passes=one.vectors // 16 + 1,
        vectors=one.vectors + one.kept,
    )
    if not all(found.certified.values()):
        return None
    return found if W.shape == batch.stored(index).shape else replace(found, U=found.V, V=found.U)
