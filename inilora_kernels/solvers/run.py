"""From a matrix to its factors: Adam's run in batches, and the direct methods' run matrix by matrix.

An initialization (initializations.py) says which of them computes it, from what start or by what direct solver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..display.progress import ProgressBar
from ..factors import Certificate, Factors
from ..kernels.backend import Backend, GramBatch, Problem, Sample, Stored
from ..kernels.loading import load_backend
from ..kernels.streaming import losses
from ..kernels.threads import each_of, in_groups, side_by_side
from ..memory import reused
from ..model.survey import Hash, together
from ..model.targets import Target
from ..options import Options
from .adam import Checkpoints, History, adam
from .krylov import TOLERANCE, principal
from .krylov_batch import principals, room, start_of
from .krylov_search import ALL_THREADS
from .optimum import Optimum, loss_near, optima, optima_from
from .triplets import Principal

Shape = tuple[int, int]
Pair = tuple[Tensor, Tensor]
# (shape of W, rank, σ̄, random stream) ↦ A, B
RandomStart = Callable[[Shape, int, float, torch.Generator], Pair]


@dataclass(frozen=True, eq=False)
class Task:
    """A matrix to factorize: what the survey found, the ranks to do it for, and its start.

    hash: W's sha256, which may still be computed beside the work. std: σ̄ of the random start. energy: ||W||_F². start:
        factors that the "nearest" gauge comes close to, instead of the random start.
    """

    target: Target
    hash: Hash
    ranks: tuple[int, ...]
    std: float
    energy: float
    start: Factors | None = None

    @property
    def sha256(self) -> str:
        """W's hash, in hexadecimal digits."""
        return self.hash if isinstance(self.hash, str) else self.hash()

    def settle_hash(self) -> None:
        """Have the hash by now: computed by this thread, which others work beside, or waited for if one is at it."""
        if callable(self.hash):
            self.hash()

    def random_start(self, draw: RandomStart, rank: int, seed: int) -> Pair:
        """The start from the matrix's own random stream, whatever its place in a model, batch or list."""
        text = f"{seed} {self.sha256} {self.target.rows}"
        first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return draw(self.target.shape, rank, self.std, torch.Generator().manual_seed(first))

    def factors(
        self,
        A: Tensor,
        B: Tensor,
        certificate: Certificate,
        leading: Sequence[float],
        history: History = (),
        checkpoints: Checkpoints | None = None,
    ) -> Factors:
        """The result, on the CPU, with everything it records about the matrix."""
        return Factors(
            A.cpu(),
            B.cpu(),
            certificate,
            self.sha256,
            rows=self.target.rows,
            transposed=self.target.transposed,
            dequantization=self.target.dequantization,
            history=history,
            checkpoints=checkpoints or {},
            singular_values=tuple(leading),
        )

    def ingredients(self, rank: int) -> dict[str, Any]:
        """What of the matrix, besides the options, decides the result of one of its ranks: JSON values."""
        return {
            "rank": rank,
            "ranks": list(self.ranks),
            "rank_pattern": None,
            "init_std": self.std,
            "sha256": self.sha256,
            "shape": self.target.shape,
            "dtype": str(self.target.dtype),
            "rows": self.target.rows,
            "transposed": self.target.transposed,
        }


# Called with each result as soon as it is ready.
Finished = Callable[[Task, int, Factors], None]
Solve = Callable[[Sequence[Task], Options, Finished, ProgressBar], None]
# (W on the backend's device, its task, the options, the backend) ↦ the factors of each of the task's ranks
Factorize = Callable[[Tensor, Task, Options, Backend], dict[int, Factors]]
# (the leading triplets, their task, the options) ↦ A, B of each of the task's ranks
Choose = Callable[[Principal, Task, Options], dict[int, Pair]]
# As Factorize; the call that it returns gives the factors, and may still have some of the work to do.
Begin = Callable[[Tensor, Task, Options, Backend], Callable[[], dict[int, Factors]]]
Result = TypeVar("Result")
# An entry of a factor takes about so many of them times the rank, from the triplets to its loss.
_FLOPS = 10
# Up to so many entries times rank, what follows the triplets takes longer in calls than in sums.
_BRIEF = 1e7


def directly(factorize: Factorize) -> Solve:
    """A run of a method that reads each matrix once into memory; on a CPU several side by side."""

    def begin(W: Tensor, task: Task, options: Options, backend: Backend) -> Callable[[], dict[int, Factors]]:
        found = factorize(W, task, options, backend)
        return lambda: found

    return _one_by_one(begin)


