"""A run shared among processes: two against one, measured here; LLaMA 3.1 405B on many GPUs, predicted.

    python -m bench.processes measure     two processes against one, a thread each, and what the gathering takes
    python -m bench.processes limits      what two cores of this machine do of arithmetic, hashing and reading memory
    python -m bench.processes simulate    405B's query and value matrices on 8, 64 and 512 H100s, by the cost model

The results are results/processes.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from inilora_kernels import FactorSet, approximate_model, processes
from inilora_kernels.estimate import Work, costs, seconds
from inilora_kernels.kernels.cpu.cost_model import USUAL
from inilora_kernels.kernels.gpu.gpus import gpu_named
from inilora_kernels.processes import Job, shared_run, shares

from .harness import RESULTS, Row, publish
from .six_models import synthetic

REPEATS = 7
# About five seconds of work for one process: the side of a square matrix, how many, and the options.
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "adam": (1024, 8, {"solver": "adam", "steps": 1200}),
    "krylov": (4096, 32, {"solver": "krylov"}),
}
LAYERS, QUERY, VALUE = 126, (16384, 16384), (1024, 16384)
GPUS, CARD, STEPS = (1, 8, 64, 512), "h100", 20_000


def model_of(solver: str, folder: Path) -> Path:
    """A bfloat16 checkpoint of the run's matrices."""
    side, count, _ = RUNS[solver]
    weights = {f"layers.{i}.q_proj.weight": synthetic((side, side), torch.bfloat16, i % 16) for i in range(count)}
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / f"{solver}.safetensors")
    return folder / f"{solver}.safetensors"


def approximated(model: Path, solver: str, modules: str | list[str] = "all-linear") -> FactorSet:
    return approximate_model(model, 8, modules, cache=False, progress=False, **RUNS[solver][2])


def worker(model: Path, solver: str, result: Path) -> None:
    """One of two processes: the median seconds of each way to run, in turn, and of gathering the factors.

    alone: rank 0 has all matrices, and the other process waits. apart: each has half of them, and neither knows of the
    other, which is what the machine's two cores can do. shared: as in a trainer's job.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    factors = approximated(model, solver)
    half = [name for place, name in enumerate(factors) if place % 2 == rank]
    taken: dict[str, list[float]] = {"alone": [], "apart": [], "shared": []}
    for _ in range(REPEATS):
        for way, runs in taken.items():
            dist.barrier()
            began = time.perf_counter()
            if way == "shared":
                approximated(model, solver)
            elif way == "apart" or rank == 0:
                token = processes._joined.set(Job())
                approximated(model, solver, half if way == "apart" else "all-linear")
                processes._joined.reset(token)
            dist.barrier()
            runs.append(time.perf_counter() - began)
    gathering = [statistics.median(_gatherings(factors, everywhere)) for everywhere in (False, True)]
    if rank == 0:
        result.write_text(json.dumps([*map(statistics.median, taken.values()), *gathering]))
    dist.destroy_process_group()


def _gatherings(factors: FactorSet, everywhere: bool) -> list[float]:
    taken = []
    for _ in range(REPEATS):
        dist.barrier()
        with shared_run() as job:
            parts = shares([1.0] * len(factors), job.size)
            names = list(factors)
            owners = {names[place]: rank for rank, part in enumerate(parts) for place in part}
            mine = {name: factors[name] for name, rank in owners.items() if rank == job.rank}
            dist.barrier()
            began = time.perf_counter()
            replace(job, everywhere=everywhere).gather(mine, owners)
            taken.append(time.perf_counter() - began)
            dist.barrier()
    return taken


def measure(folder: Path) -> None:
    """Each solver by one process and by two."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for solver, (side, count, _) in RUNS.items():
            model = model_of(solver, Path(scratch))
            one, apart, two, on_one, on_all = _launched(model, solver)
            rows.append(
                {
                    "run": f"{solver}, {count} × {side}²",
                    "one process s": one,
                    "two processes s": two,
                    "ratio": one / two,
                    "two that share nothing": one / apart,
                    "gathered on rank 0 s": on_one,
                    "share": on_one / two,
                    "gathered on both s": on_all,
                    "share of that": on_all / two,
                }
            )
    note = (
        f"bfloat16, rank 8, a thread a process; medians of {REPEATS} runs of each kind in turn, those of two processes "
        "with all factors on both. Two that share nothing have half of the matrices each: that ratio is the machine's."
    )
    publish("processes", "two against one", rows, "python -m bench.processes measure", note=note, folder=folder)


