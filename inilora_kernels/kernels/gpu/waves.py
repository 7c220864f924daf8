"""Which matrices step together: pure arithmetic, the same for the backend that runs them and for the prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...errors import BackendError
from .cost_model import WAVE_MATRICES, Choice, Matrix, choose, wave_step
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
    cache and those that stream are kept apart, unless all fit the cache, or streaming all is predicted to be faster.
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
                f"{gpu.name} has {memory / 1e9:.3g} GB free, but a {matrix.shape[0]}×{matrix.shape[1]} matrix at rank "
                f"{matrix.rank} needs {alone.bytes / 1e9:.3g} GB; free "
                'some device memory, or take backend="cpu"'
            )
        cached = (alone.weight_bytes + alone.layout.state_bytes) / (gpu.cache * gpu.cache_usable)
        groups[kinds[index], padded_rank(matrix.rank)].append(_Member(index, choice, cached, alone.bytes))
    waves = []
    for together in groups.values():
        # The division of the columns stays, and with it the bits; only who steps with whom is decided here.
        ways = [_divided(together, memory, cached=cached) for cached in (True, False)]
        for resident, wave in min(ways, key=lambda way: _step_seconds(way, matrices, gpu)):
            indices, parts = [member.index for member in wave], [member.choice.parts for member in wave]
            waves.append(_planned(indices, parts, matrices, resident, gpu))
    return waves


def _divided(members: Sequence[_Member], memory: float, *, cached: bool) -> list[tuple[bool, list[_Member]]]:
    """Even waves, and whether each stays in the cache. cached: for those that may; otherwise all stream."""
    if not cached:
        places = [(False, list(members))]
    elif len(members) <= WAVE_MATRICES and sum(member.cached for member in members) <= 1:
        places = [(True, list(members))]
    else:
        places = [(at, [one for one in members if one.choice.resident == at]) for at in (True, False)]
    waves = []
    for resident, together in places:
        if together:
            count = len(_filled(together, 1.0, memory, resident))
            even = sum(member.share(resident) for member in together) / count
            waves += [(resident, wave) for wave in _filled(together, even, memory, resident)]
    return waves


def _step_seconds(waves: Sequence[tuple[bool, list[_Member]]], matrices: Sequence[Matrix], gpu: Gpu) -> float:
    """Predicted, of one step of each wave."""
    return sum(
        wave_step([(matrices[member.index], member.choice.parts) for member in wave], gpu, resident).seconds
        for resident, wave in waves
    )


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
