"""A cost model of the GPU kernels: bytes, FLOPs and launches a step, and the time they predict. No autotuning.

It chooses what the tiles leave open: into how many parts a matrix's columns are divided, and how many matrices step
together. Matrices whose working set fits the last-level cache go in small waves, each run to its end before the next,
so that W comes from DRAM once and from the cache in every later step. Both choices depend on a matrix's shape, dtype,
rank and the GPU alone, never on its neighbours, so that a result has the same bits in any batch.

    products:  max( bytes / bandwidth, FLOPs / peak ) / share of the multiprocessors that have work  +  launch
    Adam:      bytes / bandwidth  +  launch

`forecast.py` makes a whole run of steps.

What share of a peak a kernel reaches was measured on an H200; for other architectures it is an assumption (`Reached`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .gpus import Gpu
from .layout import Layout, lay_out, weight_bytes
from .tiles import RANKS, family, tiles


@dataclass(frozen=True)
class Reached:
    """Shares of the peaks that the kernels reach: streaming DRAM, streaming the cache, the products.

    half, float32: products of 16-bit weights, with both halves of a factor, at their peak, and of float32 weights at a
    third of tf32's; by compiled rank.
    """

    dram: float
    cache: float
    half: tuple[tuple[int, float], ...]
    float32: tuple[tuple[int, float], ...]

    def products(self, itemsize: int, rank: int) -> float:
        return dict(self.half if itemsize == 2 else self.float32)[rank]


_ASSUMED = Reached(0.90, 0.70, *(2 * [tuple((rank, 0.60) for rank in RANKS)]))
# bench/results/gpu-NVIDIA-H200.json: 4096² bfloat16 and 1024² float32, 64 in a step. A float32 matrix must be taken
# apart into tf32's parts and turned for its second product, whatever the rank.
_MEASURED = {
    "hopper": Reached(
        dram=0.83,
        cache=0.80,
        half=((8, 0.28), (16, 0.28), (32, 0.27), (64, 0.28), (128, 0.22)),
        float32=((8, 0.09), (16, 0.14), (32, 0.24), (64, 0.18), (128, 0.12)),
    )
}


def reached(gpu: Gpu) -> Reached:
    """What is known of this GPU's architecture."""
    return _MEASURED.get(family(gpu.architecture), _ASSUMED)


def product_rate(gpu: Gpu, itemsize: int, rank: int) -> float:
    """FLOP a second of products with weights of `itemsize` bytes an entry, at a compiled rank."""
    return (gpu.half if itemsize == 2 else gpu.float32) * reached(gpu).products(itemsize, rank)


# Partial sums written may not exceed this share of W's bytes where the columns are divided.
PARTIAL_SHARE = 0.15
# But not of a matrix smaller than this, in bytes, whose step waits for launches and idle multiprocessors. It is divided
# for a wave of as many as a small model has, not for a full one, which would be busy without.
SMALL_BYTES, SMALL_WAVE = 2**20, 12
# Matrices of a wave at most, whatever a run has in memory: at 64 the launches' own time no longer counts.
WAVE_MATRICES = 64


@dataclass(frozen=True)
class Matrix:
    """What the model needs of a matrix W (d×k): its shape, bytes an element (2 or 4), and the rank."""

    shape: tuple[int, int]
    itemsize: int
    rank: int


@dataclass(frozen=True)
class Step:
    """One step of `matrices` equal matrices: bytes, FLOPs and predicted seconds of the two launches.

    partial_bytes: P and Q shares written (they are read once more by the Adam launch).
    bound: what the products wait for: "DRAM", "cache" or "tensor cores".
    """

    matrices: int
    weight_bytes: int
    partial_bytes: int
    state_bytes: int
    flops: float
    products: float
    adam: float
    bound: str

    @property
    def seconds(self) -> float:
        return self.products + self.adam


def _weight_bytes(matrix: Matrix) -> int:
    return weight_bytes(matrix.shape, matrix.itemsize)


def layout_of(matrix: Matrix, gpu: Gpu, parts: int) -> Layout:
    """The layout of one such matrix on this GPU, its columns divided into `parts`."""
    chosen = tiles(gpu.architecture, matrix.itemsize, matrix.rank)
    return lay_out([matrix.shape], [matrix.rank], [parts], chosen)


def _slot_bytes(matrix: Matrix, gpu: Gpu, parts: int) -> int:
    """P slots, one a strip of rows, and Q slots, one a part of the columns, all float32."""
    return 4 * layout_of(matrix, gpu, parts).slots


@dataclass(frozen=True)
class _Cost:
    """What one matrix adds to a step."""

    weights: int
    partial: int
    factors_read: int
    state: int
    flops: float
    programs: int


