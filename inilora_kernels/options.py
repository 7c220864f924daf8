"""Every option of a run: its name, type, default and meaning stand here and nowhere else.

The functions' signatures and docstrings, the command line, the factor file's record and the cache key are all made from
these fields. To add an option, add a field and read it where it acts.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from .errors import OptionError
from .factors import Factors
from .kernels.backend import Schedule
from .kernels.loading import load_backend
from .suggestions import did_you_mean, require_choice

if TYPE_CHECKING:
    import torch

LOSSES = ("mse", "frobenius")
GAUGES = ("nearest", "svd")
MOST_STEPS = 100_000_000
# Beyond these, the squares of a start's entries leave float32's range.
LEAST_STD, MOST_STD = 1e-18, 1e18
_FLOAT32_MOST = (2 - 2.0**-23) * 2.0**127
_ENERGY = "energy:"

Rank = int | str | Sequence[int]
_T = TypeVar("_T")


def option(default: _T, meaning: str, *, decides: bool = True, ignored_by: Collection[str] = ()) -> _T:
    """A field of Options.

    decides: whether the result depends on it, so that it belongs in the record and the cache key.
    ignored_by: the solvers that do not read it; "" stands for a random start.
    """
    return field(default=default, metadata={"meaning": meaning, "decides": decides, "ignored_by": ignored_by})


_NOT_ADAM = ("krylov", "exact", "")


@dataclass(frozen=True, eq=False)
class Options:
    """The options of `approximate`, checked on construction. Raises OptionError or BackendError.

    >>> Options(rank=4).steps
    20000
    >>> Options(lr=-1.0)
    Traceback (most recent call last):
    inilora_kernels.errors.OptionError: lr=-1.0: give a number above 0
    """

    rank: Rank = option(
        8,
        'Rank r, from 1 to min(d, k); or "energy:0.2", the smallest rank of each matrix that keeps that share of '
        "||W||².",
    )
    _: KW_ONLY
    rank_pattern: Mapping[str, int] | None = option(
        None, "As in PEFT's LoraConfig: other ranks for some modules, by name ending or regular expression."
    )
    method: str = option("inilora", "The initialization; `inilora methods` lists each with its formula and source.")
    solver: str | None = option(
        None,
        'Of inilora: "adam", the paper\'s trajectory; "krylov", the same minimum in seconds; "exact", by a full SVD. '
        "Default: the method's first in `inilora methods`.",
    )
    gauge: str = option(
        "nearest",
        'Which factors of the best product BA inilora takes, by krylov or exact: "nearest", the balanced pair nearest '
        'to the random start; "svd", B = U√Σ and A = √ΣVᵀ, which is PiSSA.',
        ignored_by=("adam",),
    )
    start: Mapping[str, Factors] | Sequence[Factors] | Factors | str | Path | None = option(
        None,
        'Factors that gauge="nearest" comes close to, such as those of a short Adam run, or the path of their file.',
        ignored_by=("adam",),
    )
    steps: int = option(20_000, "Adam steps for each matrix.", ignored_by=_NOT_ADAM)
    lr: float = option(5e-4, "Adam's learning rate.", ignored_by=_NOT_ADAM)
    step_size: int = option(5_000, "StepLR: steps between decays.", ignored_by=_NOT_ADAM)
    gamma: float = option(0.9, "StepLR: the factor of a decay.", ignored_by=_NOT_ADAM)
    loss: str = option(
        "mse",
        '"mse", the mean over W\'s entries, is the paper\'s trajectory; "frobenius", the sum, keeps Adam\'s eps from '
        "damping the steps of large matrices and converges better.",
        ignored_by=_NOT_ADAM,
    )
    init_std: str | float | None = option(
        None,
        'σ̄ of the random start: "kind", the mean of the matrices\' standard deviations for each kind of matrix '
        '(query, value); "global", one mean for all (paper, Eq. 2); or a number. Default: the method\'s own.',
    )
    tol: float | None = option(
        None, "Stop a matrix once its excess f/f* − 1 is at most this; checked every 100 steps.", ignored_by=_NOT_ADAM
    )
    checkpoint_steps: Sequence[int] = option(
        (), "Keep the factors of these steps too (paper, Figure 2); see FactorSet.at_step.", ignored_by=_NOT_ADAM
    )
    backend: str = option(
        "auto",
        '"triton" (a GPU), "cpu", "reference" (plain torch), or "auto": triton where there is a GPU, otherwise cpu.',
    )
    seed: int = option(
        0,
        "Seed of the random start. A matrix's start depends on this and on the matrix, not on its place in the model.",
    )
    concurrency: int = option(64, "At most this many matrices in memory at once.", decides=False)
    device: str | torch.device | None = option(
        None, "A torch device for the triton and reference backends, such as cuda:1.", decides=False
    )
    cache: bool | None = option(
        None,
        "Reuse finished matrices, and keep each new one as soon as it is finished. Default: on for a model, off for "
        "matrices in memory.",
        decides=False,
    )
    progress: bool | None = option(
        None,
        "Show a progress bar on standard error. Default: on for a model, off for matrices in memory.",
        decides=False,
    )

    def __post_init__(self) -> None:
        self._check_rank()
        self._check_rank_pattern()
        _require_integer("steps", self.steps, least=0)
        if self.steps > MOST_STEPS:
            raise OptionError(f"steps={self.steps}: give at most {MOST_STEPS:,}")
        _require_integer("step_size", self.step_size, least=1)
        _require_integer("seed", self.seed, least=0)
        _require_integer("concurrency", self.concurrency, least=1)
        require_choice("loss", self.loss, LOSSES)
        require_choice("gauge", self.gauge, GAUGES)
        _require_positive("lr", self.lr)
        _require_positive("gamma", self.gamma)
        _require_finite_rate(self)
        if self.tol is not None:
            _require_positive("tol", self.tol)
        if isinstance(self.init_std, str):
            require_choice("init_std", self.init_std, ("kind", "global"), "or a number above 0")
        elif self.init_std is not None:
            _require_positive("init_std", self.init_std)
            if not LEAST_STD <= self.init_std <= MOST_STD:
                raise OptionError(f"init_std={self.init_std}: give a number from {LEAST_STD} to {MOST_STD}")
        if not isinstance(self.checkpoint_steps, Sequence) or isinstance(self.checkpoint_steps, str):
            raise OptionError(f"checkpoint_steps={self.checkpoint_steps!r}: give a list of steps")
        for step in self.checkpoint_steps:
            _require_integer("checkpoint_steps", step, least=0)
            if step > self.steps:
                raise OptionError(f"checkpoint_steps asks for {step}, but the run ends at steps={self.steps}")
        settled = {
            "rank_pattern": dict(self.rank_pattern or {}),
            "checkpoint_steps": tuple(self.checkpoint_steps),
            "backend": load_backend(self.backend, self.device).name,
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _check_rank(self) -> None:
        if isinstance(self.rank, str):
            if not self.rank.startswith(_ENERGY) or self.energy_share is None:
                raise OptionError(f'rank={self.rank!r}: give a whole number, or "energy:0.2" (a share up to 1)')
        elif isinstance(self.rank, Sequence):
            if not self.rank or len(set(self.rank)) < len(self.rank):
                raise OptionError(f"rank={list(self.rank)!r}: give different ranks, at least one")
            for rank in self.rank:
                _require_integer("rank", rank, least=1)
            if self.rank_pattern:
                raise OptionError("rank_pattern goes with one rank, not with a list of them")
            object.__setattr__(self, "rank", tuple(self.rank))
        else:
            _require_integer("rank", self.rank, least=1)

    def _check_rank_pattern(self) -> None:
        if not isinstance(self.rank_pattern, (Mapping, type(None))):
            raise OptionError(f'rank_pattern={self.rank_pattern!r}: give ranks by name, such as {{"value": 4}}')
        for pattern, rank in (self.rank_pattern or {}).items():
            _require_integer(f"rank_pattern[{pattern!r}]", rank, least=1)
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"rank_pattern: {pattern!r} is not a valid regular expression ({error})") from error

    @property
    def energy_share(self) -> float | None:
        """The share of W's energy to keep, where the rank follows from it."""
        if not isinstance(self.rank, str):
            return None
        try:
            share = float(self.rank.removeprefix(_ENERGY))
        except ValueError:
            return None
        return share if 0 < share <= 1 else None

    def ranks_of(self, module: str) -> tuple[int, ...] | None:
        """The ranks for a module; None where its energy decides.

        As in PEFT, a key of rank_pattern is the end of a module's name or a regular expression for it.
        """
        pattern = self.pattern_of(module)
        if pattern is not None and self.rank_pattern is not None:
            return (self.rank_pattern[pattern],)
        if isinstance(self.rank, str):
            return None
        return (self.rank,) if isinstance(self.rank, int) else tuple(self.rank)

    def pattern_of(self, module: str) -> str | None:
        """The first pattern of rank_pattern that matches a module's name."""
        return next((pattern for pattern in self.rank_pattern or {} if fits(pattern, module)), None)

    def unread(self) -> list[str]:
        """The options that were changed from their default although the solver does not read them."""
        return [
            one.name
            for one in fields(self)
            if self.solver in one.metadata.get("ignored_by", ()) and getattr(self, one.name) != one.default
        ]

    @property
    def adam_steps(self) -> int:
        return steps_of(self.solver or "", self.steps)

    @property
    def schedule(self) -> Schedule:
        return Schedule(steps=self.steps, lr=self.lr, step_size=self.step_size, gamma=self.gamma, loss=self.loss)

    def record(self) -> dict[str, Any]:
        """What the result depends on besides the weights, as JSON values; `start` is left for the caller to hash."""
        names = [
            one.name
            for one in fields(self)
            if one.metadata.get("decides") and self.solver not in one.metadata["ignored_by"]
        ]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class ModelOptions(Options):
    """The options of `approximate_model`: those of `approximate`, and which of the model's matrices to take."""

    target_modules: Collection[str] | str | None = option(
        None,
        'In PEFT\'s syntax: a list of name endings, a regular expression, or "all-linear". Default: the query and '
        "value projections.",
        decides=False,
    )
    target_parameters: Collection[str] | None = option(
        None,
        "As in PEFT's LoraConfig: parameters of experts, by name ending, such as mlp.experts.gate_up_proj; a matrix "
        "for each expert. Default: none.",
        decides=False,
    )
    revision: str | None = option(None, "The branch, tag or commit of a model on the hub.", decides=False)
    token: str | None = option(
        None,
        "The access token for a model on the hub. Default: the one that huggingface_hub has stored.",
        decides=False,
    )


