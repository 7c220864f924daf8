"""Copies between arrays in compiled code. For target[...] = source numba compiles the message of a wrong shape, too,
with all of its strings: a tenth of what the first run on a machine waits for. Nothing is checked here."""

from __future__ import annotations

from typing import Any

from .jit import njit


@njit(cache=True, nogil=True)
def copy_row(source: Any, target: Any) -> None:
    """target (n) becomes the first n of source."""
    for i in range(len(target)):
        target[i] = source[i]


@njit(cache=True, nogil=True)
def copy_rows(source: Any, target: Any) -> None:
    """target (m×n) becomes source's first m rows and n columns."""
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = source[i, j]