def _launched(model: Path, solver: str) -> list[float]:
    result = model.with_suffix(".json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, "-m", "bench.processes", "worker", str(model), solver, str(result)], check=True)
    return [float(seconds) for seconds in json.loads(result.read_text())]


def _limits() -> dict[str, Callable[[], object]]:
    """A tenth of a second of work or more, of one kind each."""
    A, large = torch.randn(256, 256), torch.randn(1 << 24)
    content = bytes(1 << 20)
    return {
        "matrix products within the second cache": lambda: [A @ A for _ in range(500)],
        "sha256 of one megabyte": lambda: [hashlib.sha256(content).digest() for _ in range(256)],
        "the sum of 64 MB": lambda: [large.sum() for _ in range(40)],
    }


def _limit_of(number: int, turns: Any, told: Any) -> None:
    """One of two processes, each on a core of its own: the seconds of each kind of work, alone and beside the other."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    torch.set_num_threads(1)
    for kind, work in _limits().items():
        work()
        for way in ("alone", "beside") * REPEATS:
            turns.wait()
            began = time.perf_counter()
            if way == "beside" or number == 0:
                work()
                told.put((kind, way, time.perf_counter() - began))
            turns.wait()


def limits(folder: Path) -> None:
    """How much more two cores do than one, of work that shares nothing."""
    context = multiprocessing.get_context("spawn")
    turns, told = context.Barrier(2), context.Queue()
    members = [context.Process(target=_limit_of, args=(number, turns, told)) for number in range(2)]
    for member in members:
        member.start()
    kinds = list(_limits())
    found = [told.get() for _ in range(3 * REPEATS * len(kinds))]
    for member in members:
        member.join()
    rows: list[Row] = []
    for kind in kinds:
        alone, beside = (
            statistics.median(taken for one, how, taken in found if (one, how) == (kind, way))
            for way in ("alone", "beside")
        )
        rows.append(
            {"work of one thread": kind, "alone s": alone, "beside the same s": beside, "ratio": 2 * alone / beside}
        )
    note = f"Medians of {REPEATS} turns. The ratio is what two cores do of it, of one core."
    publish("processes", "what two cores are worth", rows, "python -m bench.processes limits", note=note, folder=folder)


def simulate(folder: Path) -> None:
    """The deal that a run would make, and each process's predicted seconds."""
    card = gpu_named(CARD)
    rows: list[Row] = []
    for solver, steps in (("adam", STEPS), ("krylov", 0)):
        works = [Work(shape, 2, 8) for _ in range(LAYERS) for shape in (QUERY, VALUE)]
        weights = costs([[work] for work in works], solver, steps, card)
        for count in GPUS:
            parts = [[works[place] for place in part] for part in shares(weights, count)]
            taken = [seconds(part, solver, steps, machine=USUAL, card=card) if part else 0.0 for part in parts]
            rows.append(
                {
                    "solver": solver,
                    "GPUs": count,
                    "predicted s": max(taken),
                    "mean / longest": statistics.fmean(taken) / max(taken),
                    "speed-up": sum(taken) / max(taken),
                    "matrices a GPU": f"{min(map(len, parts))} to {max(map(len, parts))}",
                }
            )
    note = (
        f"Predicted by the cost model, not measured: {LAYERS} query matrices of {QUERY[0]}×{QUERY[1]} and as many "
        f"value matrices of {VALUE[0]}×{VALUE[1]}, bfloat16, rank 8, {STEPS:,} steps of Adam; on {card.name}."
    )
    publish("processes", "405B, predicted", rows, "python -m bench.processes simulate", note=note, folder=folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["measure", "limits", "simulate", "worker"])
    parser.add_argument("of_worker", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.part == "worker":
        model, solver, result = given.of_worker
        worker(Path(model), solver, Path(result))
    else:
        {"measure": measure, "limits": limits, "simulate": simulate}[given.part](given.output)


if __name__ == "__main__":
    main()
