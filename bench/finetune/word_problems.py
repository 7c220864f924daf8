"""Worked arithmetic word problems without end: the GSM-Symbolic templates of reasoning-gym 0.1.25 (Apache-2.0).

85 of its 100 templates are sound; each makes any number of problems, with names and numbers drawn anew and every
step of the answer written out. 70 templates are for training and validation, 15 are held out for the test.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "word-problems"
HELD_OUT = 15
# The package's own list of templates whose problems or answers are wrong.
_UNSOUND = frozenset({32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98})

Generator = Callable[[random.Random], dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A question, its answer step by step up to "#### number", and the template that both are from."""

    template: int
    question: str
    worked: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer: "


def split() -> tuple[list[int], list[int]]:
    """The templates for training and validation, and the held-out ones; always the same.

    >>> [len(part) for part in split()]
    [70, 15]
    """
    sound = [number for number in range(100) if number not in _UNSOUND]
    held_out = sorted(random.Random("held out").sample(sound, HELD_OUT))
    return [number for number in sound if number not in held_out], held_out


def problems(part: str, size: int) -> list[Problem]:
    """The first problems of "train", "validation" or "test", as many of each of the part's templates."""
    return list(islice(_problems(part), size))


def _problems(part: str) -> Iterator[Problem]:
    training, held_out = split()
    templates = list(held_out if part == "test" else training)
    random.Random(part).shuffle(templates)
    generators = _generators()
    for turn in count():
        for template in templates:
            made = generators[template](random.Random(f"{part} {template} {turn}"))
            yield Problem(template, made["question"], made["metadata"]["answer_cot"])


@lru_cache
def _generators() -> dict[int, Generator]:
    """By the template's number. The package itself is not imported: it wants libraries that these two files do not."""
    spec = find_spec("reasoning_gym")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{NAME}: pip install --no-deps reasoning-gym==0.1.25")
    root = Path(spec.submodule_search_locations[0])
    imported = sys.modules.get("reasoning_gym")
    # The files take two functions from reasoning_gym.utils, which is found through this.
    bare = ModuleType("reasoning_gym")
    bare.__path__ = [str(root)]
    sys.modules["reasoning_gym"] = imported or bare
    found: dict[int, Generator] = {}
    try:
        for name in ("generators_00_49", "generators_50_99"):
            file = spec_from_file_location(f"gsm_symbolic_{name}", root / "arithmetic" / "gsm_symbolic" / f"{name}.py")
            assert file is not None
            assert file.loader is not None
            module = module_from_spec(file)
            file.loader.exec_module(module)
            generators = {key: value for key, value in vars(module).items() if key.startswith("generate_")}
            found.update((int(key.removeprefix("generate_")), value) for key, value in generators.items())
    finally:
        if imported is None:
            del sys.modules["reasoning_gym"]
    return found
