"""The paper's Table 5: time and memory to factorize the query and value matrices of six models, 20,000 Adam steps each.

    python -m bench.table5                     every row: measured here, and predicted for an RTX 4090
    python -m bench.table5 --models LLaMA2-7B --checkpoint PATH

On a GPU ours runs in full, and the paper's way, which takes minutes to an hour a row, for fewer steps. Without a GPU
both run fewer steps of fewer matrices. Each row says what was run and whether its totals are extrapolated. The results
are results/table5.json, .md and .png.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from inilora_kernels.kernels.backend import Batch, Problem, Schedule
from inilora_kernels.kernels.gpu.cost_model import Matrix
from inilora_kernels.kernels.gpu.forecast import Plan, plan
from inilora_kernels.kernels.gpu.gpus import GPUS
from inilora_kernels.kernels.loading import load_backend
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .harness import RESULTS, PeakMemory, Row, in_own_process, machine, publish, seconds
from .paper_way import PaperWay

RANK, STEPS, CONCURRENCY = 8, 20_000, 64
PREDICTED_ON = "rtx4090"
WAYS = ("ours", "paper's way")
# Without a GPU, by the number of W's entries: matrices, steps of ours and steps of the paper's way, some 10 s in all.
CPU_SAMPLE = ((2**20 + 1, (12, 1000, 20)), (2**24 + 1, (2, 300, 6)), (2**31, (2, 200, 4)))
GPU_PAPER_STEPS = 200
# Synthetic matrices that differ; a row with more repeats them, as its time does not depend on their entries.
DISTINCT = 16


@dataclass(frozen=True)
class Model:
    """A row of Table 5. query, value: (out_features, in_features). minutes, gigabytes: the paper's."""

    name: str
    layers: int
    query: tuple[int, int]
    value: tuple[int, int]
    dtype: str
    minutes: float
    gigabytes: float

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [self.query, self.value] * self.layers

    @property
    def weight_bytes(self) -> int:
        itemsize = getattr(torch, self.dtype).itemsize
        return sum(d * k * itemsize for d, k in self.shapes)


# Shapes by the models' own config.json; the dtype is the published checkpoint's (bfloat16 stands for float16 too).
MODELS = (
    Model("RoBERTa Base", layers=12, query=(768, 768), value=(768, 768), dtype="float32", minutes=2.0, gigabytes=0.8),
    Model(
        "RoBERTa Large", layers=24, query=(1024, 1024), value=(1024, 1024), dtype="float32", minutes=4.1, gigabytes=1.3
    ),
    Model(
        "LLaMA2-7B", layers=32, query=(4096, 4096), value=(4096, 4096), dtype="bfloat16", minutes=25.8, gigabytes=16.2
    ),
    Model(
        "Gemma-7B", layers=28, query=(4096, 3072), value=(4096, 3072), dtype="bfloat16", minutes=18.2, gigabytes=12.4
    ),
    Model(
        "LLaMA3-8B", layers=32, query=(4096, 4096), value=(1024, 4096), dtype="bfloat16", minutes=15.7, gigabytes=10.9
    ),
    Model(
        "LLaMA2-13B", layers=40, query=(5120, 5120), value=(5120, 5120), dtype="bfloat16", minutes=54.6, gigabytes=24.4
    ),
)


def predicted(model: Model, gpu: str = PREDICTED_ON, steps: int = STEPS) -> Plan:
    """The cost model's view of the row."""
    itemsize = getattr(torch, model.dtype).itemsize
    return plan([Matrix(shape, itemsize, RANK) for shape in model.shapes], GPUS[gpu], steps)


