"""The main job, read top to bottom: targets → survey → start → solve → factors."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cache as finished_matrices
from .checkpoint import open_checkpoint
from .errors import WeightError
from .factors import Certificate, Factors, FactorSet
from .init import gaussian
from .kernels import Problem, load_backend
from .options import Options, require_count
from .progress import ProgressBar
from .solvers.adam import Adam, adam
from .solvers.optimum import optimum
from .targets import FLOAT_DTYPES, find_targets, read_target

_STRIP_ELEMENTS = 1 << 22


def approximate_model(
    path: str | Path,
    rank: int = 8,
    target_modules: Collection[str] | str | None = None,
    *,
    method: str = "inilora",
    solver: str = "adam",
    steps: int = 20_000,
    lr: float = 5e-4,
    step_size: int = 5_000,
    gamma: float = 0.9,
    loss: str = "mse",
    init_std: str | float = "kind",
    tol: float | None = None,
    checkpoint_steps: Sequence[int] = (),
    backend: str = "auto",
    concurrency: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    cache: bool = True,
    progress: bool = True,
) -> FactorSet:
    """Find B (d×r) and A (r×k) with BA ≈ W for each target matrix W (d×k) of a checkpoint: the paper's IniLoRA.

    Minimizes f = ||W − BA||_F² (paper, Eq. 3) by Adam from A, B ~ N(0, σ̄²), float32, and certifies each result
    against the least that the rank allows, f* = Σ_{i>r} σ_i².

    path: a Hugging Face model folder (one safetensors file, or shards with their index, or torch .bin files, read
        with weights_only), or one such file. float32, float16, bfloat16 or float64 weights.
    rank: r, from 1 to min(d, k).
    target_modules: PEFT's syntax: a list of name endings, a regular expression, or "all-linear"; None: the query and
        value projections.
    steps, lr, step_size, gamma: Adam's steps and rate; StepLR multiplies the rate by gamma every step_size steps.
    loss: "mse", the mean over W's entries, is the paper's trajectory; "frobenius", the sum, keeps Adam's eps from
        damping the steps of large matrices and converges better.
    init_std: σ̄: "kind", the mean of the matrices' standard deviations for each kind of matrix apart (query, value);
        "global", one mean for all (paper, Eq. 2); or a number.
    tol: end a matrix once its excess f/f* − 1 is at most this; looked at every 100 steps.
    checkpoint_steps: keep the factors of these steps too (paper, Figure 2); see FactorSet.at_step.
    backend: "triton" (GPU), "cpu", "reference" (plain torch), or "auto": triton where there is a GPU, else cpu.
    concurrency: most matrices in memory at once.
    seed: of the random start. A matrix's start depends on this and on the matrix, not on its place in the model.
    device: a torch device for the triton and reference backends.
    cache: find finished matrices again, and keep new ones as soon as each is finished; see `cache_folder`.
    progress: show a progress bar on standard error.

    Raises OptionError, CheckpointError, TargetError, WeightError or BackendError, all before any long work.

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
        method=method,
        solver=solver,
        steps=steps,
        lr=lr,
        step_size=step_size,
        gamma=gamma,
        loss=loss,
        init_std=init_std,
        tol=tol,
        checkpoint_steps=tuple(checkpoint_steps),
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
    return _factorize(sources, options, concurrency=concurrency, device=device, cache=cache, progress=progress)


