"""IniLoRA's own way to the minimum: Adam on ||W − BA||_F² from a Gaussian start (paper, section 3.2 and Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ..factors import Certificate
from ..kernels.backend import Backend, Batch, Problem, Sample, Schedule

# How often each matrix is checked against `tol`.
TOLERANCE_CHECK_STEPS = 100


def milestones(steps: int, checkpoint_steps: Sequence[int], tol: float | None) -> list[int]:
    """The steps at which each matrix is inspected, ascending.

    Dense at first and every 1,000 later, as the convergence curve needs it; the checkpoints; the end; and, with a
    tolerance, every 100.

    >>> milestones(2_500, checkpoint_steps=(700,), tol=None)
    [1, 2, 5, 10, 20, 50, 100, 200, 500, 700, 1000, 2000, 2500]
    """
    wanted = {mantissa * 10**power for mantissa in (1, 2, 5) for power in range(4)}
    wanted |= {*range(1000, steps, 1000), *checkpoint_steps, steps}
    if tol is not None:
        wanted |= set(range(TOLERANCE_CHECK_STEPS, steps, TOLERANCE_CHECK_STEPS))
    return sorted(step for step in wanted if step <= steps)


Checkpoints = dict[int, tuple[Tensor, Tensor]]
History = tuple[tuple[int, float], ...]


def adam(
    problems: Sequence[Problem],
    bounds: Sequence[Certificate],
    schedule: Schedule,
    backend: Backend,
    *,
    tol: float | None,
    checkpoint_steps: Sequence[int],
    finished: Callable[[Sample, Certificate, History, Checkpoints], None],
    advanced: Callable[[int, float | None], None],
) -> None:
    """Run a batch of matrices to the end of the schedule, or each until its excess is below `tol`.

    bounds: each matrix's f* and energy, which its end is measured against; the loss is filled in.
    finished: called with a matrix's last sample, its certificate, its (step, loss) curve and the factors kept at
        `checkpoint_steps`, as soon as that matrix is done, in any order.
    advanced: called with the matrix-steps done since the last call and the latest excess, for a progress bar.
    """
    kept: list[Checkpoints] = [{} for _ in problems]
    history: list[list[tuple[int, float]]] = [[] for _ in problems]

    def observe(sample: Sample) -> bool:
        index = sample.index
        certificate = replace(bounds[index], loss=sample.loss, steps=sample.step)
        history[index].append((sample.step, sample.loss))
        if sample.step in checkpoint_steps:
            kept[index][sample.step] = (sample.A, sample.B)
        at_end = sample.step == schedule.steps or (tol is not None and certificate.excess <= tol)
        advanced(schedule.steps - sample.step if at_end else 0, certificate.excess)
        if at_end:
            finished(sample, certificate, tuple(history[index]), kept[index])
        return not at_end

    stops = milestones(schedule.steps, checkpoint_steps, tol)
    backend.adam(Batch(problems, schedule, stops, observe, lambda steps: advanced(steps, None)))
