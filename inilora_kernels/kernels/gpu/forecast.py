"""What a whole run takes on a GPU, predicted: Adam's waves as they will be divided, uploads, losses, and the host.

    Adam:   Σ over waves  steps · a step  +  losses at the milestones  +  what of the next upload is not hidden by that
            +  the first upload  +  the host's part of each wave, milestone and layout
    direct: Σ over batches  passes · (two products + dense algebra)  +  looks  +  the last products in float64
            +  the first upload and what is not hidden of the others

The device's times are the cost model's. Those of the host are counted: launches, copies and synchronizations at what
they cost on a usual processor, or were measured where a constant says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...errors import OptionError
from ..backend import WIDTH
from .cost_model import Matrix, Step, choose, product_rate, reached, wave_step
from .gpus import Gpu
from .gram_layout import BATCH, GramLayout, Wanted, batches, gram_layout_on
from .layout import Layout
from .tiles import padded_rank
from .waves import PlannedWave, divide

# Bytes a second from the page cache into pinned memory by one thread, which PCIe (16 lanes of generation 4: 25e9) can
# follow: an assumption.
HOST_BANDWIDTH = 8e9
# Shares of the peaks outside of the tensor cores that the losses reach, in float32 and float64: measured on an H200.
_REACHED_VECTOR, _REACHED_DOUBLE = 0.12, 0.17
# The device waits for the host: at a milestone, for a launch, two copies and what observes them; for a wave to begin,
# for two copies and three fills; for the graphs of a layout, 222 launches at 55 µs (measured) and three instantiations.
MILESTONE_SECONDS, WAVE_SECONDS, GRAPHS_SECONDS = 1e-4, 2e-4, 1.4e-2
# The direct solver, measured on an H100 with 16 threads: operations of torch in a pass, each so long in a graph; passes
# over the basis that they make; what a batch takes before its first graph; the look at one matrix at a basis of 144
# vectors, with how much longer it takes beside more, of which more threads share the work; the host's part of its end.
_DENSE_CALLS, _CALL_SECONDS, _BASIS_READ = 80, 5e-6, 6
_BATCH_SECONDS, _LOOK_SECONDS, _LOOK_POWER, _FINISH_SECONDS = 1.5e-2, 1e-3, 1.2, 1.5e-3
# Small matrices are decomposed one after the other, through WᵀW.
_SMALL_SECONDS = 2e-2


@dataclass(frozen=True)
class Group:
    """Waves of the same layout. matrices, parts: of one wave. waves: how many. step: of one of them.

    Seconds of all of them: seconds of the steps; losses; copying that no step hides; host: the device waits for it.
    """

    matrices: tuple[Matrix, ...]
    parts: int
    waves: int
    resident: bool
    layout: Layout
    step: Step
    seconds: float
    losses: float
    copying: float
    host: float

    @property
    def matrix(self) -> Matrix:
        """The first of them."""
        return self.matrices[0]

    @property
    def count(self) -> int:
        """Of matrices in all its waves."""
        return self.waves * len(self.matrices)

    @property
    def overhead(self) -> float:
        """All but the steps."""
        return self.losses + self.copying + self.host

    @property
    def shapes(self) -> str:
        """For example "64 × 4096×4096"."""
        counts = {one.shape: self.waves * [m.shape for m in self.matrices].count(one.shape) for one in self.matrices}
        return ", ".join(f"{count} × {d}×{k}" for (d, k), count in counts.items())


@dataclass(frozen=True)
class Plan:
    """The predicted run of a model's matrices on a GPU. memory: peak device bytes, of the largest wave."""

    gpu: Gpu
    steps: int
    groups: tuple[Group, ...]
    memory: int

    @property
    def seconds(self) -> float:
        return sum(group.seconds + group.overhead for group in self.groups)

    @property
    def host(self) -> float:
        """Seconds in which the device waits for the host or a copy."""
        return sum(group.copying + group.host for group in self.groups)

    @property
    def launches(self) -> int:
        return sum(2 * self.steps * group.waves for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(group.waves * group.step.weight_bytes for group in self.groups)


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
    waves = divide(matrices, [matrix.itemsize for matrix in matrices], gpu)
    members = [[matrices[index] for index in wave.members] for wave in waves]
    divided = [[(one, choose(one, gpu).parts) for one in wave] for wave in members]
    models = [wave_step(wave, gpu, planned.resident) for wave, planned in zip(divided, waves, strict=True)]
    milestones = min(steps, 12 + steps // 1000)
    losses = [
        (milestones - 1) * _loss_seconds(wave, gpu, wide=False) + _loss_seconds(wave, gpu, wide=True)
        for wave in members
    ]
    running = [steps * step.seconds + loss for step, loss in zip(models, losses, strict=True)]
    uploads = [wave.weight_bytes / HOST_BANDWIDTH for wave in waves]
    # The first is waited for; each of the others goes on while the wave before steps.
    exposed = [uploads[0], *(max(0.0, upload - before) for before, upload in zip(running, uploads[1:], strict=False))]
    groups: dict[tuple[Layout, int, bool], Group] = {}
    for place, wave in enumerate(waves):
        key = wave.layout, members[place][0].itemsize, wave.resident
        host = milestones * MILESTONE_SECONDS + WAVE_SECONDS + (GRAPHS_SECONDS if key not in groups else 0.0)
        # One copy on the device moves the weights into place.
        host += 2 * wave.weight_bytes / (gpu.dram * reached(gpu).dram)
        known = groups.get(key)
        groups[key] = Group(
            matrices=tuple(members[place]),
            parts=divided[place][0][1],
            waves=1 + (known.waves if known else 0),
            resident=wave.resident,
            layout=wave.layout,
            step=models[place],
            seconds=steps * models[place].seconds + (known.seconds if known else 0.0),
            losses=losses[place] + (known.losses if known else 0.0),
            copying=exposed[place] + (known.copying if known else 0.0),
            host=host + (known.host if known else 0.0),
        )
    return Plan(gpu, steps, tuple(groups.values()), _memory(waves))


def _memory(waves: Sequence[PlannedWave]) -> int:
    """The largest wave, with the next one's weights next to it."""
    largest = max(wave.bytes for wave in waves)
    return largest + (max(wave.weight_bytes for wave in waves) if len(waves) > 1 else 0)


def _loss_seconds(wave: Sequence[Matrix], gpu: Gpu, *, wide: bool) -> float:
    """One launch of the loss kernel: W once from DRAM, 2·r + 8 FLOPs an entry, in float32 or float64."""
    read = sum(math.prod(one.shape) * one.itemsize for one in wave) / (gpu.dram * reached(gpu).dram)
    flops = sum(math.prod(one.shape) * (2.0 * one.rank + 8) for one in wave)
    peak = gpu.double * _REACHED_DOUBLE if wide else gpu.vector * _REACHED_VECTOR
    return max(read, flops / peak) + gpu.launch


@dataclass(frozen=True)
class DirectWork:
    """One matrix for the direct solver: shape, bytes of an element; what it may take and is expected to take.

    rank: the largest wanted. vectors, passes: of krylov_batch.py; 0 vectors: no batch takes it.
    """

    shape: tuple[int, int]
    itemsize: int
    rank: int
    vectors: int
    passes: int


def direct_seconds(works: Sequence[DirectWork], gpu: Gpu, *, factors: bool) -> float:
    """Predicted seconds of the direct solver on a GPU. factors: with those and their loss, not f* alone."""
    taken = [work for work in works if work.vectors]
    small = _SMALL_SECONDS * (len(works) - len(taken))
    wanted = [Wanted(work.shape, work.itemsize, work.rank, work.vectors) for work in taken]
    groups = batches(wanted, [(work.itemsize, work.passes) for work in taken], 0.5 * gpu.memory)
    running, uploads = [], []
    for members in groups:
        batch = [taken[index] for index in members]
        itemsize = batch[0].itemsize
        shapes = [work.shape for work in batch]
        layout = gram_layout_on(gpu, shapes, itemsize)
        passes = batch[0].passes
        dense = _dense_seconds(layout, passes * WIDTH, gpu)
        look = _LOOK_SECONDS * math.pow(passes * WIDTH / 144, _LOOK_POWER)
        looks = _BATCH_SECONDS + len(batch) * look
        finish = sum(_finish_seconds(work, gpu, factors=factors) for work in batch)
        running.append(passes * (pass_seconds(layout, itemsize, gpu) + dense) + finish + looks)
        uploads.append(layout.weights * itemsize / HOST_BANDWIDTH)
    hidden = sum(min(before, upload) for before, (_, upload) in zip(running, pairwise(uploads), strict=False))
    return small + sum(running) + sum(uploads) - hidden


def pass_seconds(layout: GramLayout, itemsize: int, gpu: Gpu) -> float:
    """Both products of a batch, predicted: W from DRAM once or, where a group does not fit the cache, twice."""
    weights = layout.weights * itemsize
    first = weights / (gpu.dram * reached(gpu).dram)
    second = weights / (gpu.cache_bandwidth * reached(gpu).cache) if layout.resident else first
    # Three parts of float32 for 16-bit weights; the float32 peak counts tf32x3's three.
    flops = 2.0 * WIDTH * layout.weights * (3 if itemsize == 2 else 1)
    # As wide as rank 32's, where two halves of a factor make sixteen columns of each product.
    cores = flops / product_rate(gpu, itemsize, 32)
    return max(first, cores) + max(second, cores) + 2 * len(layout.groups) * gpu.launch


def _dense_seconds(layout: GramLayout, vectors: float, gpu: Gpu) -> float:
    """torch's algebra of one pass, in a graph, with room for that many vectors."""
    moved = _BASIS_READ * 4.0 * BATCH * vectors * layout.N + 30 * 8.0 * BATCH * WIDTH * layout.N
    return _DENSE_CALLS * _CALL_SECONDS + moved / (gpu.dram * reached(gpu).dram)


def _finish_seconds(work: DirectWork, gpu: Gpu, *, factors: bool) -> float:
    """WX and WᵀWX, and W − BA where factors are wanted, in float64, from W in float64: written, and read for each."""
    products = 3 if factors else 2
    entries = float(math.prod(work.shape))
    moved = entries * ((2 if factors else 1) * (work.itemsize + 8) + 8 * products)
    flops = products * 2.0 * entries * work.rank
    return _FINISH_SECONDS + max(moved / (gpu.dram * reached(gpu).dram), flops / (gpu.double * 0.5))