P = ParamSpec("P")
_Input = TypeVar("_Input")
_Chosen = TypeVar("_Chosen")
_Result = TypeVar("_Result")


def takes(
    options: Callable[P, _Chosen],
) -> Callable[[Callable[[_Input, _Chosen], _Result]], Callable[Concatenate[_Input, P], _Result]]:
    """Let a function of (input, options) take the options' fields as keywords, each of them typed and documented.

    `options` is the class: the decorated function has its signature after the input, and its fields' meanings at the
    end of its docstring.
    """

    def decorate(function: Callable[[_Input, _Chosen], _Result]) -> Callable[Concatenate[_Input, P], _Result]:
        own = inspect.signature(function)
        given = next(iter(own.parameters.values()))
        parameters = [given, *inspect.signature(options).parameters.values()]
        signature = inspect.Signature(parameters, return_annotation=own.return_annotation)

        @functools.wraps(function)
        def keywords(*args: Any, **kwargs: Any) -> _Result:
            for name in kwargs.keys() - signature.parameters.keys():
                near = did_you_mean(name, signature.parameters)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{near}")
            arguments = signature.bind(*args, **kwargs).arguments
            return function(arguments.pop(given.name), cast(Any, options)(**arguments))

        keywords.__signature__ = signature  # type: ignore[attr-defined]
        described = [one for one in fields(cast(Any, options)) if "meaning" in one.metadata]
        meanings = "\n".join(f"    {one.name}: {meaning(one)}" for one in described)
        keywords.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{meanings}\n"
        return cast(Any, keywords)  # type: ignore[no-any-return]

    return decorate


