"""What a run says up front and when it is interrupted: what it will take, what the cache has, what is kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from . import estimate
from .display.progress import ProgressBar
from .estimate import Work
from .kernels.cpu.cost_model import USUAL, Machine, this_machine
from .kernels.loading import card_of
from .model.targets import Target
from .options import Options
from .places import cache_folder
from .solvers.run import Task

# What any machine reaches: the one at hand is timed only if a run might be worth announcing on this one.
_SLOW = Machine(1e10, 1e8, 1e8, 1)


def announce_reading(targets: Sequence[Target], options: Options, bar: ProgressBar) -> None:
    """Tell the bar of the first pass over all matrices, and of the whole run as if the cache held none of them."""
    works = [_work(target, rank) for target in targets for rank in options.ranks_of(target.module) or (8,)]
    bar.expect("reading", len(targets), estimate.reading_seconds(works, USUAL), len(targets))
    _expect(works, len(targets), options, USUAL, bar)


def announce_found(found: int, matrices: int, bar: ProgressBar) -> None:
    """Say how many matrices were found in the cache."""
    if found:
        bar.note(f"{found} of {matrices} matrices found in the cache")


def announce_solving(missing: Sequence[Task], options: Options, bar: ProgressBar, *, aloud: bool) -> None:
    """Warn (UserWarning) of what these matrices will take if that is more than half a minute.

    The bar learns how long each stage will last. aloud: False in all but one of several processes.
    """
    if missing and options.backend != "reference" and options.solver != "exact":
        _announce_compiling(bar)
    works = [_work(task.target, rank) for task in missing for rank in task.ranks]
    steps, solver = options.adam_steps, options.solver or ""
    worth_timing = estimate.seconds(works, solver, steps, machine=_SLOW) > estimate.WORTH_SAYING
    machine = this_machine() if worth_timing else USUAL
    card = card_of(options.backend, options.device)
    if aloud and options.backend != "reference":
        notice = estimate.notice(works, solver, steps, machine=machine, card=card)
        if notice:
            warnings.warn(notice, stacklevel=4)
    _expect(works, len(missing), options, machine, bar)


def _announce_compiling(bar: ProgressBar) -> None:
    # Brings numba, which the run is about to import anyway.
    from .kernels.cpu.compiled import compiled_before

    if not compiled_before():
        bar.note("the first run compiles its kernels too: a minute or two, once")


def _expect(works: Sequence[Work], matrices: int, options: Options, machine: Machine, bar: ProgressBar) -> None:
    certifying = sum(estimate.direct_seconds(work, options.solver or "", machine) for work in works)
    if steps := options.adam_steps:
        card = card_of(options.backend, options.device)
        bar.expect("certifying", matrices, certifying, matrices)
        bar.expect("solving", len(works) * steps, estimate.adam_seconds(works, steps, machine, card), len(works))
    else:
        bar.expect("solving", matrices, certifying, matrices)


def costs(tasks: Sequence[Task], options: Options) -> list[float]:
    """The seconds that each matrix is predicted to take here, to divide them among processes.

    Other hardware predicts other numbers, so all processes have to go by those of one.
    """
    works = [[_work(task.target, rank) for rank in task.ranks] for task in tasks]
    return estimate.costs(works, options.solver or "", options.adam_steps, card_of(options.backend, options.device))


def stopped(finished: int, total: int, cached: bool) -> str:
    """What is kept of an interrupted run, and how to go on."""
    if not cached:
        return "stopped; nothing is kept, as this run used no cache"
    return f"stopped: {finished} of {total} matrices are finished and kept in {cache_folder()}; run it again to go on"


def _work(target: Target, rank: int) -> Work:
    return Work(target.shape, target.dtype.itemsize, rank)
