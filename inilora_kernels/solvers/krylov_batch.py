"""`principal` for a batch of matrices on a GPU: many searches in step, and the same certificate for each.

certificate.py and goal.py say what is proven and how; krylov_spaces.py how a space grows without the host. The host
looks at the spaces every `_LOOK_EVERY` passes, which cost one product with every W. A matrix's looks depend on its
rank alone, so that its bits do not depend on its neighbours. What the batch does not settle, as with singular values
that are equal or of a precision beyond float32's, is left to `principal`, one matrix after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from ..kernels.backend import GramBatch
from ..kernels.dense import combine
from ..kernels.streaming import gram_product
from ..kernels.threads import one_torch_thread, side_by_side
from .certificate import bound_outside
from .goal import Goal
from .krylov import FLOAT32_RANGE, GRAM_SIZE
from .krylov_search import MISSED, PROMISED, Digest, gaussian, start_stream, trusted_stream
from .krylov_spaces import UNIT, KrylovSpaces
from .ritz import RitzPairs, ritz_pairs
from .triplets import LastPass, Principal, concluded

# A tensor core's product of float32 parts, with what it drops and truncates, is within a few units of float32's; one
# more is the random part of krylov_spaces.py. bench/gpu.py measures it.
PRODUCT_UNIT = 5 * UNIT
# Vectors that a real spectrum needs to converge by blocks of 16: about this many times the rank, plus a constant.
_VECTORS_A_RANK, _VECTORS_MORE, _FIRST_LOOK = 3.4, 100, 0.85
# The space may grow to this many times that.
_GROWTH = 2
_LOOK_EVERY = 2
_FIRST_LOOK_OUTSIDE, _MOST_PASSES_OUTSIDE = 3, 17
# By how much the bound on λ_max outside exceeds the largest Ritz value after about five passes of 16 columns.
_FACTOR_OUTSIDE = 1.2


def expected_vectors(rank: int) -> int:
    """Vectors that a search of this rank is expected to take, in whole blocks of 16.

    >>> expected_vectors(8), expected_vectors(128)
    (128, 544)
    """
    return 16 * ceil((_VECTORS_A_RANK * rank + _VECTORS_MORE) / 16)


def room(n: int, ranks: Sequence[int]) -> int:
    """Vectors that a search may take for matrices whose smaller side is n, or is rounded up to n; 0: no search.

    >>> room(4096, [8]), room(384, [8]), room(768, [128])
    (256, 0, 0)
    """
    expected = expected_vectors(max(ranks))
    most = min(_GROWTH * expected, n // 2 // 16 * 16)
    return most if n > GRAM_SIZE and most >= expected else 0


def passes_expected(rank: int) -> int:
    """Products with W, to the first look at which a real spectrum has converged and the certificate's."""
    return expected_vectors(rank) // 16 + _FIRST_LOOK_OUTSIDE


@dataclass
class _Searched:
    """One matrix. vectors: of its space, once that has converged. outside: of its second one.

    missed: the bound on λ_max outside of the space. lost: whether the batch cannot settle it.
    """

    goal: Goal
    n: int
    pairs: RitzPairs | None = None
    missed: float = math.inf
    vectors: int = 0
    outside: int = 0
    lost: bool = False

    def first_look(self) -> int:
        return ceil(_FIRST_LOOK * expected_vectors(self.goal.rank) / 16)

    def judge(self, pairs: RitzPairs) -> bool:
        """Whether no more vectors are needed: these promise enough, or float32 does not suffice."""
        if self.goal.too_coarse(pairs):
            self.lost = True
        elif self.goal.promised(pairs, self.goal.expected_outside(pairs, _FACTOR_OUTSIDE)) <= PROMISED:
            self.pairs = pairs
        return self.lost or self.pairs is not None

    def judge_outside(self, bound: float, largest: float, passes: int) -> bool:
        """Whether the second space has settled it, or found that the first one missed something."""
        assert self.pairs is not None
        self.outside = 16 * passes
        self.missed = min(self.missed, bound + 2 * self.goal.rounding(self.pairs))
        highest = float(self.pairs.theta[self.goal.rank - 1])
        if self.missed < highest and self.goal.settled(self.pairs, self.missed)[0]:
            return True
        self.lost = passes > _FIRST_LOOK_OUTSIDE and largest >= MISSED * highest
        return self.lost


