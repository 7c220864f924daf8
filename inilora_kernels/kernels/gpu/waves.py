"""Which matrices step together: pure arithmetic, the same for the backend that runs them and for the prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...errors import BackendError
from .cost_model import WAVE_MATRICES, Choice, Matrix, choose
from .gpus import Gpu
from .layout import Layout, lay_out, weight_bytes
from .tiles import padded_rank, tiles


@dataclass(frozen=True)
class PlannedWave:
    """members: indices into the batch. resident: whether W stays in the cache. bytes: on the device, with weights."""

    members: tuple[int, ...]
    resident: bool
    layout: Layout
    weight_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.layout.state_bytes + self.layout.work_bytes


@dataclass(frozen=True)
class _Member:
    """cached: the share of the cache that it needs."""

    index: int
    choice: Choice
    cached: float
    bytes: int

    def share(self, resident: bool) -> float:
        """Of a full wave."""
        return max(self.cached if resident else 0.0, 1 / WAVE_MATRICES)


def divide(
    matrices: Sequence[Matrix], kinds: Sequence[Hashable], gpu: Gpu, memory: float = float("inf")
) -> list[PlannedWave]:
    """The waves of a batch, in the order in which they run: larger shapes first.

    Matrices of one kind (the weights' dtype) and padded rank share waves, whatever their shapes; those that stay in the
    cache and those that stream are kept apart, unless all fit the cache.
    Waves that stay in the cache fill its usable share; none has more than WAVE_MATRICES matrices or more than `memory`
    bytes. Waves are filled evenly: 24 matrices of which 22 would fit run as 12 and 12.
    Raises BackendError for a matrix that does not fit by itself.
    """
    groups: dict[tuple[object, ...], list[_Member]] = defaultdict(list)
    order = sorted(range(len(matrices)), key=lambda i: (padded_rank(matrices[i].rank), matrices[i].shape, i))
    for index in reversed(order):
        matrix = matrices[index]
        choice = choose(matrix, gpu)
        alone = _planned([index], [choice.parts], matrices, choice.resident, gpu)
        if alone.bytes > memory:
            raise BackendError(
                f"{gpu.name} has {memory / 1e9:.3g} GB free, but matrix {index} of the batch, "
                f"{matrix.shape[0]}×{matrix.shape[1]} at rank {matrix.rank}, needs {alone.bytes / 1e9:.3g} GB; free "
                'some device memory, or take backend="cpu"'
            )
        cached = (alone.weight_bytes + alone.layout.state_bytes) / (gpu.cache * gpu.cache_usable)
        groups[kinds[index], padded_rank(matrix.rank)].append(_Member(index, choice, cached, alone.bytes))
    waves = []
    for together in groups.values():
        if len(together) <= WAVE_MATRICES and sum(member.cached for member in together) <= 1:
            places = [(True, together)]
        else:
            places = [(at, [one for one in together if one.choice.resident == at]) for at in (True, False)]
        for resident, members in places:
            if not members:
                continue
            count = len(_filled(members, 1.0, memory, resident))
            even = sum(member.share(resident) for member in members) / count
            for wave in _filled(members, even, memory, resident):
                indices, parts = [member.index for member in wave], [member.choice.parts for member in wave]
                waves.append(_planned(indices, parts, matrices, resident, gpu))
    return waves


def _filled(members: Sequence[_Member], target: float, memory: float, resident: bool) -> list[list[_Member]]:
    """The members in order, a wave being closed once it has reached `target` or the next one would not fit."""
    waves: list[list[_Member]] = []
    share, size = 2.0, 0
    for member in members:
        more = member.share(resident)
        if share >= target - 1e-9 or share + more > 1 + 1e-9 or size + member.bytes > memory:
            waves.append([])
            share, size = 0.0, 0
        waves[-1].append(member)
        share, size = share + more, size + member.bytes
    return waves


def _planned(
    indices: Sequence[int], parts: Sequence[int], matrices: Sequence[Matrix], resident: bool, gpu: Gpu
) -> PlannedWave:
    members = [matrices[index] for index in indices]
    itemsize = members[0].itemsize
    chosen = tiles(gpu.architecture, itemsize, max(matrix.rank for matrix in members))
    layout = lay_out([matrix.shape for matrix in members], [matrix.rank for matrix in members], parts, chosen)
    weights = sum(weight_bytes(matrix.shape, itemsize) for matrix in members)
    return PlannedWave(tuple(indices), resident, layout, weights)
