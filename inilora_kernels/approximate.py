"""The main job, read top to bottom: targets → survey → start → solve → factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, overload

from .announcements import announce_found, announce_reading, announce_solving, costs, stopped
from .display.progress import ProgressBar
from .errors import OptionError, WeightError
from .factor_set import FactorSet, loaded
from .factors import Factors
from .initializations import settled, solver_of
from .model.in_memory import MatrixLike, target_in_memory
from .model.live import Model, open_model
from .model.survey import start_stds, survey
from .model.targets import Target, find_targets, tensors_of
from .options import ModelOptions, Options, P, takes
from .processes import Job, shared_run, shares
from .refusals import (
    require_backend,
    require_converged,
    require_factors,
    require_fitting,
    require_one_rank,
    require_patterns_used,
    require_ranks_taken,
    require_unchanged,
    size_of_factors,
    warn_if_uncertified,
)
from .solvers.optimum import rank_for_energy
from .solvers.run import Task
from .storage import cache, factor_file
from .torch_defaults import ordinary_tensors
from .version import __version__


@takes(ModelOptions)
def approximate_model(path: Model, options: ModelOptions) -> FactorSet:
    """Find B (d×r) and A (r×k), the start of a LoRA, for each target matrix W (d×k) of a checkpoint.

    The paper's IniLoRA, the default, minimizes f = ||W − BA||_F² (paper, Eq. 3) by Adam from A, B ~ N(0, σ̄²). Every
    result, by any method, comes with f and the least that the rank allows, f* = Σ_{i>r} σ_i². float32.

    path: a model's folder, a weight file (safetensors, GGUF, or of torch, read with weights_only), a hub id, of which
        config and the files with targets are downloaded, or a live model or its state dict, on any device: the same
        bytes give the same factors. Quantized weights are dequantized, one matrix at a time.

    Raises OptionError, CheckpointError, TargetError, WeightError or BackendError, all before any long work, except for
    a WeightError if a run diverges.

    >>> import tempfile, torch, pathlib
    >>> from safetensors.torch import save_file
    >>> model = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"layer.0.query.weight": torch.eye(6), "layer.0.value.weight": torch.ones(6, 4)}, model)
    >>> factors = approximate_model(model, rank=1, steps=2000, lr=1e-2, cache=False, progress=False)
    >>> {module: tuple(one.B.shape) for module, one in factors.items()}
    {'layer.0.query': (6, 1), 'layer.0.value': (6, 1)}
    >>> round(factors["layer.0.query"].certificate.loss, 3)
    5.0
    """
    require_one_rank(options)
    return approximate_each(path, options)[0]


@takes(ModelOptions)
def approximate_ranks(path: Model, options: ModelOptions) -> dict[int, FactorSet]:
    """`approximate_model` for a list of ranks, rank=[8, 16, 32], as a dict from rank to FactorSet.

    The ranks share the passes over W (with Adam, those for f*). Errors are those of `approximate_model`.

    >>> import tempfile, torch, pathlib
    >>> from safetensors.torch import save_file
    >>> model = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"a.query.weight": torch.eye(6), "a.value.weight": torch.ones(6, 4)}, model)
    >>> sets = approximate_ranks(model, rank=[1, 2], solver="krylov", cache=False, progress=False)
    >>> {rank: round(factors["a.query"].certificate.loss) for rank, factors in sets.items()}
    {1: 5, 2: 4}
    """
    if not isinstance(options.rank, tuple):
        raise OptionError(f"rank={options.rank!r}: give a list of ranks, or call approximate_model for one")
    return approximate_each(path, options)


def approximate_each(
    path: Model, options: ModelOptions, room: Callable[[int], None] = lambda size: None
) -> dict[int, FactorSet]:
    """Return a FactorSet for each rank, a single one under 0. room: called with the bytes of them all, once known."""
    with ordinary_tensors(), shared_run() as job:
        modules, parameters = options.target_modules, options.target_parameters
        checkpoint = open_model(path, options.revision, options.token, tensors_of(modules, parameters))
        targets = find_targets(checkpoint, modules, lambda module: max(options.ranks_of(module) or (1,)), parameters)
        room(size_of_factors(targets, options))
        return _factorize(targets, options, loaded(options.start), job, keeps=True)


class _Approximate(Protocol[P]):
    @overload
    def __call__(self, W: MatrixLike, *args: P.args, **kwargs: P.kwargs) -> Factors: ...
    @overload
    def __call__(self, W: Sequence[MatrixLike], *args: P.args, **kwargs: P.kwargs) -> list[Factors]: ...


def _approximate(W: Any, options: Options) -> Any:
    """`approximate_model` for matrices W (d×k) in memory, tensors, arrays or linear layers: Factors, or a list.

    All matrices count as one kind for init_std. The options are those of `approximate_model` without target_modules;
    `start` is Factors or a list of them. Errors are those of `approximate_model`.

    >>> import torch
    >>> W = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))
    >>> factors = approximate(W, rank=1, steps=5000, lr=1e-2)
    >>> bool((factors.product() - W).norm() < 1e-3)
    True
    """
    require_one_rank(options)
    alone = not isinstance(W, Sequence)
    targets = [target_in_memory(_name(place), matrix) for place, matrix in enumerate([W] if alone else W)]
    if not targets:
        raise WeightError("no matrix was given; give a tensor or a list of them")
    starts: Any = [options.start] if isinstance(options.start, Factors) else options.start
    named = None if starts is None else {_name(place): one for place, one in enumerate(starts)}
    with ordinary_tensors():
        found = list(_factorize(targets, options, named, Job(), keeps=False)[0].values())
    return found[0] if alone else found


def _overloaded(options: Callable[P, Options]) -> _Approximate[P]:
    return cast(Any, takes(options)(_approximate))  # type: ignore[no-any-return]


_approximate.__name__ = _approximate.__qualname__ = "approximate"
approximate = _overloaded(Options)


def _factorize(
    targets: Sequence[Target], options: Options, start: Any, job: Job, *, keeps: bool
) -> dict[int, FactorSet]:
    """A FactorSet for each of several ranks; a single one, under the key 0, where each matrix has a rank of its own.

    start: factors by module. job: the processes that share the work; one that gets no result returns its own share.
    keeps: whether to use the cache and show progress where the options leave that open.
    """
    options = settled(options)
    require_factors(start)
    require_patterns_used(targets, options)
    for target in targets:
        require_fitting(target, options, start)
    device = require_backend(targets, options)
    record = {**options.record(), "package_version": __version__}
    if "start" in record:
        record["start"] = None if start is None else factor_file.digest(start)
    cached = keeps if options.cache is None else options.cache
    results: dict[str, Factors] = {}
    keys: dict[str, str] = {}
    with ProgressBar((keeps if options.progress is None else options.progress) and job.rank == 0) as bar:
        announce_reading(targets, options, bar)
        surveyed = _tasks(targets, options, start, job, bar, in_memory=not keeps and not cached)
        tasks = require_ranks_taken(surveyed, options)
        for task in tasks if cached else ():
            for rank in task.ranks:
                place = _place(task, rank)
                keys[place] = _cache_key(task, rank, device, record)
                if (known := cache.find(keys[place], task.sha256)) is not None:
                    results[place] = known
        owners = job.together("found", dict.fromkeys(results, job.rank))
        missing = [task for task in tasks if any(_place(task, rank) not in owners for rank in task.ranks)]
        parts = shares(list(job.together("costs", dict(enumerate(costs(missing, options)))).values()), job.size)

        def finished(task: Task, rank: int, factors: Factors) -> None:
            require_converged(task.target.module, factors)
            require_unchanged(task)
            job.check()
            place = _place(task, rank)
            if place not in results:
                if cached:
                    cache.keep(keys[place], factors)
                results[place] = factors

        solve = solver_of(options)
        # In the model's order, whichever process computed what.
        mine = [missing[place] for place in sorted(parts[job.rank])]
        announce_found(len(tasks) - len(missing), len(tasks), bar)
        announce_solving(mine, options, bar, aloud=job.rank == 0)
        try:
            for first in range(0, len(mine), options.concurrency):
                solve(mine[first : first + options.concurrency], options, finished, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(stopped(len(results), len(keys), cached)) from None
        for process, part in enumerate(parts):
            owners = {_place(missing[i], rank): process for i in part for rank in missing[i].ranks} | owners
        results = job.gather(results, owners)
    warn_if_uncertified({place.rpartition(" ")[0]: factors for place, factors in results.items()})

    def of_rank(chosen: int | None) -> dict[str, Factors]:
        places = {task.target.module: _place(task, chosen or task.ranks[0]) for task in tasks}
        return {module: results[place] for module, place in places.items() if place in results}

    if not isinstance(options.rank, tuple):
        return {0: FactorSet(of_rank(None), record)}
    return {
        rank: FactorSet(of_rank(rank), {**record, "rank": rank, "ranks": list(options.rank)}) for rank in options.rank
    }


def _place(task: Task, rank: int) -> str:
    return f"{task.target.module} {rank}"


def _tasks(
    targets: Sequence[Target], options: Options, start: Any, job: Job, bar: ProgressBar, *, in_memory: bool
) -> list[Task]:
    """Each matrix surveyed, with its ranks and its start settled; each process surveys a share."""
    mine = sorted(shares([float(math.prod(target.shape)) for target in targets], job.size)[job.rank])
    found_out = survey([targets[place] for place in mine], bar, in_memory=in_memory)
    share = options.energy_share
    if share is not None:
        bar.phase("ranks", len(mine), len(mine))
    found: dict[int, Any] = {}
    for place, one in zip(mine, found_out, strict=True):
        ranks = options.ranks_of(targets[place].module) or (rank_for_energy(targets[place].read(), cast(float, share)),)
        found[place] = one.hash, one.std, one.energy, ranks
        if share is not None:
            bar.advance(1, matrices=1)
    known = job.together("survey", found)
    assert options.init_std is not None
    stds = start_stds(targets, [known[place][1] for place in range(len(targets))], options.init_std)
    return [
        Task(target, known[i][0], tuple(known[i][3]), std, known[i][2], None if start is None else start[target.module])
        for i, (target, std) in enumerate(zip(targets, stds, strict=True))
    ]


def _cache_key(task: Task, rank: int, device: str, record: Mapping[str, Any]) -> str:
    ingredients = {
        **record,
        **task.ingredients(rank),
        # On the reference backend, torch's products have other bits on another kind of device.
        "device": device,
        # A release that changes bits raises RESULT_VERSION; any other finds its predecessor's results.
        "package_version": None,
    }
    return cache.cache_key(ingredients)


def _name(place: int) -> str:
    return f"matrix {place}"