def _one_by_one(begin: Begin) -> Solve:
    """A run that begins matrices side by side, and has this thread make the calls that end them."""

    def solve(tasks: Sequence[Task], options: Options, finished: Finished, bar: ProgressBar) -> None:
        bar.phase("solving", len(tasks), len(tasks))
        backend = load_backend(options.backend, options.device)

        def begun(index: int) -> tuple[int, Callable[[], dict[int, Factors]]]:
            return index, begin(tasks[index].target.read().to(backend.device), tasks[index], options, backend)

        with closing(_several(begun, range(len(tasks)), tasks, backend)) as results:
            for index, end in results:
                _report(tasks[index], end(), finished, bar)

    return solve


def _several(
    work: Callable[[int], tuple[int, Result]], chosen: Sequence[int], tasks: Sequence[Task], backend: Backend
) -> Generator[tuple[int, Result], None, None]:
    """`work` on the tasks of these indices, then their hashes; on a CPU as many at a time as keep all threads busy."""
    threads = torch.get_num_threads() if backend.device.type == "cpu" else 1

    def then_hashed(index: int) -> tuple[int, Result]:
        result = work(index)
        tasks[index].settle_hash()
        return result

    with reused(len(chosen)):
        for count, group in in_groups(chosen, lambda index: together(tasks[index].target, threads)):
            with closing(side_by_side(then_hashed, group, count)) as results:
                yield from results


def by_krylov(choose: Choose, tolerance: float) -> Solve:
    """A run of a method that takes W's leading triplets from a Krylov space: in batches where the backend has them."""

    def begin(W: Tensor, task: Task, options: Options, backend: Backend) -> Callable[[], dict[int, Factors]]:
        found = principal(W, task.ranks, dtype=backend.direct_dtype, tolerance=tolerance, total=task.energy)

        def end() -> dict[int, Factors]:
            return against_triplets(W, task, choose(found, task, options), found)

        # The other threads would wait for the interpreter's lock, which few sums and many calls hold most of the time.
        if W.numel() * max(task.ranks) <= _BRIEF:
            return end
        ended = end()
        return lambda: ended

    one_by_one = _one_by_one(begin)

    def solve(tasks: Sequence[Task], options: Options, finished: Finished, bar: ProgressBar) -> None:
        bar.phase("solving", len(tasks), len(tasks))
        rest = dict(enumerate(tasks))

        def factors_of(one: Settled) -> tuple[Task, dict[int, Factors]]:
            task = rest.pop(one.index)
            return task, against_triplets(one.W, task, choose(one.found, task, options), one.found)

        def solved(several: Sequence[Settled]) -> None:
            flops = max((_FLOPS * one.found.U.numel() * max(tasks[one.index].ranks) for one in several), default=0)
            for task, by_rank in each_of(factors_of, several, flops):
                _report(task, by_rank, finished, bar)

        _in_batches(tasks, tolerance, load_backend(options.backend, options.device), solved)
        if rest:
            one_by_one(list(rest.values()), options, finished, bar)

    return solve


@dataclass(frozen=True, eq=False)
class Settled:
    """The task at `index`: its W on the backend's device, and its triplets on the CPU."""

    index: int
    W: Tensor
    found: Principal


def _in_batches(
    tasks: Sequence[Task], tolerance: float, backend: Backend, solved: Callable[[Sequence[Settled]], None]
) -> None:
    """Call `solved` with those of each batch of the backend's that the batch settles."""
    starts: dict[int, Tensor] = {}
    # Not on a CPU: a forked process would wait for its parent's threads.
    threads = 1 if backend.device.type == "cpu" else ALL_THREADS

    def load(index: int) -> Tensor:
        W = tasks[index].target.read()
        starts[index] = start_of(W, threads)
        return W

    matrices = [
        Stored(
            partial(load, index),
            task.target.shape,
            task.target.dtype,
            max(task.ranks),
            room(min(task.target.shape), task.ranks),
        )
        for index, task in enumerate(tasks)
    ]

    def visit(members: Sequence[int], batch: GramBatch) -> None:
        mine = [tasks[index] for index in members]
        own = [starts.pop(index) for index in members]
        triplets = principals(batch, [one.ranks for one in mine], tolerance, own, matrices[members[0]].vectors)
        solved(
            [
                Settled(index, batch.stored(place), found)
                for place, (index, found) in enumerate(zip(members, triplets, strict=True))
                if found is not None
            ]
        )

    with reused(len(tasks)):
        backend.gram_batches(matrices, visit)