@lru_cache(maxsize=4096)
def _cost(matrix: Matrix, gpu: Gpu, parts: int) -> _Cost:
    d, k = matrix.shape
    layout = layout_of(matrix, gpu, parts)
    chosen, (place,) = layout.tiles, layout.places
    gram = 4 * chosen.rank**2 * (place.A_blocks + place.B_blocks)
    return _Cost(
        weights=_weight_bytes(matrix),
        partial=4 * layout.slots,
        # Every strip reads A again and every part reads B again: from the cache, as both are small.
        factors_read=4 * matrix.rank * (place.strips * k + place.chunks * d),
        state=4 * 6 * matrix.rank * (d + k) + 2 * gram + gram,
        # 16-bit: two products, high and low halves. float32: the peak already counts tf32x3's three.
        flops=4.0 * d * k * chosen.rank * (2 if matrix.itemsize == 2 else 1),
        programs=layout.strip_programs,
    )


def step_of(matrix: Matrix, gpu: Gpu, parts: int, count: int, resident: bool) -> Step:
    """The model of one step of `count` matrices like `matrix`, columns in `parts`, W in the cache or not."""
    return wave_step([(matrix, parts)] * count, gpu, resident)


def wave_step(members: Sequence[tuple[Matrix, int]], gpu: Gpu, resident: bool) -> Step:
    """The model of one step of a wave: matrices of one dtype, each with its number of parts."""
    itemsize = members[0][0].itemsize
    kinds = Counter(members)
    costs = [(count, _cost(matrix, gpu, parts)) for (matrix, parts), count in kinds.items()]
    weights = sum(count * one.weights for count, one in costs)
    partial = sum(count * one.partial for count, one in costs)
    factors_read = sum(count * one.factors_read for count, one in costs)
    state = sum(count * one.state for count, one in costs)
    flops = sum(count * one.flops for count, one in costs)
    programs = sum(count * one.programs for count, one in costs)
    share = reached(gpu)
    rank = tiles(gpu.architecture, itemsize, members[0][0].rank).rank

    rounds = math.ceil(programs / gpu.multiprocessors)
    busy = programs / (rounds * gpu.multiprocessors)
    cache = gpu.cache_bandwidth * share.cache
    dram = cache if resident else gpu.dram * share.dram
    times = {
        "cache": (weights + partial + factors_read) / cache / busy,
        "tensor cores": flops / product_rate(gpu, itemsize, rank) / busy,
    }
    if not resident:
        # A batch beyond the cache also streams its partial sums out and in.
        times["DRAM"] = (weights + partial) / dram
    bound = max(times, key=lambda name: times[name])
    return Step(
        matrices=len(members),
        weight_bytes=weights,
        partial_bytes=partial,
        state_bytes=state,
        flops=flops,
        products=times[bound] + gpu.launch,
        adam=(partial + state) / dram + gpu.launch,
        bound=bound,
    )


def _parts(matrix: Matrix, gpu: Gpu, count: int, resident: bool) -> int:
    """The division of the columns that predicts the shortest step, with partial sums under PARTIAL_SHARE."""
    least, columns = 1, tiles(gpu.architecture, matrix.itemsize, matrix.rank).strip.columns
    small = _weight_bytes(matrix) < SMALL_BYTES
    count = SMALL_WAVE if small else count
    most = math.ceil(matrix.shape[1] / (columns if small else 2 * columns))
    best = step_of(matrix, gpu, 1, count, resident).seconds
    for parts in range(2, min(64, most) + 1):
        if not small and _slot_bytes(matrix, gpu, parts) > PARTIAL_SHARE * _weight_bytes(matrix):
            break
        seconds = step_of(matrix, gpu, parts, count, resident).seconds
        if seconds < 0.99 * best:
            least, best = parts, seconds
    return least


@dataclass(frozen=True)
class Choice:
    """How matrices of one kind run. wave: how many step together; resident: whether a wave lives in the cache."""

    parts: int
    wave: int
    resident: bool


@lru_cache(maxsize=4096)
def choose(matrix: Matrix, gpu: Gpu) -> Choice:
    """Waves in the cache where a matrix and its state fit and the model predicts a gain; else all at once.

    >>> from inilora_kernels.kernels.gpu.gpus import GPUS
    >>> choose(Matrix((768, 768), 2, 8), GPUS["rtx4090"]).resident
    True
    """
    streamed_parts = _parts(matrix, gpu, 8, resident=False)
    streamed = Choice(streamed_parts, WAVE_MATRICES, resident=False)
    working = _weight_bytes(matrix) + layout_of(matrix, gpu, 1).state_bytes
    wave = min(WAVE_MATRICES, int(gpu.cache * gpu.cache_usable // working))
    if wave == 0:
        return streamed
    parts = _parts(matrix, gpu, wave, resident=True)
    in_cache = step_of(matrix, gpu, parts, wave, resident=True).seconds / wave
    at_once = step_of(matrix, gpu, streamed_parts, WAVE_MATRICES, resident=False).seconds / WAVE_MATRICES
    return Choice(parts, wave, resident=True) if in_cache < at_once else streamed
