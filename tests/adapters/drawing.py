"""The runs from which docs/compatibility.md is drawn, as commands make them."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import transformers


class Titled(Protocol):
    @property
    def title(self) -> str: ...


Entry = TypeVar("Entry", bound=Titled)
Result = TypeVar("Result")


def runs(entries: Sequence[Entry], run: Callable[[Entry, Path], Result]) -> Iterator[tuple[Entry, Result]]:
    """Each entry with its result, in an empty folder; of entries whose title has a word of the command line, if any."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for entry in entries:
        if len(sys.argv) > 1 and not any(part in entry.title for part in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield entry, run(entry, Path(folder))
