"""What `inilora plan` shows: each solver's time and memory, on this machine and on GPUs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from .. import estimate
from ..display.sentences import duration_in_words, size_in_words
from ..errors import OptionError
from ..estimate import Work
from ..kernels.cpu.cost_model import Machine, this_machine
from ..kernels.gpu.forecast import Plan
from ..kernels.gpu.forecast import plan as predict
from ..kernels.gpu.gpus import Gpu
from ..model.checkpoint import open_checkpoint
from ..model.targets import find_targets, tensors_of
from ..options import ModelOptions, steps_of
from ..processes import shares
from .output import print_table

_SOLVERS = {
    "adam": "the paper's trajectory",
    "krylov": "the same product BA, certified",
    "exact": "the same, by full SVDs",
}


@dataclass(frozen=True)
class _OnCards:
    """A run on GPUs of one kind. seconds, direct: of each process, by Adam and by the direct solver.

    first: the plan of the process with the most work.
    """

    seconds: tuple[float, ...]
    direct: tuple[float, ...]
    first: Plan

    @property
    def name(self) -> str:
        return self.first.gpu.name if len(self.seconds) == 1 else f"{len(self.seconds)} × {self.first.gpu.name}"


def show_plan(
    model: Path,
    asked: ModelOptions,
    steps: int,
    card: Gpu | None,
    gpus: int,
    *,
    kernels: bool,
    as_json: bool,
) -> None:
    """Print the plan of a model's run as a table, or as JSON.

    asked: the one rank, and which matrices of the model. gpus: how many of `card`. kernels: the table of the launches
    instead.
    """
    modules, parameters, rank = asked.target_modules, asked.target_parameters, cast(int, asked.rank)
    checkpoint = open_checkpoint(model, asked.revision, asked.token, tensors_of(modules, parameters))
    targets = find_targets(checkpoint, modules, lambda module: rank, parameters)
    smallest = min(targets, key=lambda target: min(target.shape))
    if rank > min(smallest.shape):
        raise OptionError(f"rank={rank}: {smallest.module} can have {min(smallest.shape)} at most")
    works = [Work(target.shape, target.dtype.itemsize, rank) for target in targets]
    # A GPU more than there are matrices has nothing to do.
    dealt = shares(estimate.costs([[work] for work in works], "adam", steps, card), min(gpus, len(works)))
    parts = [[works[place] for place in part] for part in dealt if part]
    machine = this_machine()
    on_cards = None if card is None else _on_cards(parts, steps, machine, card)
    if as_json:
        print(json.dumps(_json(works, steps, machine, on_cards), indent=2))
    elif kernels and on_cards is not None:
        print_table(_kernels_table(on_cards.first))
    else:
        print_table(_table(works, steps, machine, on_cards))


def _on_cards(parts: Sequence[Sequence[Work]], steps: int, machine: Machine, card: Gpu) -> _OnCards:
    # The processes on one machine, eight at most, share its processor.
    each = machine.shared_by(min(len(parts), 8))
    taken, direct = (
        tuple(estimate.seconds(part, solver, steps, machine=each, card=card) for part in parts)
        for solver in ("adam", "krylov")
    )
    most = parts[taken.index(max(taken))]
    return _OnCards(taken, direct, predict([work.on_card() for work in most], card, steps))


def _table(works: Sequence[Work], steps: int, machine: Machine, on_cards: _OnCards | None) -> Table:
    count = f"{len(works)} {'matrix' if len(works) == 1 else 'matrices'}"
    caption = f"An estimate, from this processor's {machine.flops / 1e9:.0f} GFLOP/s in torch.mm."
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
        own = steps_of(solver, steps)
        here = estimate.seconds(works, solver, own, machine=machine)
        row = [solver, f"{finds}, {own:,} steps" if own else finds, duration_in_words(here)]
        memory = size_in_words(estimate.memory(works))
        if on_cards is not None:
            taken = {"adam": on_cards.seconds, "krylov": on_cards.direct}.get(solver)
            row.append(duration_in_words(max(taken)) if taken else "")
            memory += f"\n+ {size_in_words(on_cards.first.memory)}" if own else ""
        table.add_row(*row, memory)
    return table


def _json(works: Sequence[Work], steps: int, machine: Machine, on_cards: _OnCards | None) -> dict[str, Any]:
    return {
        "predicted": True,
        "matrices": len(works),
        "rank": works[0].rank,
        "steps": steps,
        "torch_mm_flops": machine.flops,
        "seconds": {
            solver: estimate.seconds(works, solver, steps_of(solver, steps), machine=machine) for solver in _SOLVERS
        },
        "memory": estimate.memory(works),
        "seconds_by_gpu": None if on_cards is None else list(on_cards.seconds),
        "direct_seconds_by_gpu": None if on_cards is None else list(on_cards.direct),
        "gpu": None if on_cards is None else _kernels_json(on_cards.first),
    }


def _kernels_json(result: Plan) -> dict[str, Any]:
    """The plan as JSON values: what `_kernels_table` shows, in bytes, FLOPs and seconds."""
    return {
        "gpu": result.gpu.name,
        "predicted": True,
        "steps": result.steps,
        "seconds": result.seconds,
        "host_seconds": result.host,
        "launches": result.launches,
        "weight_bytes": result.weight_bytes,
        "memory": result.memory,
        "groups": [
            {
                "shape": list(group.matrix.shape),
                "shapes": group.shapes,
                "bits": 8 * group.matrix.itemsize,
                "rank": group.matrix.rank,
                "count": group.count,
                "wave": group.step.matrices,
                "waves": group.waves,
                "in_cache": group.resident,
                "parts": group.parts,
                "step": {
                    "weight_bytes": group.step.weight_bytes,
                    "partial_bytes": group.step.partial_bytes,
                    "state_bytes": group.step.state_bytes,
                    "flops": group.step.flops,
                    "products_seconds": group.step.products,
                    "adam_seconds": group.step.adam,
                    "bound": group.step.bound,
                },
                "seconds": group.seconds,
                "losses_seconds": group.losses,
                "copying_seconds": group.copying,
                "host_seconds": group.host,
                "overhead_seconds": group.overhead,
            }
            for group in result.groups
        ],
    }


def _kernels_table(result: Plan) -> Table:
    """The plan for `inilora plan --kernels`: a column for each group of equal matrices. Every number is predicted."""
    table = Table(
        title=f"Predicted on {result.gpu.name}: {result.seconds:.1f} s for {result.steps:,} steps\n"
        f"{result.launches:,} launches, {result.memory / 1e9:.2f} GB on the device",
        caption="Predicted by the cost model, not measured.\nPartial sums are written once and read once a step.",
    )
    table.add_column("matrices")
    rows: dict[str, list[str]] = {}
    for group in result.groups:
        step = group.step
        table.add_column(group.shapes, justify="right")
        cells = {
            "weights": f"{8 * group.matrix.itemsize}-bit, rank {group.matrix.rank}",
            "a wave": f"{step.matrices}, {'in cache' if group.resident else 'from DRAM'}",
            "waves": f"{group.waves}",
            "strips × parts": f"{group.layout.places[0].strips} × {group.parts}",
            "W read a step": f"{step.weight_bytes / 1e6:.1f} MB",
            "partial sums": f"{step.partial_bytes / 1e6:.1f} MB, {step.partial_bytes / step.weight_bytes:.1%}",
            "products a step": f"{step.flops / 1e9:.2f} GFLOP",
            "1st launch": f"{step.products * 1e6:.1f} µs",
            "2nd launch": f"{step.adam * 1e6:.1f} µs",
            "bound by": step.bound,
            "all steps": f"{group.seconds:.1f} s",
            "losses": f"{group.losses:.2f} s",
            "uploads not hidden": f"{group.copying:.2f} s",
            "waiting for the host": f"{group.host:.2f} s",
        }
        for label, cell in cells.items():
            rows.setdefault(label, []).append(cell)
    for label, row in rows.items():
        table.add_row(label, *row)
    return table
