"""From a matrix to its factors: the batch-wise run by Adam, and the matrix by matrix run of every direct method.

An initialization (initializations.py) says which of them computes it, with what start and what direct solver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..display.progress import ProgressBar
from ..factors import Certificate, Factors
from ..kernels.backend import Backend, Problem, Sample
from ..kernels.loading import load_backend
from ..kernels.streaming import losses
from ..kernels.threads import in_groups, side_by_side
from ..model.survey import together
from ..model.targets import Target
from ..options import Options
from .adam import Checkpoints, History, adam
from .krylov import Principal
from .optimum import Optimum, optima, optima_from

Shape = tuple[int, int]
Pair = tuple[Tensor, Tensor]
# (shape of W, rank, σ̄, random stream) ↦ A, B
RandomStart = Callable[[Shape, int, float, torch.Generator], Pair]


@dataclass(frozen=True, eq=False)
class Task:
    """A matrix to factorize: what the survey found of it, the ranks to do it for, and its start.

    std: σ̄ of the random start. start: factors that the "nearest" gauge is near to, instead of the random start.
    """

    target: Target
    sha256: str
    ranks: tuple[int, ...]
    std: float
    start: Factors | None = None

    def digest(self) -> bytes:
        """What decides the direct solver's random blocks."""
        return bytes.fromhex(self.sha256)

    def random_start(self, draw: RandomStart, rank: int, seed: int) -> Pair:
        """The start from the matrix's own random stream, the same wherever in a model, batch or list it stands."""
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
        """The result, on the CPU, with all that it says of the matrix."""
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


# Called with each result as soon as it is there.
Finished = Callable[[Task, int, Factors], None]
Solve = Callable[[Sequence[Task], Options, Finished, ProgressBar], None]
# (W on the backend's device, its task, the options, the backend) ↦ the factors of each of the task's ranks
Factorize = Callable[[Tensor, Task, Options, Backend], dict[int, Factors]]


def directly(factorize: Factorize) -> Solve:
    """A run of a method that reads each matrix once into memory; on a CPU several side by side."""

    def solve(tasks: Sequence[Task], options: Options, finished: Finished, bar: ProgressBar) -> None:
        bar.phase("solving", len(tasks), len(tasks))
        backend = load_backend(options.backend, options.device)
        threads = torch.get_num_threads() if backend.device.type == "cpu" else 1

        def solved(task: Task) -> tuple[Task, dict[int, Factors]]:
            return task, factorize(task.target.read().to(backend.device), task, options, backend)

        for count, group in in_groups(tasks, lambda task: together(task.target, threads)):
            with closing(side_by_side(solved, group, count)) as results:
                for task, by_rank in results:
                    for rank, factors in by_rank.items():
                        finished(task, rank, factors)
                        bar.advance(0, excess=factors.certificate.excess)
                    bar.advance(1, matrices=1)

    return solve


def against_optimum(W: Tensor, task: Task, pairs: Mapping[int, Pair]) -> dict[int, Factors]:
    """The factors of each rank, certified against f* as `optima` finds it: for methods that do not approximate W."""
    return _against(W, task, pairs, optima(W, task.ranks, task.digest))


def against_triplets(W: Tensor, task: Task, pairs: Mapping[int, Pair], found: Principal) -> dict[int, Factors]:
    """The factors of each rank, certified by what the triplets that they came from can have left behind."""
    return _against(W, task, pairs, optima_from(found, task.ranks))


def _against(W: Tensor, task: Task, pairs: Mapping[int, Pair], bounds: Mapping[int, Optimum]) -> dict[int, Factors]:
    _, reached = losses(W, list(pairs.values()))
    return {
        rank: task.factors(A, B, _certificate(loss, bounds[rank]), bounds[rank].leading)
        for (rank, (A, B)), loss in zip(pairs.items(), reached, strict=True)
    }


def by_adam(draw: RandomStart) -> Solve:
    """A run of Adam on whole batches: f* of each matrix, its random start, then the steps; a rank after the other."""

    def solve(tasks: Sequence[Task], options: Options, finished: Finished, bar: ProgressBar) -> None:
        bar.phase("certifying", len(tasks), len(tasks))
        bounds: list[Mapping[int, Optimum]] = []
        for task in tasks:
            bounds.append(optima(task.target.read(), task.ranks, task.digest))
            bar.advance(1, matrices=1)
        for rank in dict.fromkeys(rank for task in tasks for rank in task.ranks):
            mine = [i for i, task in enumerate(tasks) if rank in task.ranks]
            bar.phase("solving", len(mine), len(mine) * options.steps)
            problems = []
            for i in mine:
                A, B = tasks[i].random_start(draw, rank, options.seed)
                problems.append(Problem(tasks[i].target.read, tasks[i].target.shape, tasks[i].target.dtype, A, B))
            _adam(problems, [(tasks[i], bounds[i][rank]) for i in mine], options, finished, bar)

    return solve


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
