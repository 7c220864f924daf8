"""What a run refuses once it knows the matrices: before any long work, except for a run that diverged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import BackendError, CheckpointError, OptionError, WeightError
from .factors import Factors
from .kernels.loading import load_backend
from .model.targets import Target
from .options import Options
from .solvers.run import Task
from .suggestions import did_you_mean, some


def require_one_rank(options: Options) -> None:
    if isinstance(options.rank, tuple):
        raise OptionError(f"rank={list(options.rank)!r}: give one rank; approximate_ranks takes a list, for a model")


def require_fitting(target: Target, options: Options, start: Mapping[str, Factors] | None) -> None:
    d, k = target.shape
    if min(d, k) == 0:
        raise WeightError(f"{target.module}: a {d}×{k} matrix has no entries; leave the module out of target_modules")
    ranks = options.ranks_of(target.module) or ()
    for rank in ranks:
        if rank > min(d, k):
            raise WeightError(
                f"{target.module}: rank {rank} is more than a {d}×{k} matrix can have; take rank ≤ {min(d, k)} or "
                f"leave the module out of target_modules"
            )
    if start is None:
        return
    if target.module not in start:
        raise OptionError(f"start has no factors for {target.module}; compute them with the same target_modules")
    given = start[target.module]
    shape = (int(given.B.shape[0]), int(given.A.shape[1]))
    if shape != target.shape or tuple(ranks) != (given.rank,):
        raise OptionError(
            f"start's factors for {target.module} are of shape {shape[0]}×{shape[1]} and rank {given.rank}; "
            f"give the same shape, and the same rank as here"
        )


def require_backend(targets: Sequence[Target], options: Options) -> str:
    """The type of the backend's device. Raises BackendError if there is no such backend, or it cannot take a matrix."""
    device = load_backend(options.backend, options.device).device.type
    _require_taken([(target, options.ranks_of(target.module) or ()) for target in targets], options)
    return device


def require_ranks_taken(tasks: Sequence[Task], options: Options) -> Sequence[Task]:
    """The tasks. Raises BackendError for a rank, settled by the matrix's energy, that the backend cannot take."""
    _require_taken([(task.target, task.ranks) for task in tasks], options)
    return tasks


def _require_taken(wanted: Sequence[tuple[Target, Sequence[int]]], options: Options) -> None:
    if not options.adam_steps:
        return
    backend = load_backend(options.backend, options.device)
    alike: dict[tuple[tuple[int, int], torch.dtype, int], str] = {}
    for target, ranks in wanted:
        for rank in ranks:
            alike.setdefault((target.shape, target.dtype, rank), target.module)
    for kind, module in alike.items():
        try:
            backend.require_adam(*kind)
        except BackendError as error:
            raise BackendError(f"{module}: {error}") from None


def size_of_factors(targets: Sequence[Target], options: Options) -> int:
    """The bytes of all A and B in float32, of every rank and kept step; the least where energy decides.

    Raises WeightError for a rank that a matrix cannot have, whose bytes nobody would have to find room for.
    """
    for target in targets:
        require_fitting(target, options, None)
    values = sum(rank * sum(target.shape) for target in targets for rank in options.ranks_of(target.module) or (1,))
    return 4 * values * (1 + len(options.checkpoint_steps))


def require_converged(module: str, factors: Factors) -> None:
    loss = factors.certificate.loss
    if not math.isfinite(loss):
        raise WeightError(
            f"{module}: the run diverged, its loss is {loss}; take a smaller lr, or divide the weights if they are "
            f"near the end of float32's range"
        )


def require_factors(start: Any) -> None:
    """Raise OptionError unless `start` is None, or Factors by module."""
    if not (start is None or (isinstance(start, Mapping) and all(isinstance(one, Factors) for one in start.values()))):
        raise OptionError("start: give Factors for each matrix: a FactorSet, or a list for matrices in memory")


def require_patterns_used(targets: Sequence[Target], options: Options) -> None:
    """Raise OptionError for a pattern of rank_pattern that matches none of the matrices."""
    modules = [target.module for target in targets]
    for pattern in options.rank_pattern or {}:
        if not any(options.pattern_of(module) == pattern for module in modules):
            endings = {part for module in modules for part in module.replace(":", ".").split(".")}
            raise OptionError(
                f"rank_pattern: {pattern!r} matches none of the {len(modules)} matrices"
                f"{did_you_mean(pattern, endings)}; the first is {modules[0]}"
            )


def require_unchanged(task: Task) -> None:
    if not task.target.unchanged(task.sha256):
        raise CheckpointError(
            f"{task.target.module}: its weights changed while they were factorized, so the result belongs to neither "
            f"version; run again when nothing writes to the model"
        )


def warn_if_uncertified(results: Mapping[str, Factors]) -> None:
    """Warn of matrices for which only a loose bound on f* is known, so that their excess may be far overstated."""
    loose = [module for module, factors in results.items() if not factors.certificate.certified]
    if loose:
        warnings.warn(
            f"{some(loose, most=1)}: the singular values at the rank are "
            f"so nearly equal that the certificate was not reached; the factors are as good as their loss says, and "
            f'the excess is an upper bound. solver="exact" decides it by a full decomposition',
            stacklevel=4,
        )
