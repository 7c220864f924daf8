"""Kernels with a fault, which the tests must find."""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def planted(kernel: Callable[..., Any], right: str, wrong: str, count: int = 1) -> InterpretedFunction:
    """The kernel with one piece of its source replaced."""
    function = kernel.fn  # type: ignore[attr-defined]
    source = inspect.getsource(function)
    source = source[source.index("def ") :]
    assert source.count(right) >= 1, right
    source = source.replace(right, wrong, count)
    name = f"<planted {wrong}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(sys.modules[function.__module__].__dict__)
    exec(compile(source, name, "exec"), namespace)
    return InterpretedFunction(namespace[function.__name__])