@functools.lru_cache(maxsize=DISTINCT)
def synthetic(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """A matrix with a trained one's kind of spectrum: a broad bulk, and directions above it that fall off slowly."""
    generator = torch.Generator().manual_seed(seed)
    d, k = shape
    # 0.02·(√d + √k) is where the bulk ends.
    scale = 4 * 0.02 * (d**0.5 + k**0.5) * torch.arange(1, 65).float().rsqrt()
    left, right = (torch.randn(side, 64, generator=generator) / side**0.5 for side in shape)
    return torch.addmm(torch.randn(shape, generator=generator) * 0.02, left * scale, right.T).to(dtype)


Loaders = list[tuple[tuple[int, int], torch.dtype, Callable[[], Tensor]]]


def loaders(model: Model, checkpoint: Path | None) -> Loaders:
    """Shape and reader of every query and value matrix: of the checkpoint, or synthetic ones."""
    if checkpoint is None:
        dtype = getattr(torch, model.dtype)
        return [
            (shape, dtype, partial(synthetic, shape, dtype, place % DISTINCT))
            for place, shape in enumerate(model.shapes)
        ]
    opened = open_checkpoint(checkpoint)
    return [(target.shape, target.dtype, target.read) for target in find_targets(opened)]


def run_ours(matrices: Loaders, steps: int, device: str) -> float:
    """Seconds for `steps` steps of all matrices, CONCURRENCY of them at a time, with their loading."""
    backend = load_backend("auto", device if device != "cpu" else None)
    schedule = Schedule(steps, 5e-4, 5_000, 0.9, "mse")
    batches = []
    for first in range(0, len(matrices), CONCURRENCY):
        problems = []
        for seed, (shape, dtype, load) in enumerate(matrices[first : first + CONCURRENCY]):
            generator = torch.Generator().manual_seed(seed)
            A = torch.randn(RANK, shape[1], generator=generator) * 0.02
            B = torch.randn(shape[0], RANK, generator=generator) * 0.02
            problems.append(Problem(load, shape, dtype, A, B))
        batches.append(Batch(problems, schedule, [steps]))

    def run() -> None:
        for batch in batches:
            backend.adam(batch)

    return seconds(run, device)


def run_paper_way(matrices: Loaders, steps: int, device: str) -> float:
    """The same for the paper's way: every W as float32 on the device, a torch autograd loop a layer."""
    weights = [load().to(device, torch.float32) for *_, load in matrices[:CONCURRENCY]]
    peer = PaperWay(weights, RANK, fused=device != "cpu")
    peer.steps(1)
    return seconds(lambda: peer.steps(steps), device) * len(matrices) / len(weights)


@dataclass(frozen=True)
class Measured:
    """What was run, and the minutes of the whole row that follow from it, extrapolated unless all of it was run.

    peak_bytes: of device memory on a GPU; without one, what the run adds to the process, and the weights.
    """

    matrices: int
    steps: int
    seconds: float
    minutes: float
    extrapolated: bool
    peak_bytes: int


def measure(model: Model, way: str, device: str, checkpoint: Path | None, steps: int | None) -> Measured:
    """Run one way of one row on `device` in this process."""
    everything = loaders(model, checkpoint)
    if device == "cpu":
        entries = model.query[0] * model.query[1]
        count, ours_steps, paper_steps = next(sample for limit, sample in CPU_SAMPLE if entries < limit)
        chosen = everything[:count]
        run_steps = steps or (ours_steps if way == "ours" else paper_steps)
    else:
        chosen = everything
        run_steps = steps or (STEPS if way == "ours" else GPU_PAPER_STEPS)
    if device == "cpu" or checkpoint is None:
        # Generated or read before, so that the time is the run's own; a real checkpoint's reading counts on a GPU.
        chosen = [(shape, dtype, partial(_held, load())) for shape, dtype, load in chosen]
    run = run_ours if way == "ours" else run_paper_way
    run(chosen[:1], 2, device)
    peak = PeakMemory(device)
    taken = run(chosen, run_steps, device)
    weights = sum(d * k for (d, k), *_ in chosen) * getattr(torch, model.dtype).itemsize
    # On a CPU the weights were there before; they count all the same.
    peak_bytes = peak.bytes() + (weights if device == "cpu" else 0)
    whole, part = len(everything) * STEPS, len(chosen) * run_steps
    return Measured(len(chosen), run_steps, taken, taken / 60 * whole / part, part != whole, peak_bytes)


def _held(W: Tensor) -> Tensor:
    return W


def row(model: Model, measured: dict[str, Measured]) -> Row:
    """One row of the results: the paper's figures, the cost model's, and what was measured here."""
    forecast = predicted(model)
    found: Row = {
        "model": model.name,
        "matrices": len(model.shapes),
        "dtype": model.dtype,
        "paper min": model.minutes,
        "paper GB": model.gigabytes,
        "predicted min": forecast.seconds / 60,
        "predicted GB": forecast.memory / 1e9,
        "paper / predicted": model.minutes * 60 / forecast.seconds,
    }
    for way, one in measured.items():
        found |= {
            f"{way} min": one.minutes,
            f"{way} GB": one.peak_bytes / 1e9,
            f"{way} extrapolated": one.extrapolated,
            f"{way} run": f"{one.matrices} matrices × {one.steps:,} steps in {one.seconds:.3g} s",
        }
    if len(measured) == 2:
        found["ratio"] = measured["paper's way"].minutes / measured["ours"].minutes
    return found


def krylov_minutes(folder: Path) -> dict[str, float]:
    """Minutes of the Krylov solver for each model, as `python -m bench.solvers table5` last measured them."""
    file = folder / "solvers.json"
    if not file.exists():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8")).get("table5", {}).get("rows", [])
    return {one["model"]: one["krylov s"] / 60 for one in recorded if one["measured"] == one["matrices"]}


def draw(rows: Sequence[Row], here: str, krylov: Mapping[str, float]) -> Figure:
    """Minutes a row on logarithmic axes: what was measured on the left, what is only predicted on the right."""
    partly = "" if not any(one.get(f"{way} extrapolated") for one in rows for way in WAYS) else ", extrapolated"
    measured = {
        "paper's Adam, RTX 4090 (its Table 5)": [one["paper min"] for one in rows],
        f"paper's way, {here}{partly}": [one.get("paper's way min") for one in rows],
        f"our Adam, {here}{partly}": [one.get("ours min") for one in rows],
        f"our Krylov, {here}, same product": [krylov.get(one["model"]) for one in rows],
    }
    predicted = {
        "paper's Adam, RTX 4090 (its Table 5)": measured["paper's Adam, RTX 4090 (its Table 5)"],
        "our Adam, RTX 4090, predicted": [one["predicted min"] for one in rows],
    }
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    _bars(left, rows, {label: values for label, values in measured.items() if any(values)}, "Measured")
    _bars(right, rows, predicted, "Predicted by the cost model; nobody has run it")
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
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS], help="only these rows")
    parser.add_argument("--checkpoint", type=Path, help="real weights for the one row that --models names")
    parser.add_argument("--steps", type=int, help="steps to run instead of the default, both ways")
    parser.add_argument("--no-measure", action="store_true", help="predict only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.checkpoint is not None and len(given.models or ()) != 1:
        parser.error("--checkpoint needs the one row that it belongs to: --models NAME")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.worker:
        name, way = given.worker
        model = next(model for model in MODELS if model.name == name)
        print(json.dumps(asdict(measure(model, way, device, given.checkpoint, given.steps))))
        return
    chosen = [model for model in MODELS if not given.models or model.name in given.models]
    work = [(model, way) for model in chosen for way in WAYS] if not given.no_measure else []
    measured: dict[str, dict[str, Measured]] = {model.name: {} for model in chosen}
    for model, way in track(work, "measuring", console=Console(stderr=True)):
        arguments = ["--worker", model.name, way]
        arguments += ["--checkpoint", str(given.checkpoint)] if given.checkpoint else []
        arguments += ["--steps", str(given.steps)] if given.steps else []
        measured[model.name][way] = Measured(**in_own_process("bench.table5", *arguments))
    rows = [row(model, measured[model.name]) for model in chosen]
    note = (
        f"Rank {RANK}, {STEPS:,} steps, concurrency {CONCURRENCY}. Predicted: by the cost model, for an RTX 4090. "
        "Minutes are for the whole row; where they are extrapolated, the run that they are extrapolated from is given."
    )
    figure = draw(rows, machine().get("gpu", "this CPU"), krylov_minutes(RESULTS))
    publish("table5", "table5", rows, "make bench-table5", note=note, figure=figure, folder=given.output)


if __name__ == "__main__":
    main()
