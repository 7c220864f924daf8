"""The options that decide a result, checked before any work; they are the factor file's `options`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .errors import OptionError
from .kernels import Schedule

LOSSES = ("mse", "frobenius")
SOLVERS = ("adam",)
METHODS = ("inilora",)


@dataclass(frozen=True)
class Options:
    """Everything but the weights that a result depends on; see `approximate_model` for each one's meaning."""

    rank: int
    method: str
    solver: str
    steps: int
    lr: float
    step_size: int
    gamma: float
    loss: str
    init_std: str | float
    tol: float | None
    checkpoint_steps: tuple[int, ...]
    backend: str
    seed: int

    def __post_init__(self) -> None:
        _require_integer("rank", self.rank, least=1)
        _require_integer("steps", self.steps, least=0)
        _require_integer("step_size", self.step_size, least=1)
        _require_integer("seed", self.seed, least=0)
        _require_choice("loss", self.loss, LOSSES)
        _require_choice("method", self.method, METHODS)
        _require_choice("solver", self.solver, SOLVERS)
        _require_positive("lr", self.lr)
        _require_positive("gamma", self.gamma)
        if self.tol is not None:
            _require_positive("tol", self.tol)
        if isinstance(self.init_std, str):
            _require_choice("init_std", self.init_std, ("kind", "global"), "or a number above 0")
        else:
            _require_positive("init_std", self.init_std)
        for step in self.checkpoint_steps:
            _require_integer("checkpoint_steps", step, least=0)
            if step > self.steps:
                raise OptionError(f"checkpoint_steps has {step}, but the run ends at steps={self.steps}")

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.lr, self.step_size, self.gamma, self.loss)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "checkpoint_steps": list(self.checkpoint_steps)}


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
