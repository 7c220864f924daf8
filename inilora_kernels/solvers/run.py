"""From a surveyed matrix to its factors, by each of the methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..display.progress import ProgressBar
from ..factors import Certificate, Factors
from ..initializations import METHODS, gaussian, milora, nearest, pissa
from ..kernels.backend import Problem, load_backend
from ..kernels.streaming import losses, one_torch_thread
from ..model.survey import Surveyed, random_stream
from ..options import Options
from .adam import Adam, adam
from .krylov import TOLERANCE, dense, principal
from .optimum import Optimum, least, optima
from .smallest import minor

# Of PiSSA more than the loss is promised: the very product BA of the full SVD. Its error is of the order of the square
# root of the excess, where the gap behind σ_r is small.
PISSA_TOLERANCE = 1e-11
# Up to this size a second thread is worth more on another matrix than on the same.
SMALL_MATRIX_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Task:
    """A matrix to factorize, the ranks to do it for, and σ̄ of its start.

    start: factors that the "nearest" gauge is near to, instead of the random start.
    """

    matrix: Surveyed
    ranks: tuple[int, ...]
    std: float
    start: Factors | None = None

    def random_start(self, rank: int, options: Options) -> tuple[Tensor, Tensor]:
        """The method's own start, or IniLoRA's."""
        draw = METHODS[options.method].random or gaussian
        return draw(self.matrix.source.shape, rank, self.std, random_stream(self.matrix, options.seed))

    def factors(self, A: Tensor, B: Tensor, certificate: Certificate, leading: Sequence[float]) -> Factors:
        """Those of a direct method, on the CPU."""
        one = self.matrix
        return Factors(
            A.cpu(), B.cpu(), certificate, one.sha256, one.source.rows, one.source.transposed, (), {}, tuple(leading)
        )


Finished = Callable[[Task, int, Factors], None]


def solve_directly(
    tasks: Sequence[Task], options: Options, device: str | torch.device | None, finished: Finished, bar: ProgressBar
) -> None:
    """Every method but IniLoRA by Adam: each matrix read once into memory; small ones on a CPU side by side."""
    bar.phase("solving", len(tasks), len(tasks))
    place = torch.device(device) if device is not None else torch.device("cpu")
    if device is None and options.backend == "triton":
        place = torch.device("cuda")

    def solved(task: Task) -> tuple[Task, dict[int, Factors]]:
        return task, _factors_of(task.matrix.source.read().to(place), task, options)

    small = [task for task in tasks if place.type == "cpu" and _is_small(task)]
    large = [task for task in tasks if place.type != "cpu" or not _is_small(task)]
    for task, by_rank in chain(_side_by_side(solved, small), map(solved, large)):
        for rank, factors in by_rank.items():
            finished(task, rank, factors)
            bar.advance(0, excess=factors.certificate.excess)
        bar.advance(1, matrices=1)


def _is_small(task: Task) -> bool:
    return math.prod(task.matrix.source.shape) <= SMALL_MATRIX_ELEMENTS


def _side_by_side(
    solved: Callable[[Task], tuple[Task, dict[int, Factors]]], tasks: Sequence[Task]
) -> Iterator[tuple[Task, dict[int, Factors]]]:
    """Each task on one thread, as many at once as torch has threads; torch is held to one in each of them."""
    with one_torch_thread() as threads:
        if len(tasks) == 1:
            # A new thread's memory is new too, and touching it costs as much again as the work.
            yield solved(tasks[0])
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(solved, tasks)


def _factors_of(W: Tensor, task: Task, options: Options) -> dict[int, Factors]:
    ranks = task.ranks
    if options.method in ("inilora", "pissa"):
        return _principal_factors(W, task, options)
    if options.method == "milora":
        U, S, V = minor(W, max(ranks))
        pairs = [milora(U[:, -rank:], S[-rank:], V[:, -rank:]) for rank in ranks]
    else:
        pairs = [task.random_start(rank, options) for rank in ranks]
    bounds = optima(W, ranks)
    _, reached = losses(W, pairs)
    return {
        rank: task.factors(A, B, _certificate(loss, bounds[rank]), bounds[rank].leading)
        for rank, (A, B), loss in zip(ranks, pairs, reached, strict=True)
    }


def _principal_factors(W: Tensor, task: Task, options: Options) -> dict[int, Factors]:
    """PiSSA, and IniLoRA by a direct solver: the leading singular triplets in the gauge asked for."""
    ranks = task.ranks
    if options.solver == "exact":
        found = dense(W, ranks)
    else:
        dtype = torch.float64 if options.backend == "reference" else torch.float32
        tolerance = PISSA_TOLERANCE if options.method == "pissa" else TOLERANCE
        found = principal(W, ranks, dtype=dtype, tolerance=tolerance)
    pairs = []
    for rank in ranks:
        A, B = pissa(found.U[:, :rank], found.S[:rank], found.V[:, :rank])
        if options.method == "inilora" and options.gauge == "nearest":
            A_start, B_start = task.random_start(rank, options)
            if task.start is not None:
                A_start, B_start = task.start.A, task.start.B
            A, B = nearest(A, B, A_start, B_start)
        pairs.append((A, B))
    energy, reached = losses(W, pairs)
    return {
        rank: task.factors(
            A, B, Certificate(loss, least(loss, found.shortfalls[rank], energy), energy, steps=0), found.leading
        )
        for rank, (A, B), loss in zip(ranks, pairs, reached, strict=True)
    }


def solve_by_adam(
    tasks: Sequence[Task], options: Options, device: str | torch.device | None, finished: Finished, bar: ProgressBar
) -> None:
    """IniLoRA: f* of each matrix, its Gaussian start, then Adam on the whole batch; a rank after the other."""
    bar.phase("certifying", len(tasks), len(tasks))
    bounds: list[Mapping[int, Optimum]] = []
    for task in tasks:
        bounds.append(optima(task.matrix.source.read(), task.ranks))
        bar.advance(1, matrices=1)
    for rank in dict.fromkeys(rank for task in tasks for rank in task.ranks):
        mine = [i for i, task in enumerate(tasks) if rank in task.ranks]
        _adam([tasks[i] for i in mine], [bounds[i][rank] for i in mine], rank, options, device, finished, bar)


def _adam(
    tasks: Sequence[Task],
    bounds: Sequence[Optimum],
    rank: int,
    options: Options,
    device: str | torch.device | None,
    finished: Finished,
    bar: ProgressBar,
) -> None:
    problems = []
    for task in tasks:
        A, B = task.random_start(rank, options)
        problems.append(Problem(task.matrix.source.read, task.matrix.source.shape, A, B))

    def done(index: int, result: Adam) -> None:
        one = tasks[index].matrix
        factors = Factors(
            result.A,
            result.B,
            result.certificate,
            one.sha256,
            one.source.rows,
            one.source.transposed,
            result.history,
            result.checkpoints,
            bounds[index].leading,
        )
        finished(tasks[index], rank, factors)
        bar.advance(0, matrices=1)

    bar.phase("solving" if rank == options.rank else f"rank {rank}", len(tasks), len(tasks) * options.steps)
    adam(
        problems,
        [_certificate(0.0, bound) for bound in bounds],
        options.schedule,
        load_backend(options.backend, device),
        tol=options.tol,
        checkpoint_steps=options.checkpoint_steps,
        finished=done,
        advanced=lambda steps, excess: bar.advance(steps, excess=excess, unit="steps"),
    )


def _certificate(loss: float, bound: Optimum) -> Certificate:
    return Certificate(loss, bound.loss, bound.energy, steps=0)