def approximate(
    W: Tensor | Sequence[Tensor],
    rank: int = 8,
    *,
    method: str = "inilora",
    solver: str = "adam",
    steps: int = 20_000,
    lr: float = 5e-4,
    step_size: int = 5_000,
    gamma: float = 0.9,
    loss: str = "mse",
    init_std: str | float = "kind",
    tol: float | None = None,
    checkpoint_steps: Sequence[int] = (),
    backend: str = "auto",
    concurrency: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    cache: bool = False,
    progress: bool = False,
) -> Factors | list[Factors]:
    """The same as `approximate_model` on matrices W (d×k) in memory: Factors for one, a list of them for several.

    All of them count as one kind for init_std. Options and errors are those of `approximate_model`.

    >>> W = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))
    >>> factors = approximate(W, rank=1, steps=5000, lr=1e-2)
    >>> bool((factors.product() - W).norm() < 1e-3)
    True
    """
    options = Options(
        rank=rank,
        method=method,
        solver=solver,
        steps=steps,
        lr=lr,
        step_size=step_size,
        gamma=gamma,
        loss=loss,
        init_std=init_std,
        tol=tol,
        checkpoint_steps=tuple(checkpoint_steps),
        backend=load_backend(backend, device).name,
        seed=seed,
    )
    require_count("concurrency", concurrency)
    matrices = [W] if isinstance(W, Tensor) else list(W)
    if not matrices:
        raise WeightError("no matrix was given; give a tensor or a list of them")
    sources = []
    for place, matrix in enumerate(matrices):
        name = f"matrix {place}"
        if matrix.ndim != 2 or matrix.dtype not in FLOAT_DTYPES:
            raise WeightError(
                f"{name}: {matrix.dtype} of shape {tuple(matrix.shape)}; give a float matrix of two dimensions"
            )
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
    factors = _factorize(sources, options, concurrency=concurrency, device=device, cache=cache, progress=progress)
    results = [factors[source.module] for source in sources]
    return results[0] if isinstance(W, Tensor) else results


@dataclass(frozen=True)
class Source:
    """One matrix W (d×k) to factorize and how to get it; see Target and Factors for the fields."""

    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    sha256: Callable[[], str]
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class _Surveyed:
    """A source that was read through once: fit to be factorized, with its hash and standard deviation."""

    source: Source
    sha256: str
    std: float


def _factorize(
    sources: Sequence[Source],
    options: Options,
    *,
    concurrency: int,
    device: str | torch.device | None,
    cache: bool,
    progress: bool,
) -> FactorSet:
    for source in sources:
        if options.rank > min(source.shape):
            raise WeightError(
                f"{source.module}: rank {options.rank} is more than this {source.shape[0]}×{source.shape[1]} matrix "
                f"has; take rank ≤ {min(source.shape)} or leave the module out of target_modules"
            )
    results: dict[str, Factors] = {}
    with ProgressBar(progress) as bar:
        surveyed = _survey(sources, bar)
        stds = _start_stds(surveyed, options.init_std)
        keys = [_cache_key(one, std, options) for one, std in zip(surveyed, stds, strict=True)]
        if cache:
            for one, key in zip(surveyed, keys, strict=True):
                known = finished_matrices.find(key)
                if known is not None:
                    results[one.source.module] = known
        pending = [i for i, one in enumerate(surveyed) if one.source.module not in results]

        def finished(place: int, factors: Factors) -> None:
            results[surveyed[place].source.module] = factors
            if cache:
                finished_matrices.keep(keys[place], factors)

        for first in range(0, len(pending), concurrency):
            batch = pending[first : first + concurrency]
            _solve_by_adam({i: surveyed[i] for i in batch}, {i: stds[i] for i in batch}, options, device, finished, bar)
    modules = {source.module: results[source.module] for source in sources}
    return FactorSet(modules, {**options.record(), "package_version": _package_version()})


