"""The flags of the commands: one for each field of options.py, with its meaning, and those that several commands share.

What a command needs for its work is imported when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import OptionError
from ..model.location import located
from ..options import ModelOptions, meaning
from ..places import file_to_write, given_path

if TYPE_CHECKING:
    from ..factor_set import FactorSet

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", parser=located, help="A model's folder, a weight file, or its hub id (org/name@revision)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of the table.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=file_to_write,
        help="Draw error by layer, spectra and convergence into this .png, .svg or .pdf.",
    ),
]
Every = Annotated[bool, typer.Option("--all", help="A row for each matrix, not for each kind.")]
FactorFile = Annotated[
    Path,
    typer.Argument(
        metavar="FACTORS",
        parser=given_path,
        help="A factor file, or a folder of the authors' {module}.weight.pt files.",
    ),
]

_Command = TypeVar("_Command", bound=Callable[..., None])


# Of approximate_model's options, those that say which matrices of which model.
CHOOSING = ("target_modules", "target_parameters", "revision", "token")


def with_options(command: _Command, only: Collection[str] | None = None) -> _Command:
    """Give a command a flag for each of approximate_model's options; it receives them as keywords, as typed.

    only: the names of those that it takes; None for all.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    chosen = [one for one in fields(ModelOptions) if "meaning" in one.metadata and (only is None or one.name in only)]
    flags = [_flag(one) for one in chosen]
    named = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*named, *flags])  # type: ignore[attr-defined]
    return command


def options_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """approximate_model's keywords from the flags that `with_options` added. Raises OptionError or FactorFileError."""
    return {name: _SPELLED[name].read(value) if name in _SPELLED else value for name, value in given.items()}


def _flag(one: Field[Any]) -> inspect.Parameter:
    spelled = _SPELLED.get(one.name)
    kind: Any = spelled.kind if spelled is not None else _PLAIN[one.name] if one.name in _PLAIN else type(one.default)
    help_text = meaning(one).removesuffix(f" Default: {one.default!r}.") + (spelled.more if spelled is not None else "")
    declarations = [f"--{one.name.replace('_', '-')}"]
    if one.name == "target_modules":
        declarations.append("-t")
    if kind is bool:
        help_text = help_text.partition(" Default:")[0]
        declarations = [f"{declarations[0]}/--no-{one.name}"]
    own: dict[str, Any] = {"parser": spelled.parser, "metavar": "PATH"} if spelled and spelled.parser else {}
    default = spelled.default if spelled is not None else one.default if kind is not bool else True
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*declarations, help=help_text, **own)],
    )


class _Spelled:
    """How a flag is written: its type on the command line, its default there, and how to read a value from its text."""

    def __init__(
        self,
        kind: Any,
        default: Any,
        read: Callable[[Any], Any],
        more: str = "",
        parser: Callable[[str], Any] | None = None,
    ) -> None:
        self.kind, self.default, self.read, self.more, self.parser = kind, default, read, more, parser


def _rank(text: str) -> int | str | list[int]:
    """8, energy:0.2 (kept as text) or 8,16,32; anything else is refused later."""
    try:
        ranks = [int(one) for one in text.split(",")]
    except ValueError:
        return text
    return ranks if "," in text else ranks[0]


def _rank_pattern(given: list[str] | None) -> dict[str, int]:
    pattern = {}
    for one in given or []:
        name, _, rank = one.rpartition("=")
        if not name or not rank.isdecimal():
            raise OptionError(f"--rank-pattern {one}: give PATTERN=RANK, for example value=4")
        pattern[name] = int(rank)
    return pattern


def target_modules_from(given: list[str] | None) -> list[str] | str | None:
    """Plain names, separated by commas, are suffixes; anything else is a regular expression, as in PEFT."""
    if given and len(given) == 1:
        names = given[0].split(",")
        if given[0] == "all-linear" or not all(re.fullmatch(r"[\w.]+", name) for name in names):
            return given[0]
        return names
    return given or None


def _number_or_name(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _factors(path: Path | None) -> FactorSet | None:
    from ..factor_set import FactorSet

    return None if path is None else FactorSet.load(path)


_PLAIN: Mapping[str, Any] = {
    "solver": str | None,
    "tol": float | None,
    "device": str | None,
    "revision": str | None,
    "token": str | None,
    "cache": bool,
    "progress": bool,
}
_RANK = str(next(one.default for one in fields(ModelOptions) if one.name == "rank"))
_SPELLED: Mapping[str, _Spelled] = {
    "rank": _Spelled(str, _RANK, _rank, " 8,16,32: a file for each, from the same passes over W."),
    "rank_pattern": _Spelled(list[str] | None, None, _rank_pattern, " PATTERN=RANK; repeat for more."),
    "start": _Spelled(Path | None, None, _factors, parser=given_path),
    "init_std": _Spelled(str | None, None, _number_or_name),
    "checkpoint_steps": _Spelled(list[int] | None, None, lambda steps: tuple(steps or ()), " Repeat for more."),
    "target_modules": _Spelled(
        list[str] | None,
        None,
        target_modules_from,
        " Repeat for more names, or separate them by commas; anything else is a regular expression.",
    ),
    "target_parameters": _Spelled(list[str] | None, None, lambda names: names or None, " Repeat for more."),
}
