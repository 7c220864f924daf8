"""Whether numba has to compile the kernels first, which takes longer than many a run."""

from __future__ import annotations

from pathlib import Path

from .expansion import expand
from .gram import add_inner_products, add_outer_products
from .search import search


def compiled_before() -> bool:
    """Whether this process or numba's cache has the direct solver's products, for any dtype, from an earlier run.

    >>> isinstance(compiled_before(), bool)
    True
    """
    if search.overloads or expand.overloads:
        return True
    return all(
        # Without a folder that it may write, numba keeps nothing.
        kernel.stats.cache_path and any(Path(kernel.stats.cache_path).glob(f"gram.{kernel.py_func.__name__}-*.nbi"))
        for kernel in (add_inner_products, add_outer_products)
    )
