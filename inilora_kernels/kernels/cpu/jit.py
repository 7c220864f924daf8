"""numba's compiler, cached on disk wherever that is possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import numba
from numba.core import config as numba_config
from numba.core.caching import FunctionCache

from ...places import private_folder


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
        return dispatcher

    return decorate


class _ForgivingCache(FunctionCache):
    """A cache that costs a compilation, never the run, when its files are damaged or the disk is full."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
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
