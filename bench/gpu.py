"""Everything worth measuring on a GPU, in one run of about ten minutes, as one JSON file to send back.

    python -m bench.gpu                 writes results/gpu-NAME.json

Correctness on the device for every dtype and rank, bit-equal repeats, the time of a step against the bandwidth that it
could have, and Table 5's rows with the paper's way beside. Each part ends when its share of the minutes is used, and
says what it left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inilora_kernels.kernels.backend import Problem, Sample, Schedule
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.cost_model import CONCURRENCY, Matrix, choose, step_of
from inilora_kernels.kernels.gpu.gpus import Gpu
from inilora_kernels.kernels.gpu.tiles import RANKS, tiles
from inilora_kernels.kernels.gpu.wave import Wave, lay_out, padded_weight
from inilora_kernels.kernels.reference import AdamState, adam_step, gradient_products

from .harness import machine
from .table5 import MODELS, RESULTS, synthetic

DTYPES = ("float32", "float16", "bfloat16")
RAGGED = ((530, 397), (300, 1040), (33, 24))
Row = dict[str, Any]


def problems_of(weights: Sequence[Tensor], rank: int) -> list[Problem]:
    """The matrices with seeded random starts."""
    generator = torch.Generator().manual_seed(0)
    return [
        Problem(
            lambda W=W: W,
            (W.shape[0], W.shape[1]),
            torch.randn(rank, W.shape[1], generator=generator) * 0.02,
            torch.randn(W.shape[0], rank, generator=generator) * 0.02,
        )
        for W in weights
    ]


def wave_of(weights: Sequence[Tensor], rank: int, backend: TritonBackend, parts: int, steps: int) -> Wave:
    """A wave of these matrices on the backend's device, with the tiles of its GPU."""
    problems = problems_of(weights, rank)
    layout = lay_out(
        [problem.shape for problem in problems],
        [rank] * len(problems),
        [parts] * len(problems),
        tiles(backend.gpu().architecture, weights[0].element_size(), rank),
    )
    schedule = Schedule(steps, 5e-4, 5_000, 0.9, "mse")
    return Wave(layout, problems, [padded_weight(W, backend.device) for W in weights], schedule, steps)


def correctness(
    backend: TritonBackend, dtype: str, rank: int, shapes: Sequence[tuple[int, int]] = RAGGED, steps: int = 20
) -> Row:
    """Both kernels on the device against float64: errors of the products and of the factors after some steps."""
    weights = [synthetic(shape, getattr(torch, dtype), seed) for seed, shape in enumerate(shapes)]
    problems = problems_of(weights, rank)
    wave = wave_of(weights, rank, backend, 2, steps + 1)
    wave.multiply()
    errors = []
    for place, W, problem in zip(wave.layout.places, weights, problems, strict=True):
        P = wave.slots[place.P : place.Q].view(-1, rank, place.row_stride).double().sum(0)[:, : place.columns]
        Q = wave.slots[place.Q :][: place.chunks * rank * place.column_stride].view(-1, rank, place.column_stride)
        Q = Q.double().sum(0)[:, : place.rows].T
        expected = gradient_products(W.double(), problem.A.double(), problem.B.double())
        errors += [float((a.cpu() - b).norm() / b.norm()) for a, b in zip((P, Q), expected, strict=True)]
    wave = wave_of(weights, rank, backend, 2, steps)
    wave.advance(steps)
    moved = []
    schedule = Schedule(steps, 5e-4, 5_000, 0.9, "mse")
    for index, (W, problem) in enumerate(zip(weights, problems, strict=True)):
        state = AdamState.start(problem.A.double(), problem.B.double())
        for step in range(steps):
            adam_step(W.double(), state, step, schedule)
        A, B = wave.pair(index)
        moved.append(float((A.cpu().double() - state.A).norm() / (state.A - problem.A.double()).norm()))
        moved.append(float((B.cpu().double() - state.B).norm() / (state.B - problem.B.double()).norm()))
    return {"dtype": dtype, "rank": rank, "steps": steps, "products": max(errors), "factors": max(moved)}


def repeats(
    backend: TritonBackend, dtype: str, rank: int, shapes: Sequence[tuple[int, int]] = RAGGED, steps: int = 500
) -> Row:
    """Whether two runs through the backend, graphs included, and a run of each matrix alone give the same bits."""
    weights = [synthetic(shape, getattr(torch, dtype), seed) for seed, shape in enumerate(shapes)]
    problems = problems_of(weights, rank)
    schedule = Schedule(steps, 5e-4, 5_000, 0.9, "mse")

    def final(batch: Sequence[Problem]) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}

        def observe(sample: Sample) -> bool:
            found[sample.index] = (sample.A, sample.B)
            return True

        backend.adam(batch, schedule, [steps], observe, lambda done: None)
        return found

    first, second = final(problems), final(problems)
    alone = {index: final([problem])[0] for index, problem in enumerate(problems)}
    equal = all(
        torch.equal(a, b)
        for other in (second, alone)
        for index in first
        for a, b in zip(first[index], other[index], strict=True)
    )
    return {"dtype": dtype, "rank": rank, "steps": steps, "bit_equal": equal}


