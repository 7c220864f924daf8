"""The matrices of a run before it: read through once, refused if unfit, with all that their starts and names need."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from ..display.progress import ProgressBar
from ..errors import WeightError
from ..kernels.streaming import strips


@dataclass(frozen=True)
class Source:
    """One matrix W (d×k) to factorize and how to get it; see Target and Factors for the fields."""

    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    sha256: Callable[[], str]
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Surveyed:
    """A source that was read through once: fit to be factorized, with its hash and standard deviation."""

    source: Source
    sha256: str
    std: float


def survey(sources: Sequence[Source], bar: ProgressBar) -> list[Surveyed]:
    """Read every matrix once, before any long work, and refuse what cannot be factorized. Raises WeightError."""
    bar.phase("reading", len(sources), len(sources))
    surveyed = []
    for source in sources:
        std = _deviation(source.read(), source.module)
        surveyed.append(Surveyed(source, source.sha256(), std))
        bar.advance(1, matrices=1)
    return surveyed


def _deviation(W: Tensor, module: str) -> float:
    """W's unbiased standard deviation, a strip at a time."""
    sums, squares = [], []
    for rows in strips(W):
        strip = W[rows]
        low, high = (float(bound) for bound in torch.aminmax(strip))
        largest = max(abs(low), abs(high))
        if not largest < float("inf"):
            _refuse(W, module)
        # float32 row sums are good to 1e-7; squares of very large or small entries leave its range.
        strip = strip.to(torch.float32 if strip.dtype != torch.float64 and 1e-12 < largest < 1e15 else torch.float64)
        sums.append(float(strip.sum(dim=1).double().sum()))
        squares.append(float(torch.linalg.vector_norm(strip, dim=1).double().square().sum()))
    count, total, square = W.numel(), fsum(sums), fsum(squares)
    variance = max(0.0, square - total**2 / count) / max(1, count - 1)
    # A constant matrix has no deviation, and a start of zeros would stay there: its root mean square stands in. What
    # rounding leaves of a constant's variance counts as none.
    return float(variance**0.5 if variance > 1e-12 * square / count else (square / count) ** 0.5)


def _refuse(W: Tensor, module: str) -> None:
    where = (~torch.isfinite(W)).nonzero()
    raise WeightError(
        f"{module}: {len(where)} of its {W.numel()} entries are NaN or Inf, the first at "
        f"{tuple(where[0].tolist())}; the checkpoint is damaged or was saved after a diverged run"
    )


def start_stds(surveyed: Sequence[Surveyed], init_std: str | float) -> list[float]:
    """σ̄ of each matrix's start: the mean of the standard deviations of its kind, or of all (paper, Eq. 2)."""
    if not isinstance(init_std, str):
        return [float(init_std)] * len(surveyed)
    kinds = [one.source.kind if init_std == "kind" else "" for one in surveyed]
    means = {
        kind: statistics.fmean(one.std for one, own in zip(surveyed, kinds, strict=True) if own == kind)
        for kind in set(kinds)
    }
    return [means[kind] for kind in kinds]


def random_stream(one: Surveyed, seed: int) -> torch.Generator:
    """A matrix's own random stream, the same wherever in a model, batch or list the matrix stands."""
    text = f"{seed} {one.sha256} {one.source.rows}"
    start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(start)
