"""What a run will take, predicted from the two cost models: seconds and bytes, on this processor or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .display.sentences import duration_in_words
from .kernels.cpu import cost_model as cpu
from .kernels.cpu.cost_model import Machine
from .kernels.gpu import forecast
from .kernels.gpu.cost_model import WAVE_MATRICES, Matrix
from .kernels.gpu.gpus import Gpu

# Runs that are predicted to be shorter are not announced.
WORTH_SAYING = 30.0


@dataclass(frozen=True)
class Work:
    """One matrix to factorize at one rank: W's shape (d, k), the bytes of an element as stored, the rank."""

    shape: tuple[int, int]
    itemsize: int
    rank: int

    def on_card(self) -> Matrix:
        """The same as a GPU's backend reads it: float64 as float32."""
        return Matrix(self.shape, min(4, self.itemsize), self.rank)


def seconds(works: Sequence[Work], solver: str, steps: int, *, machine: Machine, card: Gpu | None = None) -> float:
    """Predicted seconds of a whole run.

    solver: "adam", "krylov", "exact", or "" for a random start, for which only f* is computed.
    steps: Adam's; 0 for any other solver.
    machine: the processor.
    card: the GPU that Adam's steps, the direct solver and Adam's f* run on; None for the processor.

    >>> seven_billion = [Work((4096, 4096), 2, 8)] * 64
    >>> zen4 = Machine(flops=188e9, alone=0.9e9, together=0.9e9, threads=2)
    >>> [round(seconds(seven_billion, *run, machine=zen4)) for run in (("adam", 20_000), ("krylov", 0))]
    [4881, 7]
    """
    total = reading_seconds(works, machine)
    if card is not None and solver and solver not in cpu.DIRECT_SECONDS:
        total += direct_on_card(works, card, factors=not steps)
    else:
        total += sum(direct_seconds(work, solver, machine) for work in works)
    return total + (adam_seconds(works, steps, machine, card) if steps else 0.0)


def reading_seconds(works: Sequence[Work], machine: Machine) -> float:
    """Reading and hashing the stored weights."""
    return cpu.reading_seconds([work.shape[0] * work.shape[1] * work.itemsize for work in works], machine)


def direct_seconds(work: Work, solver: str, machine: Machine) -> float:
    """A full SVD for "exact"; otherwise a Krylov space, which Adam and random starts need for f*."""
    return cpu.DIRECT_SECONDS.get(solver, cpu.krylov_seconds)(work.shape, work.rank, machine.flops)


def adam_seconds(works: Sequence[Work], steps: int, machine: Machine, card: Gpu | None = None) -> float:
    """The steps of all matrices, on the processor or on a GPU."""
    if card is None:
        return sum(cpu.adam_seconds(work.shape, work.rank, steps, machine.flops) for work in works)
    if not works:
        return 0.0
    matrices = [work.on_card() for work in works]
    return forecast.plan(matrices, card, steps).seconds


def direct_on_card(works: Sequence[Work], card: Gpu, *, factors: bool) -> float:
    """The direct solver's batches on a GPU: factors and their loss, or f* alone, as an Adam run needs it."""
    from .solvers.krylov_batch import passes_expected, room

    return forecast.direct_seconds(
        [
            forecast.DirectWork(
                work.shape,
                work.on_card().itemsize,
                work.rank,
                room(min(work.shape), [work.rank]) if work.itemsize <= 4 else 0,
                passes_expected(work.rank, min(work.shape)),
            )
            for work in works
        ],
        card,
        factors=factors,
    )


def costs(matrices: Sequence[Sequence[Work]], solver: str, steps: int, card: Gpu | None = None) -> list[float]:
    """The predicted seconds of each matrix, at all its ranks, by which matrices are dealt to processes.

    >>> large, small = (Work((side, side), 2, 8) for side in (4096, 1024))
    >>> costs([[large], [small, small]], "krylov", 0)[0] > 5 * costs([[large], [small, small]], "krylov", 0)[1]
    True
    """
    among = WAVE_MATRICES if card is not None else 1
    known: dict[Work, float] = {}
    for work in {work for works in matrices for work in works}:
        known[work] = seconds([work] * among, solver, steps, machine=cpu.USUAL, card=card) / among
    return [sum(known[work] for work in works) for works in matrices]


def memory(works: Sequence[Work]) -> int:
    """Bytes at the peak on the processor: about three float32 copies of the largest matrix, and the factors."""
    largest = max(4 * work.shape[0] * work.shape[1] for work in works)
    factors = sum(4 * work.rank * sum(work.shape) for work in works)
    return 3 * largest + 3 * factors + (10 << 20)


def notice(works: Sequence[Work], solver: str, steps: int, *, machine: Machine, card: Gpu | None = None) -> str | None:
    """One sentence about a run of more than half a minute, and the solver that finds the same product sooner."""
    takes = seconds(works, solver, steps, machine=machine, card=card)
    if takes < WORTH_SAYING:
        return None
    where = "this processor" if card is None else card.name
    what = f"{steps:,} Adam steps" if steps else f"solver {solver}" if solver else "certificates"
    count = f"{len(works)} {'matrix' if len(works) == 1 else 'matrices'}"
    sentence = f"this run will take about {duration_in_words(takes)} on {where} ({what}, {count}; an estimate)"
    if steps or solver in cpu.DIRECT_SECONDS:
        krylov = seconds(works, "krylov", 0, machine=machine)
        if krylov < takes / 2:
            soon = f"{'about ' if krylov >= 1 else ''}{duration_in_words(krylov)}"
            sentence += f"; solver krylov finds the same product BA in {soon}"
    return sentence