def step_time(
    backend: TritonBackend, shape: tuple[int, int], dtype: str, rank: int, count: int | None = None, steps: int = 200
) -> Row:
    """Seconds a step of a wave as the plan would run it, beside the plan's own and the bandwidth that W's bytes make.

    count: matrices in the wave; None: as many as the plan takes.
    """
    gpu: Gpu = backend.gpu()
    matrix = Matrix(shape, getattr(torch, dtype).itemsize, rank)
    choice = choose(matrix, gpu)
    together = count or min(choice.wave, CONCURRENCY)
    W = synthetic(shape, getattr(torch, dtype), 0)
    wave = wave_of([W] * together, rank, backend, choice.parts, 3 * steps + 10)
    launch: Callable[[], None] = lambda: wave.advance(steps)  # noqa: E731
    wave.advance(2)
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            wave.advance(steps)
        launch = graph.replay
    seconds = min(_timed(launch, backend.device) for _ in range(2)) / steps
    model = step_of(matrix, gpu, choice.parts, together, choice.resident)
    return {
        "shape": list(shape),
        "dtype": dtype,
        "rank": rank,
        "matrices": together,
        "in_cache": choice.resident,
        "seconds": seconds,
        "predicted_seconds": model.seconds,
        "bound": model.bound,
        "bytes_a_second": model.weight_bytes / seconds,
        "share_of_dram": model.weight_bytes / seconds / gpu.dram,
        "flops_a_second": 4 * together * shape[0] * shape[1] * rank / seconds,
    }


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def collected(parts: Sequence[tuple[str, Callable[[], Row]]], until: float) -> tuple[list[Row], list[str]]:
    """Run the parts in order while there is time; the rows, and the names of those left out.

    A part that fails leaves its error as its row: the others are worth having.
    """
    rows, left_out = [], []
    for name, part in parts:
        if time.monotonic() > until:
            left_out.append(name)
            continue
        try:
            rows.append(part())
        except Exception as error:
            rows.append({"part": name, "error": f"{type(error).__name__}: {error}"})
    return rows, left_out


def table5_row(model: str, way: str) -> Row:
    """One row of Table 5, one way, in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, "-m", "bench.table5", "--worker", model, way]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"model": model, "way": way, **json.loads(done.stdout.splitlines()[-1])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a GPU; without one see bench.table5, and tests/kernels for the proofs")
    backend = TritonBackend(torch.device("cuda", torch.cuda.current_device()))
    start = time.monotonic()
    shapes = {(model.query, model.dtype) for model in MODELS} | {(model.value, model.dtype) for model in MODELS}

    def end(share: float) -> float:
        return start + 60 * given.minutes * share

    results: dict[str, Any] = {
        "command": "python -m bench.gpu",
        "machine": {**machine(), "gpu": torch.cuda.get_device_name(), "triton": triton.__version__},
        "system": platform.platform(),
        "left_out": {},
    }
    plan_of_parts: dict[str, tuple[float, list[tuple[str, Callable[[], Row]]]]] = {
        "correctness": (
            0.25,
            [
                (f"{dtype} r={rank}", lambda dtype=dtype, rank=rank: correctness(backend, dtype, rank))
                for rank in RANKS
                for dtype in DTYPES
            ],
        ),
        "repeats": (0.35, [(dtype, lambda dtype=dtype: repeats(backend, dtype, 8)) for dtype in DTYPES]),
        "steps": (
            0.55,
            [
                (
                    f"{shape} {dtype} r={rank}",
                    lambda shape=shape, dtype=dtype, rank=rank: step_time(backend, shape, dtype, rank),
                )
                for rank in (8, 16, 32)
                for shape, dtype in sorted(shapes)
            ],
        ),
        "table5": (
            1.0,
            [
                (f"{model.name}, {way}", lambda model=model, way=way: table5_row(model.name, way))
                for model in MODELS
                for way in ("ours", "paper's way")
            ],
        ),
    }
    console = Console(stderr=True)
    for name, (share, parts) in plan_of_parts.items():
        with console.status(f"{name}: {len(parts)} parts, at most {given.minutes * share:.1f} min from the start"):
            results[name], results["left_out"][name] = collected(parts, end(share))
        console.print(f"{name}: {len(results[name])} rows, {len(results['left_out'][name])} left out")
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"gpu-{results['machine']['gpu'].replace(' ', '-')}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    console.print(f"wrote {path}: please send it back")


def show(results: dict[str, Any]) -> None:
    """The time of a step, and Table 5, as tables."""
    for name in ("correctness", "steps", "table5"):
        rows = [row for row in results[name] if "error" not in row]
        table = Table(title=f"{name}, {results['machine']['gpu']}")
        for heading in rows[0] if rows else ():
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