def steps_of(solver: str, steps: int) -> int:
    """The Adam steps that a solver takes when it is asked for `steps`: none, unless it is Adam."""
    return 0 if solver in _NOT_ADAM else steps


def meaning_of(name: str) -> str:
    """The meaning of an option, without its default."""
    return str(next(one.metadata["meaning"] for one in fields(ModelOptions) if one.name == name))


def meaning(one: Field[Any]) -> str:
    """An option's meaning in one line, with its default."""
    text: str = one.metadata["meaning"]
    return text if "Default:" in text or one.default is None else f"{text} Default: {one.default!r}."


def fits(pattern: str, module: str) -> bool:
    r"""Whether a key of rank_pattern or alpha_pattern matches a module: as in PEFT, it is the end of its name.

    >>> [fits(r"layer.\d.query", name) for name in ("layer.0.query", "encoder.layer.0.query", "player.0.query")]
    [True, True, False]
    """
    return _end_of_name(pattern).match(module) is not None


@functools.cache
def _end_of_name(pattern: str) -> re.Pattern[str]:
    # re keeps 512 of them, and with a rank by energy there is one for each matrix.
    return re.compile(rf"(.*\.)?({pattern})$")


def require_count(name: str, value: object) -> None:
    """Raise OptionError unless value is a whole number of at least 1."""
    _require_integer(name, value, least=1)


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r}: give a whole number of at least {least}")


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionError(f"{name}={value!r}: give a number above 0")


def _require_finite_rate(options: Options) -> None:
    try:
        last = options.schedule.learning_rate(options.steps)
    except OverflowError:
        last = math.inf
    if not last < _FLOAT32_MOST or not options.lr < _FLOAT32_MOST:
        raise OptionError(
            f"lr={options.lr}, gamma={options.gamma}, step_size={options.step_size}: the rate leaves float32's range; "
            f"give a smaller lr or a gamma below 1"
        )