def _survey(sources: Sequence[Source], bar: ProgressBar) -> list[_Surveyed]:
    """Read every matrix once, before any long work, and refuse what cannot be factorized."""
    bar.phase("reading", len(sources), len(sources))
    surveyed = []
    for source in sources:
        count, total, squares = 0, 0.0, 0.0
        W = source.read()
        rows = max(1, _STRIP_ELEMENTS // W.shape[1])
        for start in range(0, W.shape[0], rows):
            strip = W[start : start + rows].double()
            count += strip.numel()
            total += float(strip.sum())
            squares += float(strip.square_().sum())
        if not torch.isfinite(torch.tensor(squares)):
            where = (~torch.isfinite(W)).nonzero()
            raise WeightError(
                f"{source.module}: {len(where)} of its {W.numel()} entries are NaN or Inf, the first at "
                f"{tuple(where[0].tolist())}; the checkpoint is damaged or was saved after a diverged run"
            )
        variance = max(0.0, squares - total**2 / count) / max(1, count - 1)
        # A constant matrix has no deviation, and a start of zeros would stay there: its root mean square stands in.
        surveyed.append(_Surveyed(source, source.sha256(), variance**0.5 or (squares / count) ** 0.5))
        bar.advance(1, matrices=1)
    return surveyed


def _start_stds(surveyed: Sequence[_Surveyed], init_std: str | float) -> list[float]:
    """σ̄ of each matrix's start: the mean of the standard deviations of its kind, or of all (paper, Eq. 2)."""
    if not isinstance(init_std, str):
        return [float(init_std)] * len(surveyed)
    kinds = [one.source.kind if init_std == "kind" else "" for one in surveyed]
    means = {
        kind: statistics.fmean(one.std for one, own in zip(surveyed, kinds, strict=True) if own == kind)
        for kind in set(kinds)
    }
    return [means[kind] for kind in kinds]


def _cache_key(one: _Surveyed, std: float, options: Options) -> str:
    ingredients: dict[str, Any] = {
        **options.record(),
        "init_std": std,
        "sha256": one.sha256,
        "shape": one.source.shape,
        "dtype": str(one.source.dtype),
        "rows": one.source.rows,
        "transposed": one.source.transposed,
    }
    return finished_matrices.cache_key(ingredients)


def _generator(one: _Surveyed, seed: int) -> torch.Generator:
    """A matrix's own random stream, the same wherever in a model, batch or list the matrix stands."""
    text = f"{seed} {one.sha256} {one.source.rows}"
    start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(start)


def _solve_by_adam(
    batch: dict[int, _Surveyed],
    stds: dict[int, float],
    options: Options,
    device: str | torch.device | None,
    finished: Callable[[int, Factors], None],
    bar: ProgressBar,
) -> None:
    """IniLoRA: f* of each matrix, its Gaussian start, then Adam on the whole batch."""
    places = list(batch)
    bar.phase("certifying", len(places), len(places))
    bounds, problems = [], []
    for place in places:
        source = batch[place].source
        best = optimum(source.read(), options.rank)
        bounds.append(Certificate(loss=0.0, optimum=best.loss, energy=best.energy, steps=0))
        A, B = gaussian(source.shape, options.rank, stds[place], _generator(batch[place], options.seed))
        problems.append(Problem(source.read, source.shape, A, B))
        bar.advance(1, matrices=1)

    def done(index: int, result: Adam) -> None:
        one = batch[places[index]]
        factors = Factors(
            result.A,
            result.B,
            result.certificate,
            one.sha256,
            one.source.rows,
            one.source.transposed,
            result.history,
            result.checkpoints,
        )
        finished(places[index], factors)
        bar.advance(0, matrices=1)

    bar.phase("solving", len(places), len(places) * options.steps)
    adam(
        problems,
        bounds,
        options.schedule,
        load_backend(options.backend, device),
        tol=options.tol,
        checkpoint_steps=options.checkpoint_steps,
        finished=done,
        advanced=lambda steps, excess: bar.advance(steps, excess=excess, unit="steps"),
    )


def _on_cpu(W: Tensor) -> Tensor:
    return W.detach().cpu().contiguous()


def _sha256(W: Tensor) -> str:
    return hashlib.sha256(_on_cpu(W).view(torch.uint8).numpy().data).hexdigest()


def _package_version() -> str:
    from importlib.metadata import version

    return version("inilora-kernels")