def principals(
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, digests: Sequence[Digest], vectors: int
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
    batch: GramBatch, ranks: Sequence[Sequence[int]], tolerance: float, digests: Sequence[Digest], vectors: int
) -> list[Principal | None]:
    energies = batch.energies.tolist()
    searched = [
        _Searched(Goal(energy, tuple(dict.fromkeys(wanted)), tolerance, PRODUCT_UNIT, exact=False), n)
        for energy, wanted, n in zip(energies, ranks, batch.sizes, strict=False)
    ]
    for one in searched:
        one.lost = not FLOAT32_RANGE[0] < one.goal.energy < FLOAT32_RANGE[1]
    spaces = _converged(batch, searched, vectors)
    if any(one.pairs is not None for one in searched):
        _look_outside(batch, searched, digests, _until(spaces, searched))
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


def _converged(batch: GramBatch, searched: Sequence[_Searched], vectors: int) -> KrylovSpaces:
    """Grow all spaces until each promises enough, or is at its end."""
    drawn = {n: gaussian(batch.shape[1], n, start_stream()) for n in set(batch.sizes)}
    spaces = KrylovSpaces(batch, _starts(batch, [drawn[n] for n in batch.sizes]), vectors)
    going = {index for index, one in enumerate(searched) if not one.lost}
    batch.keep(going)
    looks = {index: searched[index].first_look() for index in going}
    while going and spaces.size + 16 <= vectors:
        spaces.expand()
        due = [index for index in sorted(going) if looks[index] == spaces.passes]
        if not due:
            continue
        T, coupling = spaces.here()

        def look(index: int, T: Tensor = T, coupling: Tensor = coupling) -> bool:
            return searched[index].judge(ritz_pairs(T[index], spaces.leaving(coupling[index])))

        looks |= {index: looks[index] + _LOOK_EVERY for index in due}
        for index in _settled(look, due):
            searched[index].vectors = spaces.size
            going.discard(index)
        batch.keep(going)
    return spaces


def _settled(look: Callable[[int], bool], due: Sequence[int]) -> set[int]:
    """Those of the matrices that a look settles, on one thread each: MKL's bits change with the number."""
    with one_torch_thread() as threads:
        verdicts = list(side_by_side(look, due, threads))
    return {index for index, done in zip(due, verdicts, strict=True) if done}


def _until(spaces: KrylovSpaces, searched: Sequence[_Searched]) -> Tensor:
    """Each space up to where it had converged, then zeros; all zeros for lost matrices."""
    sizes = [0 if one.pairs is None else one.vectors for one in searched]
    sizes += [0] * (len(spaces.Q) - len(sizes))
    grown = torch.arange(spaces.size)[None, :] < torch.tensor(sizes)[:, None]
    return torch.where(grown[:, :, None].to(spaces.Q.device), spaces.Q, 0.0)[:, : max(sizes)]


def _look_outside(batch: GramBatch, searched: Sequence[_Searched], digests: Sequence[Digest], fixed: Tensor) -> None:
    """Bound what lies outside of each space from a second one, drawn from W's hash once the first is fixed."""
    going = {index for index, one in enumerate(searched) if one.pairs is not None}

    def drawn(index: int) -> Tensor | None:
        if index not in going:
            return None
        return gaussian(batch.shape[1], batch.sizes[index], trusted_stream(digests[index]))

    with one_torch_thread() as threads:
        blocks = list(side_by_side(drawn, range(len(searched)), threads))
    others = KrylovSpaces(batch, _starts(batch, blocks), 16 * _MOST_PASSES_OUTSIDE, fixed)
    batch.keep(going)
    begun = others.begun.cpu()
    while going and others.passes < _MOST_PASSES_OUTSIDE:
        others.expand()
        if others.passes < _FIRST_LOOK_OUTSIDE or (others.passes - _FIRST_LOOK_OUTSIDE) % _LOOK_EVERY:
            continue
        T, coupling = others.here()

        def look(index: int, T: Tensor = T, coupling: Tensor = coupling) -> bool:
            bounds = bound_outside(T[index], others.leaving(coupling[index]), begun[index], others.passes)
            return searched[index].judge_outside(*bounds, others.passes)

        going -= _settled(look, sorted(going))
        batch.keep(going)
    for index in going:
        searched[index].lost = True


def _finished(batch: GramBatch, index: int, one: _Searched, Q: Tensor) -> Principal | None:
    """The triplets from one more product in float64; None where they are not certified for all."""
    assert one.pairs is not None
    pairs, W = one.pairs, batch.tall(index)
    kept = one.goal.kept(pairs, one.missed)
    X = combine(Q[: one.vectors, : one.n], pairs.vectors(kept), threads=1)
    Y, image = gram_product(W, X)
    found = concluded(
        one.goal,
        pairs,
        one.missed,
        LastPass(X, Y, image),
        passes=(one.vectors + one.outside) // 16 + 1,
        vectors=one.vectors + one.outside + kept,
    )
    if not all(found.certified.values()):
        return None
    return found if W.shape == batch.stored(index).shape else replace(found, U=found.V, V=found.U)