def _report(task: Task, by_rank: Mapping[int, Factors], finished: Finished, bar: ProgressBar) -> None:
    for rank, factors in by_rank.items():
        finished(task, rank, factors)
        bar.advance(0, excess=factors.certificate.excess)
    bar.advance(1, matrices=1)


def against_optimum(W: Tensor, task: Task, pairs: Mapping[int, Pair]) -> dict[int, Factors]:
    """The factors of each rank, certified against f* as `optima` finds it: for methods that do not approximate W."""
    bounds = optima(W, task.ranks)
    _, reached = losses(W, list(pairs.values()))
    return _against(task, pairs, reached, bounds)


def against_triplets(W: Tensor, task: Task, pairs: Mapping[int, Pair], found: Principal) -> dict[int, Factors]:
    """The factors of each rank, certified by how much the triplets that they came from may have missed."""
    near = [loss_near(found, rank, A, B) for rank, (A, B) in pairs.items()]
    known = [loss for loss in near if loss is not None]
    reached = known if len(known) == len(pairs) else losses(W, list(pairs.values()))[1]
    return _against(task, pairs, reached, optima_from(found, task.ranks))


def _against(
    task: Task, pairs: Mapping[int, Pair], reached: Sequence[float], bounds: Mapping[int, Optimum]
) -> dict[int, Factors]:
    return {
        rank: task.factors(A, B, _certificate(loss, bounds[rank]), bounds[rank].leading)
        for (rank, (A, B)), loss in zip(pairs.items(), reached, strict=True)
    }


def by_adam(draw: RandomStart) -> Solve:
    """A run of Adam on whole batches: f* of each matrix, its random start, then the steps; one rank after the other."""

    def solve(tasks: Sequence[Task], options: Options, finished: Finished, bar: ProgressBar) -> None:
        bar.phase("certifying", len(tasks), len(tasks))
        bounds = _bounds(tasks, load_backend(options.backend, options.device), bar)
        for rank in dict.fromkeys(rank for task in tasks for rank in task.ranks):
            mine = [i for i, task in enumerate(tasks) if rank in task.ranks]
            bar.phase("solving", len(mine), len(mine) * options.steps)
            problems = []
            for i in mine:
                A, B = tasks[i].random_start(draw, rank, options.seed)
                problems.append(Problem(tasks[i].target.read, tasks[i].target.shape, tasks[i].target.dtype, A, B))
            _adam(problems, [(tasks[i], bounds[i][rank]) for i in mine], options, finished, bar)

    return solve


def _bounds(tasks: Sequence[Task], backend: Backend, bar: ProgressBar) -> list[Mapping[int, Optimum]]:
    """f* of each matrix at each of its ranks, on the backend's device, in batches where it has them."""
    found: dict[int, Mapping[int, Optimum]] = {}

    def bounded(index: int, bounds: Mapping[int, Optimum]) -> None:
        found[index] = bounds
        bar.advance(1, matrices=1)

    def solved(several: Sequence[Settled]) -> None:
        for one in several:
            bounded(one.index, optima_from(one.found, tasks[one.index].ranks))

    _in_batches(tasks, TOLERANCE, backend, solved)

    def alone(index: int) -> tuple[int, Mapping[int, Optimum]]:
        task = tasks[index]
        return index, optima(task.target.read().to(backend.device), task.ranks)

    rest = [index for index in range(len(tasks)) if index not in found]
    with closing(_several(alone, rest, tasks, backend)) as results:
        for index, bounds in results:
            bounded(index, bounds)
    return [found[index] for index in range(len(tasks))]


def _adam(
    problems: Sequence[Problem],
    tasks: Sequence[tuple[Task, Optimum]],
    options: Options,
    finished: Finished,
    bar: ProgressBar,
) -> None:
    def done(sample: Sample, certificate: Certificate, history: History, checkpoints: Checkpoints) -> None:
        task, bound = tasks[sample.index]
        factors = task.factors(sample.A, sample.B, certificate, bound.leading, history, checkpoints)
        finished(task, factors.rank, factors)
        bar.advance(0, matrices=1)

    adam(
        problems,
        [_certificate(0.0, bound) for _, bound in tasks],
        options.schedule,
        load_backend(options.backend, options.device),
        tol=options.tol,
        checkpoint_steps=options.checkpoint_steps,
        finished=done,
        advanced=lambda steps, excess: bar.advance(steps, excess=excess, unit="steps"),
    )


def _certificate(loss: float, bound: Optimum) -> Certificate:
    return Certificate(loss, bound.loss, bound.energy, steps=0, certified=bound.certified)
