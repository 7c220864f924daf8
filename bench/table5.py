"""The paper's Table 5: time and memory to factorize the query and value matrices of six models, 20,000 Adam steps each.

    python -m bench.table5                     every row: measured here, and predicted for an RTX 4090
    python -m bench.table5 --predict           the predictions alone; what was measured stays on record
    python -m bench.table5 --models LLaMA2-7B --checkpoint PATH

On a GPU ours runs in full, and the paper's way, which takes minutes to an hour a row, for fewer steps. Without a GPU
both run fewer steps of fewer matrices. Each row says what was run and whether its totals are extrapolated. The results
are results/table5.json, .md and .png: a part for the predictions and a part for the measurements, each with its commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from inilora_kernels.kernels.gpu.gpus import GPUS
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .harness import RESULTS, Row, in_own_process, publish, save_figure
from .six_models import (
    CONCURRENCY,
    MODELS,
    PREDICTED_ON,
    RANK,
    STEPS,
    WAYS,
    Loaders,
    Measured,
    Model,
    measure,
    predicted,
)


def checkpoint_loaders(checkpoint: Path) -> Loaders:
    """Every query and value matrix of a real model."""
    return [(target.shape, target.dtype, target.read) for target in find_targets(open_checkpoint(checkpoint))]


def predicted_row(model: Model) -> Row:
    """The paper's figures next to the cost model's."""
    forecast = predicted(model)
    return {
        "model": model.name,
        "matrices": len(model.shapes),
        "dtype": model.dtype,
        "paper min": model.minutes,
        "paper GB": model.gigabytes,
        "predicted min": forecast.seconds / 60,
        "predicted GB": forecast.memory / 1e9,
        "paper / predicted": model.minutes * 60 / forecast.seconds,
    }


def measured_row(model: Model, measured: Mapping[str, Measured]) -> Row:
    """What both ways took here."""
    found: Row = {"model": model.name, "matrices": len(model.shapes)}
    for way, one in measured.items():
        found |= {
            f"{way} min": one.minutes,
            f"{way} GB": one.peak_bytes / 1e9,
            f"{way} extrapolated": one.extrapolated,
            f"{way} run": f"{one.matrices} matrices × {one.steps:,} steps in {one.seconds:.3g} s",
        }
    found["ratio"] = measured["paper's way"].minutes / measured["ours"].minutes
    return found


def record(folder: Path) -> dict[str, Any]:
    """What results/table5.json holds: its parts by name."""
    file = folder / "table5.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def krylov_minutes(folder: Path) -> dict[str, float]:
    """Minutes of the Krylov solver for each model, as `python -m bench.solvers table5` last measured them."""
    file = folder / "solvers.json"
    if not file.exists():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8")).get("table5", {}).get("rows", [])
    return {one["model"]: one["krylov s"] / 60 for one in recorded if one["measured"] == one["matrices"]}


def draw(forecasts: Sequence[Row], rows: Sequence[Row], here: str, krylov: Mapping[str, float]) -> Figure:
    """Minutes a row on logarithmic axes: what was measured on the left, what is only predicted on the right."""
    by_model: dict[str, Row] = {one["model"]: one for one in rows}
    partly = "" if not any(one.get(f"{way} extrapolated") for one in rows for way in WAYS) else ", extrapolated"

    def minutes(way: str) -> list[float | None]:
        return [by_model.get(one["model"], {}).get(f"{way} min") for one in forecasts]

    paper = [one["paper min"] for one in forecasts]
    measured = {
        "paper's Adam, RTX 4090 (its Table 5)": paper,
        f"paper's way, {here}{partly}": minutes("paper's way"),
        f"our Adam, {here}{partly}": minutes("ours"),
        f"our Krylov, {here}, same product": [krylov.get(one["model"]) for one in forecasts],
    }
    predicted = {
        "paper's Adam, RTX 4090 (its Table 5)": paper,
        "our Adam, RTX 4090, predicted": [one["predicted min"] for one in forecasts],
    }
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    _bars(left, forecasts, {label: values for label, values in measured.items() if any(values)}, "Measured")
    _bars(right, forecasts, predicted, "Predicted by the cost model; nobody has run it")
    left.set_ylabel("minutes for all query and value matrices")
    return figure


def _bars(axes: Axes, rows: Sequence[Row], series: Mapping[str, Sequence[float | None]], title: str) -> None:
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        at = [index + (place - (len(series) - 1) / 2) * width for index in range(len(rows))]
        color, hatch = ("C1", "//") if "predicted" in label else (f"C{(0, 3, 2, 4)[place]}", None)
        bars = axes.bar(at, [value or 0 for value in values], width, label=label, hatch=hatch, alpha=0.85, color=color)
        labels = [f"{value:,.0f}" if value and value >= 10 else f"{value:.2g}" if value else "" for value in values]
        axes.bar_label(bars, labels, fontsize=6.5, rotation=90, padding=2)
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(rows)), [one["model"].replace(" ", "\n").replace("-", "\n") for one in rows], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table5", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS], help="measure only these rows")
    parser.add_argument("--checkpoint", type=Path, help="real weights for the one row that --models names")
    parser.add_argument("--steps", type=int, help="steps to run instead of the default, both ways")
    parser.add_argument("--predict", action="store_true", help="measure nothing; what was measured stays on record")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.checkpoint is not None and len(given.models or ()) != 1:
        parser.error("--checkpoint needs the one row that it belongs to: --models NAME")
    if given.worker:
        name, way = given.worker
        model = next(model for model in MODELS if model.name == name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrices = None if given.checkpoint is None else checkpoint_loaders(given.checkpoint)
        print(json.dumps(asdict(measure(model, way, device, matrices=matrices, steps=given.steps))))
        return
    chosen = [model for model in MODELS if not given.models or model.name in given.models]
    forecasts = [predicted_row(model) for model in MODELS]
    note = (
        f"By the cost model, for an {GPUS[PREDICTED_ON].name}: rank {RANK}, {STEPS:,} steps, concurrency {CONCURRENCY}."
    )
    publish("table5", "predicted", forecasts, "python -m bench.table5 --predict", note=note, folder=given.output)
    if not given.predict:
        options = ["--checkpoint", str(given.checkpoint)] if given.checkpoint else []
        options += ["--steps", str(given.steps)] if given.steps else []
        measured: dict[str, dict[str, Measured]] = {model.name: {} for model in chosen}
        work = [(model.name, way) for model in chosen for way in WAYS]
        for name, way in track(work, "measuring", console=Console(stderr=True)):
            measured[name][way] = Measured(**in_own_process("bench.table5", "--worker", name, way, *options))
        note = (
            f"Rank {RANK}, {STEPS:,} steps, concurrency {CONCURRENCY}. Minutes are for the whole row; where they are "
            "extrapolated, the run that they are extrapolated from is given."
        )
        rows = [measured_row(model, measured[model.name]) for model in chosen]
        publish("table5", "measured", rows, "make bench-table5", note=note, folder=given.output)
    on_record = record(given.output).get("measured")
    where = on_record["machine"].get("gpu", "this CPU") if on_record else ""
    rows = on_record["rows"] if on_record else []
    save_figure("table5", draw(forecasts, rows, where, krylov_minutes(RESULTS)), given.output)


if __name__ == "__main__":
    main()
