"""One pass over every matrix before the work: unfit ones are refused; hash, deviation and energy are taken."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..display.progress import ProgressBar
from ..errors import WeightError
from ..kernels.threads import at_once, in_groups, meanwhile, one_torch_thread, side_by_side
from ..memory import reused
from .files.tensor import size_of, tensor_sha256
from .hashes import Hashed, hash_in_lanes, in_lanes
from .targets import Target

if TYPE_CHECKING:
    from ..kernels.cpu.moments import Moments

_FLOAT32 = torch.finfo(torch.float32)
# A random start of the same deviation may reach 6 times as far.
_LARGEST = _FLOAT32.max / 16
# The sha256 of a matrix, or a call that waits for it.
Hash = str | Callable[[], str]
# Of a matrix in memory for each thread that surveys: what two threads may hold in any case.
_BYTES_A_THREAD = 32 << 20
# The hash of so many bytes takes less than a millisecond.
_SHORT = 1 << 20


@dataclass(frozen=True)
class Surveyed:
    """Of one matrix W: its sha256, its unbiased standard deviation and ||W||_F²."""

    hash: Hash
    std: float
    energy: float


def survey(targets: Sequence[Target], bar: ProgressBar, *, in_memory: bool = False) -> list[Surveyed]:
    """What is known of every matrix before any long work; each is read once.

    in_memory: the matrices stay as they are, so that the hash of one that is small, or has all threads to itself, need
        not be waited for.

    Raises WeightError for a matrix that cannot be factorized.
    """
    # Brings numba, which is there then for what may do without.
    from ..kernels.cpu.moments import moments

    bar.phase("reading", len(targets), len(targets))
    threads = torch.get_num_threads()
    found = _in_lanes(targets, threads, bar)
    targets, every = [target for target in targets if target.module not in found], targets

    def surveyed(target: Target) -> None:
        W = target.read()
        # A matrix that has all threads to itself has another one for its hash, which takes longer than the rest.
        with one_torch_thread() as alone:
            hashed = meanwhile(partial(tensor_sha256, W) if target.hashes_values else target.sha256, alone)
            std, energy = _deviation_and_energy(moments(W), target, lambda: W)
        # What is known does not hold W. Where several are surveyed at once, this is the time for all but short hashes.
        later = in_memory and (alone > 1 or W.nbytes <= _SHORT)
        found[target.module] = Surveyed(hashed if later else hashed(), std, energy)

    with reused(len(targets)):
        for count, group in in_groups(targets, lambda target: surveyed_together(target, threads)):
            with closing(side_by_side(surveyed, group, count)) as results:
                for _ in results:
                    bar.advance(1, matrices=1)
    return [found[target.module] for target in every]


def _in_lanes(targets: Sequence[Target], threads: int, bar: ProgressBar) -> dict[str, Surveyed]:
    """What is known of those that are hashed together: each is read, measured and hashed a block at a time."""
    from ..kernels.cpu.moments import NOTHING, moments

    measured: dict[str, tuple[float, float]] = {}
    found: dict[str, Surveyed] = {}
    lock = threading.Lock()

    def parts(target: Target, blocks: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
        so_far = NOTHING
        for block in blocks():
            so_far = moments(block, so_far)
            yield block
        measured[target.module] = _deviation_and_energy(so_far, target, target.read)

    def finished(module: str, sha256: str) -> None:
        with lock:
            found[module] = Surveyed(sha256, *measured[module])
            bar.advance(1, matrices=1)

    items = [
        Hashed(target.module, size_of(target.shape, target.dtype), partial(parts, target, target.blocks))
        for target in targets
        if target.blocks is not None
    ]
    if lanes := in_lanes(items, threads):
        hash_in_lanes(items, lanes, threads, finished)
    return found


def together(target: Target, threads: int) -> int:
    """How many matrices of this one's size should be in work at once; see `at_once`."""
    return at_once(math.prod(target.shape), target.dtype.itemsize, threads)


def surveyed_together(target: Target, threads: int) -> int:
    """How many matrices of this one's size to survey at once.

    More than `together` where there are many threads, as next to a GPU: one matrix's hash is one thread's work.
    """
    held = size_of(target.shape, target.dtype)
    return max(together(target, threads), min(threads, threads * _BYTES_A_THREAD // held))


def _deviation_and_energy(found: Moments, target: Target, read: Callable[[], Tensor]) -> tuple[float, float]:
    """W's unbiased standard deviation, and ||W||_F². Raises WeightError for entries that factors cannot stand for."""
    module = target.module
    if not math.isfinite(found.largest):
        _refuse(read(), module)
    if found.largest > _LARGEST:
        raise WeightError(
            f"{module}: an entry of {found.largest:.3g} leaves no room in float32, in which factors are stored; divide "
            f"the weights by a number first"
        )
    if 0 < found.largest < _FLOAT32.tiny:
        raise WeightError(
            f"{module}: its largest entry, {found.largest:.3g}, is too small for float32, in which factors are stored; "
            f"multiply the weights by a number first"
        )
    count, square = math.prod(target.shape), found.squares
    variance = max(0.0, square - found.total**2 / count) / max(1, count - 1)
    # A constant matrix has no deviation, and Adam would never leave a start of zeros: its root mean square stands in.
    # Whatever variance rounding leaves of a constant counts as none.
    return (variance if variance > 1e-12 * square / count else square / count) ** 0.5, square


def _refuse(W: Tensor, module: str) -> None:
    where = (~torch.isfinite(W)).nonzero()
    if not len(where):
        raise WeightError(f"{module}: an entry was NaN or Inf and is no longer; do not write to it during a run")
    raise WeightError(
        f"{module}: {len(where)} of its {W.numel()} entries are NaN or Inf, the first at "
        f"{tuple(where[0].tolist())}; the checkpoint is damaged or was saved after a diverged run"
    )


def start_stds(targets: Sequence[Target], stds: Sequence[float], init_std: str | float) -> list[float]:
    """σ̄ for each matrix's start: the mean standard deviation of its kind, or of all matrices (paper, Eq. 2)."""
    if not isinstance(init_std, str):
        return [float(init_std)] * len(targets)
    kinds = [target.kind if init_std == "kind" else "" for target in targets]
    by_kind: dict[str, list[float]] = {}
    for kind, std in zip(kinds, stds, strict=True):
        by_kind.setdefault(kind, []).append(std)
    means = {kind: statistics.fmean(its_stds) for kind, its_stds in by_kind.items()}
    return [means[kind] for kind in kinds]
