"""Tiles that docs/kernels.md weighs and only a GPU can decide on, each next to the one that is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.cost_model import Matrix, choose
from inilora_kernels.kernels.gpu.tiles import StripTile, Tiles, family, tiles
from inilora_kernels.kernels.gpu.waves import divide

from .gpu_timing import duration, replayed, wave_of
from .harness import Row

RANK = 8
# By family and bytes of an entry, at rank 8: small enough for two on a multiprocessor, or 256 bytes of a row at a time;
# on Hopper those that came closest on an H200.
ALTERNATIVES: dict[tuple[str, int], tuple[StripTile, ...]] = {
    ("ampere", 2): (StripTile(128, 128, 4, 1), StripTile(128, 64, 4, 1)),
    ("ampere", 4): (StripTile(64, 64, 4, 1),),
    ("hopper", 2): (StripTile(256, 64, 8, 3), StripTile(512, 64, 8, 3), StripTile(128, 128, 8, 3)),
    ("hopper", 4): (StripTile(128, 64, 4, 3), StripTile(128, 32, 4, 3)),
}
# Matrices of a wave that streams from memory, next to as many as the backend takes: the slots of fewer stay in cache.
STREAMED = 8


def alternatives(backend: TritonBackend, W: Tensor, most: int, window: float) -> Iterator[Row]:
    """A step of a wave of this matrix by the tile that is taken and by the others; and of smaller streamed waves."""
    gpu = backend.gpu()
    shape, itemsize = (W.shape[0], W.shape[1]), W.element_size()
    matrix = Matrix(shape, itemsize, RANK)
    first = divide([matrix] * most, [0] * most, gpu)[0]
    count, parts = len(first.members), choose(matrix, gpu).parts
    taken = tiles(gpu.architecture, itemsize, RANK)

    def timed(chosen: Tiles, parts: int, count: int) -> float:
        """Seconds a step and matrix."""
        wave = wave_of([W] * count, RANK, backend, parts, resident=first.resident, chosen=chosen)
        wave.advance(1)  # Compiled before it is captured.
        return (replayed(wave, backend, window) or duration(lambda: wave.advance(1), backend, window)) / count

    cases = [
        (replace(taken, strip=strip), division, count)
        for strip in (taken.strip, *ALTERNATIVES.get((family(gpu.architecture), itemsize), ()))
        # As many programs as now, and as many parts as now: twice the programs where the rows are half as many.
        for division in sorted({math.ceil(parts * strip.rows / taken.strip.rows), parts})
    ]
    if not first.resident and count > STREAMED:
        cases.append((taken, parts, STREAMED))
    standard = 0.0
    for chosen, division, together in cases:
        strip, seconds = chosen.strip, timed(chosen, division, together)
        standard = standard or seconds
        yield {
            "matrix": f"{together}×{shape[0]}×{shape[1]}",
            "dtype": str(W.dtype),
            "tile": f"{strip.rows}×{strip.columns}, {strip.warps} warps, {strip.stages} stages",
            "parts": division,
            "µs a matrix": 1e6 * seconds,
            "of the taken one's": seconds / standard,
        }
