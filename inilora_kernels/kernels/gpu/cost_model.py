"""A cost model of the GPU kernels: bytes, FLOPs and launches a step, and the time they predict. No autotuning.

It chooses what the tiles leave open: into how many parts a matrix's columns are divided, and how many matrices step
together. Matrices whose working set fits the last-level cache go in small waves, each run to its end before the next,
so that W comes from DRAM once and from the cache in every later step. Both choices depend on a matrix's shape, dtype,
rank and the GPU alone, never on its neighbours, so that a result has the same bits in any batch.

    products:  max( bytes / bandwidth, FLOPs / peak ) / share of the multiprocessors that have work  +  launch
    Adam:      bytes / bandwidth  +  launch
    run:       steps · (products + Adam)  +  weights to the device  +  the loss at each milestone

Predictions are predictions: the share of a peak that a kernel reaches (`REACHED`) is an assumption until measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import OptionError
from .gpus import Gpu
from .layout import Layout, lay_out, weight_bytes
from .tiles import padded_rank, tiles

# Shares of the peaks below that the model counts on: streaming DRAM, streaming the cache, small tensor-core tiles.
REACHED_DRAM = 0.90
REACHED_CACHE = 0.70
REACHED_TENSOR = 0.60
# Partial sums written may not exceed this share of W's bytes where the columns are divided.
PARTIAL_SHARE = 0.15
CONCURRENCY = 64
# Bytes a second from the page cache through pageable memory to the device, and of DRAM an entry that the float64 loss
# of a milestone moves (residual out and in thrice, W once): assumptions, small beside the steps.
HOST_BANDWIDTH = 8e9
LOSS_BYTES = 52


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


@dataclass(frozen=True)
class Group:
    """Equal matrices of a model: how they are run, and one wave's step.

    seconds: of all steps. overhead: of bringing the weights to the device and of the losses at the milestones.
    """

    matrix: Matrix
    count: int
    parts: int
    wave: int
    resident: bool
    step: Step
    seconds: float
    overhead: float

    @property
    def waves(self) -> int:
        return math.ceil(self.count / self.wave)


@dataclass(frozen=True)
class Plan:
    """The predicted run of a model's matrices on a GPU. memory: peak device bytes, of the largest wave."""

    gpu: Gpu
    steps: int
    groups: tuple[Group, ...]

    @property
    def seconds(self) -> float:
        return sum(group.seconds + group.overhead for group in self.groups)

    @property
    def launches(self) -> int:
        return sum(2 * self.steps * group.waves for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(group.count * _weight_bytes(group.matrix) for group in self.groups)

    @property
    def memory(self) -> int:
        return max(
            min(group.wave, group.count)
            * (_weight_bytes(group.matrix) + layout_of(group.matrix, self.gpu, group.parts).state_bytes)
            for group in self.groups
        )


def _weight_bytes(matrix: Matrix) -> int:
    return weight_bytes(matrix.shape, matrix.itemsize)


def layout_of(matrix: Matrix, gpu: Gpu, parts: int) -> Layout:
    """The layout of one such matrix on this GPU, its columns divided into `parts`."""
    chosen = tiles(gpu.architecture, matrix.itemsize, matrix.rank)
    return lay_out([matrix.shape], [matrix.rank], [parts], chosen)


def _slot_bytes(matrix: Matrix, gpu: Gpu, parts: int) -> int:
    """P slots, one a strip of rows, and Q slots, one a part of the columns, all float32."""
    return 4 * layout_of(matrix, gpu, parts).slots


def step_of(matrix: Matrix, gpu: Gpu, parts: int, count: int, resident: bool) -> Step:
    """The model of one step of `count` matrices like `matrix`, columns in `parts`, W in the cache or not."""
    d, k = matrix.shape
    layout = layout_of(matrix, gpu, parts)
    chosen, (place,) = layout.tiles, layout.places
    weights, partial = _weight_bytes(matrix), 4 * layout.slots
    # Every strip reads A anew and every part reads B anew: from the cache, as both are small.
    factors_read = 4 * matrix.rank * (place.strips * k + place.chunks * d)
    gram = 4 * chosen.rank**2 * (place.A_blocks + place.B_blocks)
    state = 4 * 6 * matrix.rank * (d + k) + 2 * gram + gram
    # 16-bit: two products, high and low halves. float32: the peak already counts tf32x3's three.
    flops = 4.0 * d * k * chosen.rank * (2 if matrix.itemsize == 2 else 1)
    peak = gpu.half if matrix.itemsize == 2 else gpu.float32

    programs = count * layout.strip_programs
    rounds = math.ceil(programs / gpu.multiprocessors)
    busy = programs / (rounds * gpu.multiprocessors)
    cache = gpu.cache_bandwidth * REACHED_CACHE
    dram = cache if resident else gpu.dram * REACHED_DRAM
    times = {
        "cache": count * (weights + partial + factors_read) / cache / busy,
        "tensor cores": count * flops / (peak * REACHED_TENSOR) / busy,
    }
    if not resident:
        # A batch beyond the cache also streams its partial sums out and in.
        times["DRAM"] = count * (weights + partial) / dram
    bound = max(times, key=lambda name: times[name])
    return Step(
        matrices=count,
        weight_bytes=count * weights,
        partial_bytes=count * partial,
        state_bytes=count * state,
        flops=count * flops,
        products=times[bound] + gpu.launch,
        adam=count * (partial + state) / dram + gpu.launch,
        bound=bound,
    )


def _parts(matrix: Matrix, gpu: Gpu, count: int, resident: bool) -> int:
    """The division of the columns that predicts the shortest step, with partial sums under PARTIAL_SHARE."""
    least, columns = 1, tiles(gpu.architecture, matrix.itemsize, matrix.rank).strip.columns
    best = step_of(matrix, gpu, 1, count, resident).seconds
    for parts in range(2, min(64, math.ceil(matrix.shape[1] / (2 * columns))) + 1):
        if _slot_bytes(matrix, gpu, parts) > PARTIAL_SHARE * _weight_bytes(matrix):
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


def choose(matrix: Matrix, gpu: Gpu) -> Choice:
    """Waves in the cache where a matrix and its state fit and the model predicts a gain; else all at once.

    >>> from inilora_kernels.kernels.gpu.gpus import GPUS
    >>> choose(Matrix((768, 768), 2, 8), GPUS["rtx4090"]).resident
    True
    """
    streamed_parts = _parts(matrix, gpu, 8, resident=False)
    streamed = Choice(streamed_parts, CONCURRENCY, resident=False)
    working = _weight_bytes(matrix) + layout_of(matrix, gpu, 1).state_bytes
    wave = min(CONCURRENCY, int(gpu.cache * gpu.cache_usable // working))
    if wave == 0:
        return streamed
    parts = _parts(matrix, gpu, wave, resident=True)
    in_cache = step_of(matrix, gpu, parts, wave, resident=True).seconds / wave
    at_once = step_of(matrix, gpu, streamed_parts, CONCURRENCY, resident=False).seconds / CONCURRENCY
    return Choice(parts, wave, resident=True) if in_cache < at_once else streamed


def even_wave(count: int, most: int) -> int:
    """The wave size, at most `most`, that divides `count` matrices most evenly over the fewest waves.

    >>> even_wave(24, 22), even_wave(56, 64)
    (12, 56)
    """
    return math.ceil(count / math.ceil(count / most))


def plan(matrices: Sequence[Matrix], gpu: Gpu, steps: int) -> Plan:
    """Predict the run of these matrices. Raises OptionError for none, or a rank or dtype the kernels do not take.

    >>> from inilora_kernels.kernels.gpu.gpus import gpu_named
    >>> small = plan([Matrix((768, 768), 4, 8)] * 24, gpu_named("rtx4090"), steps=20_000)
    >>> small.groups[0].count, small.launches
    (24, 80000)
    """
    if not matrices:
        raise OptionError("plan: no matrix was given")
    for matrix in matrices:
        if matrix.itemsize not in (2, 4) or not padded_rank(matrix.rank):
            raise OptionError(
                f"plan: {matrix} is outside the kernels' range; weights are float32, float16 or bfloat16, rank ≤ 128"
            )
    groups = []
    for matrix in dict.fromkeys(matrices):
        count = matrices.count(matrix)
        choice = choose(matrix, gpu)
        wave = even_wave(count, choice.wave)
        step = step_of(matrix, gpu, choice.parts, wave, choice.resident)
        full, rest = divmod(count, wave)
        seconds = full * steps * step.seconds
        if rest:
            seconds += steps * step_of(matrix, gpu, choice.parts, rest, choice.resident).seconds
        milestones = 12 + steps // 1000
        overhead = count * (
            _weight_bytes(matrix) / HOST_BANDWIDTH
            + milestones * math.prod(matrix.shape) * LOSS_BYTES / (gpu.dram * REACHED_DRAM)
        )
        groups.append(Group(matrix, count, choice.parts, wave, choice.resident, step, seconds, overhead))
    return Plan(gpu, steps, tuple(groups))
