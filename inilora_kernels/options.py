"""The options that decide a result, checked before any work; they are the factor file's `options`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import OptionError
from .initializations import METHODS, Method
from .kernels.backend import Schedule

LOSSES = ("mse", "frobenius")
GAUGES = ("nearest", "svd")
_ENERGY = "energy:"
# What only Adam reads; the record of another solver leaves it out.
_OF_ADAM = ("steps", "lr", "step_size", "gamma", "loss", "tol", "checkpoint_steps")

Rank = int | str | Sequence[int]


@dataclass(frozen=True)
class Options:
    """Everything but the weights that a result depends on; see `approximate_model` for each one's meaning.

    solver and init_std: None is the method's own, which stands in its place from then on; "" is the solver of a random
    start. start: a name for the factors to be near to, None for the random start.
    """

    rank: Rank
    rank_pattern: Mapping[str, int]
    method: str
    solver: str | None
    gauge: str
    start: str | None
    steps: int
    lr: float
    step_size: int
    gamma: float
    loss: str
    init_std: str | float | None
    tol: float | None
    checkpoint_steps: Sequence[int]
    backend: str
    seed: int

    def __post_init__(self) -> None:
        self._check_rank()
        _require_integer("steps", self.steps, least=0)
        _require_integer("step_size", self.step_size, least=1)
        _require_integer("seed", self.seed, least=0)
        _require_choice("loss", self.loss, LOSSES)
        _require_choice("method", self.method, tuple(METHODS))
        self._settle_solver(METHODS[self.method])
        _require_choice("gauge", self.gauge, GAUGES)
        if self.start is not None and (self.method != "inilora" or self.solver == "adam" or self.gauge != "nearest"):
            raise OptionError('start is what gauge="nearest" is near to: for method="inilora" by krylov or exact only')
        _require_positive("lr", self.lr)
        _require_positive("gamma", self.gamma)
        if self.tol is not None:
            _require_positive("tol", self.tol)
        if self.init_std is None:
            object.__setattr__(self, "init_std", METHODS[self.method].std)
        if isinstance(self.init_std, str):
            _require_choice("init_std", self.init_std, ("kind", "global"), "or a number above 0")
        else:
            _require_positive("init_std", self.init_std)
        if not isinstance(self.checkpoint_steps, Sequence) or isinstance(self.checkpoint_steps, str):
            raise OptionError(f"checkpoint_steps={self.checkpoint_steps!r}: give a list of steps")
        object.__setattr__(self, "checkpoint_steps", tuple(self.checkpoint_steps))
        for step in self.checkpoint_steps:
            _require_integer("checkpoint_steps", step, least=0)
            if step > self.steps:
                raise OptionError(f"checkpoint_steps has {step}, but the run ends at steps={self.steps}")

    def _check_rank(self) -> None:
        if isinstance(self.rank, str):
            if not self.rank.startswith(_ENERGY) or self.energy_share is None:
                raise OptionError(f'rank={self.rank!r}: give a whole number, a list, or "energy:0.2" (a share up to 1)')
        elif isinstance(self.rank, Sequence):
            if not self.rank or len(set(self.rank)) < len(self.rank):
                raise OptionError(f"rank={list(self.rank)!r}: give different ranks, at least one")
            for rank in self.rank:
                _require_integer("rank", rank, least=1)
            object.__setattr__(self, "rank", tuple(self.rank))
            if self.rank_pattern:
                raise OptionError("rank_pattern goes with one rank, not with a list of them")
        else:
            _require_integer("rank", self.rank, least=1)
        for pattern, rank in self.rank_pattern.items():
            _require_integer(f"rank_pattern[{pattern!r}]", rank, least=1)
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"rank_pattern: {pattern!r} is no regular expression ({error})") from error

    def _settle_solver(self, method: Method) -> None:
        if self.solver is None:
            object.__setattr__(self, "solver", method.solvers[0] if method.solvers else "")
        elif method.solvers:
            _require_choice("solver", self.solver, method.solvers, f"for method={self.method!r}")
        elif self.solver != "":
            raise OptionError(f"solver={self.solver!r}: method={self.method!r} solves nothing; leave solver out")

    @property
    def energy_share(self) -> float | None:
        """The share of W's energy to keep, where the rank is to follow from it."""
        if not isinstance(self.rank, str):
            return None
        try:
            share = float(self.rank.removeprefix(_ENERGY))
        except ValueError:
            return None
        return share if 0 < share <= 1 else None

    def ranks_of(self, module: str) -> tuple[int, ...] | None:
        """The ranks that a module is to have; None where its energy decides.

        As in PEFT, a key of rank_pattern is the end of a module's name or a regular expression for it.
        """
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return (rank,)
        if isinstance(self.rank, str):
            return None
        return (self.rank,) if isinstance(self.rank, int) else tuple(self.rank)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.lr, self.step_size, self.gamma, self.loss)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        record = {**asdict(self), "checkpoint_steps": list(self.checkpoint_steps)}
        if isinstance(self.rank, tuple):
            record["rank"] = list(self.rank)
        if self.solver == "adam":
            del record["gauge"], record["start"]
        else:
            for name in _OF_ADAM:
                del record[name]
        return record


def require_count(name: str, value: object) -> None:
    """Raise OptionError unless value is a whole number of at least 1."""
    _require_integer(name, value, least=1)


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r}: give a whole number of at least {least}")


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionError(f"{name}={value!r}: give a number above 0")


def _require_choice(name: str, value: object, choices: tuple[str, ...], more: str = "") -> None:
    if value not in choices:
        raise OptionError(f"{name}={value!r}: choose one of {', '.join(choices)} {more}".rstrip())
