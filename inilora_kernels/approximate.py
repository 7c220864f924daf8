"""The main job, read top to bottom: targets → survey → start → solve → factors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from .display.progress import ProgressBar
from .errors import OptionError, WeightError
from .factors import Factors, FactorSet
from .kernels.backend import load_backend
from .model.checkpoint import open_checkpoint
from .model.survey import Source, Surveyed, start_stds, survey
from .model.targets import FLOAT_DTYPES, find_targets, read_target
from .options import Options, Rank, require_count
from .solvers.optimum import rank_for_energy
from .solvers.run import Task, solve_by_adam, solve_directly
from .storage import cache as finished_matrices


@overload
def approximate_model(
    path: str | Path,
    rank: int | str = ...,
    target_modules: Collection[str] | str | None = ...,
    *,
    rank_pattern: Mapping[str, int] | None = ...,
    method: str = ...,
    solver: str | None = ...,
    gauge: str = ...,
    start: Mapping[str, Factors] | None = ...,
    steps: int = ...,
    lr: float = ...,
    step_size: int = ...,
    gamma: float = ...,
    loss: str = ...,
    init_std: str | float | None = ...,
    tol: float | None = ...,
    checkpoint_steps: Sequence[int] = ...,
    backend: str = ...,
    concurrency: int = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    cache: bool = ...,
    progress: bool = ...,
) -> FactorSet: ...


@overload
def approximate_model(
    path: str | Path,
    rank: Sequence[int],
    target_modules: Collection[str] | str | None = ...,
    *,
    rank_pattern: Mapping[str, int] | None = ...,
    method: str = ...,
    solver: str | None = ...,
    gauge: str = ...,
    start: Mapping[str, Factors] | None = ...,
    steps: int = ...,
    lr: float = ...,
    step_size: int = ...,
    gamma: float = ...,
    loss: str = ...,
    init_std: str | float | None = ...,
    tol: float | None = ...,
    checkpoint_steps: Sequence[int] = ...,
    backend: str = ...,
    concurrency: int = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    cache: bool = ...,
    progress: bool = ...,
) -> dict[int, FactorSet]: ...


def approximate_model(
    path: str | Path,
    rank: Rank = 8,
    target_modules: Collection[str] | str | None = None,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    method: str = "inilora",
    solver: str | None = None,
    gauge: str = "nearest",
    start: Mapping[str, Factors] | None = None,
    steps: int = 20_000,
    lr: float = 5e-4,
    step_size: int = 5_000,
    gamma: float = 0.9,
    loss: str = "mse",
    init_std: str | float | None = None,
    tol: float | None = None,
    checkpoint_steps: Sequence[int] = (),
    backend: str = "auto",
    concurrency: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    cache: bool = True,
    progress: bool = True,
) -> FactorSet | dict[int, FactorSet]:
    """Find B (d×r) and A (r×k), the start of a LoRA, for each target matrix W (d×k) of a checkpoint.

    The paper's IniLoRA, the default, minimizes f = ||W − BA||_F² (paper, Eq. 3) by Adam from A, B ~ N(0, σ̄²). Every
    result, of whatever method, comes with f and the least that the rank allows, f* = Σ_{i>r} σ_i². float32.

    path: a Hugging Face model folder (one safetensors file, or shards with their index, or torch .bin files, read
        with weights_only), or one such file. float32, float16, bfloat16 or float64 weights.
    rank: r, from 1 to min(d, k); "energy:0.2", the smallest rank of each matrix that can keep that share of ||W||²; or
        a list of ranks, which share the readings of W (by Adam: those for f*) and return a dict, rank → FactorSet.
    rank_pattern: as in PEFT's LoraConfig, other ranks for some modules, by name ending or regular expression.
    target_modules: PEFT's syntax: a list of name endings, a regular expression, or "all-linear"; None: the query and
        value projections.
    method: "inilora" and others of the paper; `inilora_kernels.initializations` has the formula and source of each.
    solver: of "inilora": "adam", the paper's trajectory, is the default; "krylov", the same minimum in seconds;
        "exact", by a full SVD. Of "pissa": "krylov", the default, or "exact".
    gauge: which factors of the one best product "inilora" takes by krylov or exact: "nearest", the balanced pair
        nearest to the random start; "svd", B = U√Σ and A = √ΣVᵀ, which is PiSSA.
    start: factors for gauge="nearest" to be near to, those of a short Adam run for example.
    steps, lr, step_size, gamma: Adam's steps and rate; StepLR multiplies the rate by gamma every step_size steps.
    loss: "mse", the mean over W's entries, is the paper's trajectory; "frobenius", the sum, keeps Adam's eps from
        damping the steps of large matrices and converges better.
    init_std: σ̄: "kind", the mean of the matrices' standard deviations for each kind of matrix apart (query, value);
        "global", one mean for all (paper, Eq. 2); or a number. None: "kind", but 0.5 for "inilora-alpha" and 0.01 for
        "normal".
    tol: end a matrix once its excess f/f* − 1 is at most this; looked at every 100 steps.
    checkpoint_steps: keep the factors of these steps too (paper, Figure 2); see FactorSet.at_step.
    backend: "triton" (GPU), "cpu", "reference" (plain torch), or "auto": triton where there is a GPU, else cpu.
    concurrency: most matrices in memory at once.
    seed: of the random start. A matrix's start depends on this and on the matrix, not on its place in the model.
    device: a torch device for the triton and reference backends.
    cache: find finished matrices again, and keep new ones as soon as each is finished; see `cache_folder`.
    progress: show a progress bar on standard error.

    Raises OptionError, CheckpointError, TargetError, WeightError or BackendError, all before any long work but one: a
    WeightError for a run that diverged.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> model = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"layer.0.query.weight": torch.eye(6), "layer.0.value.weight": torch.ones(6, 4)}, model)
    >>> factors = approximate_model(model, rank=1, steps=2000, lr=1e-2, cache=False, progress=False)
    >>> {module: tuple(one.B.shape) for module, one in factors.items()}
    {'layer.0.query': (6, 1), 'layer.0.value': (6, 1)}
    >>> round(factors["layer.0.query"].certificate.loss, 3)
    5.0
    """
    options = Options(
        rank=rank,
        rank_pattern=dict(rank_pattern or {}),
        method=method,
        solver=solver,
        gauge=gauge,
        start=_name_of(start),
        steps=steps,
        lr=lr,
        step_size=step_size,
        gamma=gamma,
        loss=loss,
        init_std=init_std,
        tol=tol,
        checkpoint_steps=checkpoint_steps,
        backend=load_backend(backend, device).name,
        seed=seed,
    )
    require_count("concurrency", concurrency)
    checkpoint = open_checkpoint(path)
    targets = find_targets(checkpoint, target_modules)
    hashes: dict[str, str] = {}

    def sha256_of(tensor: str) -> str:
        if tensor not in hashes:
            hashes[tensor] = checkpoint.sha256(tensor)
        return hashes[tensor]

    sources = [
        Source(
            module=target.module,
            kind=target.kind,
            shape=target.shape,
            dtype=target.dtype,
            read=partial(read_target, checkpoint, target),
            sha256=partial(sha256_of, target.tensor),
            rows=target.rows,
            transposed=target.transposed,
        )
        for target in targets
    ]
    found = _factorize(sources, options, start, concurrency=concurrency, device=device, cache=cache, progress=progress)
    return found if isinstance(options.rank, tuple) else found[0]


def approximate(
    W: Tensor | Sequence[Tensor],
    rank: Rank = 8,
    *,
    method: str = "inilora",
    solver: str | None = None,
    gauge: str = "nearest",
    start: Factors | Sequence[Factors] | None = None,
    steps: int = 20_000,
    lr: float = 5e-4,
    step_size: int = 5_000,
    gamma: float = 0.9,
    loss: str = "mse",
    init_std: str | float | None = None,
    tol: float | None = None,
    checkpoint_steps: Sequence[int] = (),
    backend: str = "auto",
    concurrency: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    cache: bool = False,
    progress: bool = False,
) -> Factors | list[Factors] | dict[int, Factors] | dict[int, list[Factors]]:
    """The same as `approximate_model` on matrices W (d×k) in memory: Factors for one, a list of them for several.

    A list of ranks gives a dict of those by rank. All matrices count as one kind for init_std. Options and errors are
    those of `approximate_model`.

    >>> W = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))
    >>> factors = approximate(W, rank=1, steps=5000, lr=1e-2)
    >>> bool((factors.product() - W).norm() < 1e-3)
    True
    """
    matrices = [W] if isinstance(W, Tensor) else list(W)
    if not matrices:
        raise WeightError("no matrix was given; give a tensor or a list of them")
    starts = _named([start] if isinstance(start, Factors) else start)
    options = Options(
        rank=rank,
        rank_pattern={},
        method=method,
        solver=solver,
        gauge=gauge,
        start=_name_of(starts),
        steps=steps,
        lr=lr,
        step_size=step_size,
        gamma=gamma,
        loss=loss,
        init_std=init_std,
        tol=tol,
        checkpoint_steps=checkpoint_steps,
        backend=load_backend(backend, device).name,
        seed=seed,
    )
    require_count("concurrency", concurrency)
    sources = []
    for place, matrix in enumerate(matrices):
        name = _name(place)
        if matrix.ndim != 2 or matrix.dtype not in FLOAT_DTYPES:
            raise WeightError(
                f"{name}: {matrix.dtype} of shape {tuple(matrix.shape)}; give a float matrix of two dimensions"
            )
        if matrix.is_meta or matrix.layout != torch.strided:
            kind = "on the meta device, without values" if matrix.is_meta else f"stored as {matrix.layout}"
            raise WeightError(f"{name} is {kind}; give a dense matrix")
        sources.append(
            Source(
                module=name,
                kind="matrix",
                shape=(matrix.shape[0], matrix.shape[1]),
                dtype=matrix.dtype,
                read=partial(_on_cpu, matrix),
                sha256=partial(_sha256, matrix),
            )
        )
    found = _factorize(sources, options, starts, concurrency=concurrency, device=device, cache=cache, progress=progress)
    results = {rank: [factors[source.module] for source in sources] for rank, factors in found.items()}
    if isinstance(W, Tensor):
        alone = {rank: factors[0] for rank, factors in results.items()}
        return alone if isinstance(options.rank, tuple) else alone[0]
    return results if isinstance(options.rank, tuple) else results[0]


def _factorize(
    sources: Sequence[Source],
    options: Options,
    start: Mapping[str, Factors] | None,
    *,
    concurrency: int,
    device: str | torch.device | None,
    cache: bool,
    progress: bool,
) -> dict[int, FactorSet]:
    """A FactorSet for each rank asked for; one, under the key 0, where the rank is a matrix's own."""
    for source in sources:
        _require_fitting(source, options.ranks_of(source.module) or (), start)
    results: dict[tuple[str, int], Factors] = {}
    keys: dict[tuple[str, int], str] = {}
    with ProgressBar(progress) as bar:
        surveyed = survey(sources, bar)
        assert options.init_std is not None
        stds = start_stds(surveyed, options.init_std)
        ranks = _settled_ranks(surveyed, options, bar)
        tasks = []
        for one, std, own in zip(surveyed, stds, ranks, strict=True):
            module = one.source.module
            task = Task(one, own, std, start[module] if start is not None else None)
            keys.update({(module, rank): _cache_key(task, rank, options) for rank in own})
            if cache:
                known = {rank: finished_matrices.find(keys[module, rank], one.sha256) for rank in own}
                results.update({(module, rank): factors for rank, factors in known.items() if factors is not None})
            if any((module, rank) not in results for rank in own):
                tasks.append(task)

        def finished(task: Task, rank: int, factors: Factors) -> None:
            module, loss = task.matrix.source.module, factors.certificate.loss
            if not math.isfinite(loss):
                raise WeightError(
                    f"{module}: the run diverged, its loss is {loss}; take a smaller lr, or divide the weights if they "
                    f"are near the end of float32's range"
                )
            place = module, rank
            if place not in results:
                results[place] = factors
                if cache:
                    finished_matrices.keep(keys[place], factors)

        solve = solve_by_adam if options.solver == "adam" else solve_directly
        for first in range(0, len(tasks), concurrency):
            solve(tasks[first : first + concurrency], options, device, finished, bar)
    record = {**options.record(), "package_version": _package_version()}
    modules = [source.module for source in sources]
    if not isinstance(options.rank, tuple):
        own_ranks = {module: own[0] for module, own in zip(modules, ranks, strict=True)}
        return {0: FactorSet({module: results[module, own_ranks[module]] for module in modules}, record)}
    return {
        rank: FactorSet(
            {module: results[module, rank] for module in modules},
            {**record, "rank": rank, "ranks": list(options.rank)},
        )
        for rank in options.rank
    }


