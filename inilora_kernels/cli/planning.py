"""What `inilora plan` shows: each solver's time and memory, on this machine and on GPUs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import estimate
from ..display.sentences import duration_in_words, size_in_words
from ..errors import OptionError
from ..estimate import Work
from ..kernels.cpu.cost_model import speed_of_torch_mm
from ..kernels.gpu.cost_model import Matrix, Plan, json_plan, plan_table
from ..kernels.gpu.cost_model import plan as predict
from ..kernels.gpu.gpus import Gpu
from ..model.checkpoint import open_checkpoint
from ..model.targets import find_targets, tensors_of
from ..processes import shares
from .output import print_table

_SOLVERS = {
    "adam": "the paper's trajectory",
    "krylov": "the same product BA, certified",
    "exact": "the same, by full SVDs",
}


@dataclass(frozen=True)
class _OnCards:
    """An Adam run on GPUs of one kind. seconds: of each process. first: the plan of the process with the most work."""

    seconds: tuple[float, ...]
    first: Plan

    @property
    def name(self) -> str:
        return self.first.gpu.name if len(self.seconds) == 1 else f"{len(self.seconds)} × {self.first.gpu.name}"


def show_plan(
    model: Path,
    asked: list[str] | str | None,
    rank: int,
    steps: int,
    card: Gpu | None,
    gpus: int,
    *,
    kernels: bool,
    as_json: bool,
) -> None:
    """Print the plan of a model's run as a table, or as JSON.

    asked: target_modules. gpus: how many of `card`. kernels: the table of the launches instead.
    """
    targets = find_targets(open_checkpoint(model, choose=tensors_of(asked)), asked)
    smallest = min(targets, key=lambda target: min(target.shape))
    if rank > min(smallest.shape):
        raise OptionError(f"rank={rank}: {smallest.module} can have {min(smallest.shape)} at most")
    works = [Work(target.shape, target.dtype.itemsize, rank) for target in targets]
    dealt = shares(estimate.costs([[work] for work in works], "adam", steps, card), gpus)
    parts = [[works[place] for place in part] for part in dealt if part]
    speed = speed_of_torch_mm()
    on_cards = None if card is None else _on_cards(parts, steps, speed, card)
    if as_json:
        print(json.dumps(_json(works, steps, speed, on_cards), indent=2))
    elif kernels and on_cards is not None:
        print_table(plan_table(on_cards.first))
    else:
        print_table(_table(works, steps, speed, on_cards))


def _on_cards(parts: Sequence[Sequence[Work]], steps: int, speed: float, card: Gpu) -> _OnCards:
    # The processes on one machine, eight at most, share its processor.
    each = speed / min(len(parts), 8)
    taken = tuple(estimate.seconds(part, "adam", steps, speed=each, card=card) for part in parts)
    most = parts[taken.index(max(taken))]
    # The backend reads float64 weights as float32.
    return _OnCards(taken, predict([Matrix(one.shape, min(4, one.itemsize), one.rank) for one in most], card, steps))


def _table(works: Sequence[Work], steps: int, speed: float, on_cards: _OnCards | None) -> Table:
    count = f"{len(works)} {'matrix' if len(works) == 1 else 'matrices'}"
    caption = f"An estimate, from this processor's {speed / 1e9:.0f} GFLOP/s in torch.mm."
    if on_cards is not None and len(on_cards.seconds) > 1:
        busy = statistics.fmean(on_cards.seconds) / max(on_cards.seconds)
        caption += f"\n{len(on_cards.seconds)} processes, one a GPU, busy {busy:.0%} of the time of the longest."
    table = Table(title=f"Predicted for {count} at rank {works[0].rank}", caption=caption, min_width=80)
    table.add_column("--solver")
    table.add_column("finds", ratio=1)
    table.add_column("here", justify="right", no_wrap=True)
    if on_cards is not None:
        table.add_column(on_cards.name, justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for solver, finds in _SOLVERS.items():
        here = estimate.seconds(works, solver, steps, speed=speed)
        row = [solver, f"{finds}, {steps:,} steps" if solver == "adam" else finds, duration_in_words(here)]
        memory = size_in_words(estimate.memory(works))
        if on_cards is not None:
            row.append(duration_in_words(max(on_cards.seconds)) if solver == "adam" else "")
            memory += f" + {size_in_words(on_cards.first.memory)}" if solver == "adam" else ""
        table.add_row(*row, memory)
    return table


def _json(works: Sequence[Work], steps: int, speed: float, on_cards: _OnCards | None) -> dict[str, Any]:
    return {
        "predicted": True,
        "matrices": len(works),
        "rank": works[0].rank,
        "steps": steps,
        "torch_mm_flops": speed,
        "seconds": {solver: estimate.seconds(works, solver, steps, speed=speed) for solver in _SOLVERS},
        "memory": estimate.memory(works),
        "seconds_by_gpu": None if on_cards is None else list(on_cards.seconds),
        "gpu": None if on_cards is None else json_plan(on_cards.first),
    }
