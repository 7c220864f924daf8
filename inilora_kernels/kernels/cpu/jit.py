"""numba's compiler, cached on disk wherever that is possible."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numba.core import config as numba_config
from numba.core.caching import FunctionCache

from ...places import private_folder

# Zero as an argument: for the literal, numba would compile what is called once more.
ZERO = np.int64(0)


def njit(
    *,
    cache: bool = False,
    nogil: bool = False,
    inline: Literal["never", "always"] = "never",
    fastmath: frozenset[str] = frozenset(),
) -> Callable[[Callable[..., Any]], Any]:
    """numba's njit with a cache that may fail.

    numba keeps its cache next to the module, or in the user's cache folder. In a container neither may be writable, and
    numba would refuse the function; then the cache is in our folder, or there is none.

    fastmath: LLVM's flags of what it may assume of floats.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(nogil=nogil, inline=inline, fastmath=set(fastmath))(function)
        kept = _cache(function) if cache else None
        if kept is not None:
            dispatcher._cache = kept  # as its own enable_caching() does
            if fastmath:
                _TO_LOAD_FIRST.append(dispatcher)
        return dispatcher

    return decorate


class _ForgivingCache(FunctionCache):
    """A cache that costs a compilation, never the run, when its files are damaged or the disk is full.

    numba trusts what it has compiled as long as the function's own file is the same; what that calls is compiled into
    it, too. So here all files of its folder have to be the same: after `git pull` only some are new.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file._source_stamp = _stamps(Path(function.__code__.co_filename).parent)

    def signatures(self, target: Any) -> list[Any]:
        """What was compiled for this machine, as `compile` takes it."""
        with contextlib.suppress(Exception):  # as in load_overload
            return [key[0] for key in self._cache_file._load_index() if key[1] == target]
        return []

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _load_first(self, sig)
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:
            # Unpickling what a power cut left can raise anything; use an empty index instead.
            with contextlib.suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


# Functions whose sums may be taken in any order, so that LLVM's choices decide their last bits. What calls one has a
# copy of it, optimized once more, and runs that copy where the function itself is not there; in the process that
# compiles both it is. So all that was compiled of them is loaded before any other, and later runs have the first one's
# bits.
_TO_LOAD_FIRST: list[Any] = []


def _load_first(cache: Any, signature: Any) -> None:
    """All but what is being loaded: there twice, numba would ask at each call which of the two is meant."""
    # At once, as each of them comes by here, too.
    waiting = _TO_LOAD_FIRST.copy()
    _TO_LOAD_FIRST.clear()
    for dispatcher in waiting:
        for known in dispatcher._cache.signatures(dispatcher.targetctx.codegen().magic_tuple()):
            if dispatcher._cache is not cache or known != signature:
                dispatcher.compile(known)


@functools.cache
def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    found = ((file.name, file.stat()) for file in sorted(folder.glob("*.py")))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _cache(function: Callable[..., Any]) -> FunctionCache | None:
    cache: Any = _ForgivingCache
    settings: Any = numba_config
    with contextlib.suppress(RuntimeError):
        return cache(function)  # type: ignore[no-any-return]
    folder = private_folder("numba")
    if folder is None:
        return None
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(folder)
    try:
        return cache(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return None
    finally:
        settings.CACHE_DIR = before