def _require_fitting(source: Source, ranks: Sequence[int], start: Mapping[str, Factors] | None) -> None:
    if min(source.shape) == 0:
        raise WeightError(
            f"{source.module}: a {source.shape[0]}×{source.shape[1]} matrix has no entries; leave the module out of "
            f"target_modules"
        )
    for rank in ranks:
        if rank > min(source.shape):
            raise WeightError(
                f"{source.module}: rank {rank} is more than this {source.shape[0]}×{source.shape[1]} matrix "
                f"has; take rank ≤ {min(source.shape)} or leave the module out of target_modules"
            )
    if start is None:
        return
    if source.module not in start:
        raise OptionError(f"start has no factors for {source.module}; make them with the same target_modules")
    given = start[source.module]
    shape = (int(given.B.shape[0]), int(given.A.shape[1]))
    if shape != source.shape or tuple(ranks) != (given.rank,):
        raise OptionError(
            f"start's factors for {source.module} are of shape {shape[0]}×{shape[1]} and rank {given.rank}; "
            f"give the same shape, and the same rank as here"
        )


def _settled_ranks(surveyed: Sequence[Surveyed], options: Options, bar: ProgressBar) -> list[tuple[int, ...]]:
    """Each matrix's ranks, found from its energy where they are to follow from that."""
    share = options.energy_share
    if share is not None:
        bar.phase("ranks", len(surveyed), len(surveyed))
    settled = []
    for one in surveyed:
        ranks = options.ranks_of(one.source.module)
        if ranks is None:
            assert share is not None
            ranks = (rank_for_energy(one.source.read(), share),)
        settled.append(ranks)
        if share is not None:
            bar.advance(1, matrices=1)
    return settled


def _cache_key(task: Task, rank: int, options: Options) -> str:
    one = task.matrix
    ingredients: dict[str, Any] = {
        **options.record(),
        "rank": rank,
        "ranks": list(task.ranks),
        "rank_pattern": None,
        "init_std": task.std,
        "sha256": one.sha256,
        "shape": one.source.shape,
        "dtype": str(one.source.dtype),
        "rows": one.source.rows,
        "transposed": one.source.transposed,
    }
    return finished_matrices.cache_key(ingredients)


def _name(place: int) -> str:
    return f"matrix {place}"


def _named(start: Sequence[Factors] | None) -> dict[str, Factors] | None:
    if start is None:
        return None
    if not all(isinstance(one, Factors) for one in start):
        raise OptionError("start: give Factors, as approximate returns them, one for each matrix")
    return {_name(place): one for place, one in enumerate(start)}


def _name_of(start: Mapping[str, Factors] | None) -> str | None:
    """What stands for the given factors in the record: the sha256 of them all."""
    if start is None:
        return None
    digest = hashlib.sha256()
    # Each on its own: one file may not hold the same tensor twice, but two matrices may start from the same factors.
    for module in sorted(start):
        digest.update(FactorSet({module: start[module]}, {}).to_bytes())
    return digest.hexdigest()


def _on_cpu(W: Tensor) -> Tensor:
    return W.detach().cpu().contiguous()


def _sha256(W: Tensor) -> str:
    return hashlib.sha256(_on_cpu(W).view(torch.uint8).numpy().data).hexdigest()


def _package_version() -> str:
    try:
        return version("inilora-kernels")
    except PackageNotFoundError:  # vendored, or frozen into a program
        return "unknown"
