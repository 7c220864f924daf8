"""The direct solver against what a user would pick today: the same matrices, the same threads, one run.

    python -m bench.solvers cells      time, peak memory and excess of every solver           (about 25 minutes)
    python -m bench.solvers files      from a checkpoint to a file of factors                  (about 6 minutes)
    python -m bench.solvers table5     the six models of Table 5 by krylov, next to Adam       (about 15 minutes)
    python -m bench.solvers            all three

cells: a process for each shape, rank and dtype, in which the solvers take turns; a time is the median of a solver's
turns, its memory the high-water mark of one over what was resident before. Small matrices come twelve at a time: ours
takes them in one call, a peer in a loop, or side by side on threads of its own where that is faster. The excess
f/f* − 1 is from the float64 residual and the f* of a certified solve at 1e-11. files: bench/file_to_file.py. table5:
krylov is measured over every matrix of the row (with --sample N, over N of each shape, and the total says that it is
extrapolated); Adam as bench/six_models.py measures it. The results are results/solvers.json, .md and .png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import llvmlite.binding
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rich.console import Console
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch import Tensor

from inilora_kernels import FactorSet, approximate_model
from inilora_kernels.kernels.streaming import losses
from inilora_kernels.solvers.krylov import principal

from . import file_to_file
from .harness import PeakMemory, Row, in_own_process, publish, seconds
from .peers import PEERS, Product, Solver, ours_together
from .six_models import MODELS, Model
from .six_models import measure as measure_adam
from .spectra import decay, like_the_real, real_matrices

OURS = "inilora krylov"
RANKS = (8, 32, 64, 128)
DTYPES = ("float32", "bfloat16")
# A shape, and how many matrices at a time; None: the real model's.
CASES: dict[str, tuple[tuple[int, int], int] | None] = {
    "12×384² (real)": None,
    "12×768²": ((768, 768), 12),
    "2048²": ((2048, 2048), 1),
    "1024×4096": ((1024, 4096), 1),
    "4096²": ((4096, 4096), 1),
    "5120²": ((5120, 5120), 1),
    "14336×4096": ((14336, 4096), 1),
}
TURNS = 11
# Between turns: the threads of one solver's libraries wait busily for a while before they sleep.
REST = 0.2
# A solver whose turn takes longer has fewer turns.
SECONDS_EACH = 6.0
# What the certificate promises; a solver that reaches it is drawn filled.
AS_GOOD = 1e-8
DRAWN = (OURS, "PROPACK", "PRIMME", "ARPACK", "randomized_svd(n_iter=16)", "pissa_niter_16")
TABLE5_RANK = 8


def _matrices(case: str, dtype: torch.dtype) -> list[Tensor]:
    known = CASES[case]
    if known is None:
        return [W.to(dtype) for W in real_matrices()]
    shape, count = known
    return [like_the_real(shape, dtype, seed) for seed in range(count)]


def measure(case: str, rank: int, dtype: str) -> list[Row]:
    """A row for each solver, in this process."""
    matrices = _matrices(case, getattr(torch, dtype))
    best = [principal(W, [rank], tolerance=1e-11) for W in matrices]
    solvers = {OURS: ours_together} | {name: _fastest(solve, matrices, rank) for name, solve in PEERS.items()}
    found: dict[str, list[Product]] = {}
    peaks: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in solvers}

    def turn(name: str) -> float:
        time.sleep(REST)
        return seconds(lambda: found.update({name: solvers[name](matrices, rank)}))

    for name in solvers:
        turn(name)  # the warm-up
        found.pop(name)
        memory = PeakMemory()
        times[name].append(turn(name))
        peaks[name] = memory.bytes()
    for _ in range(TURNS - 1):
        for name, taken in times.items():
            if sum(taken) < SECONDS_EACH:
                taken.append(turn(name))
    rows: list[Row] = []
    for name, products in found.items():
        worst = -1.0
        for W, pair, optimal in zip(matrices, products, best, strict=True):
            energy, [loss] = losses(W, [pair])
            least = energy - float(optimal.S.square().sum()) - optimal.shortfalls[rank]
            worst = max(worst, loss / least - 1)
        rows.append(
            {
                "case": case,
                "rank": rank,
                "dtype": dtype,
                "solver": name,
                "ms": 1e3 * median(times[name]) / len(matrices),
                "over ours": median(times[name]) / median(times[OURS]),
                "excess": worst,
                "peak MiB": peaks[name] / 2**20,
                "turns": len(times[name]),
            }
        )
    return rows


def _fastest(solve: Solver, matrices: Sequence[Tensor], rank: int) -> Callable[[list[Tensor], int], list[Product]]:
    """A peer at its best: one matrix after another by all threads or, where that is faster, one on each thread."""
    threads = torch.get_num_threads()

    def in_turn(matrices: list[Tensor], rank: int) -> list[Product]:
        return [solve(W, rank) for W in matrices]

    def side_by_side(matrices: list[Tensor], rank: int) -> list[Product]:
        with (
            threadpool_limits(1),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(lambda W: solve(W, rank), matrices))

    def by_one(matrices: list[Tensor], rank: int) -> list[Product]:
        with threadpool_limits(1):
            return in_turn(matrices, rank)

    if len(matrices) == 1:
        return in_turn
    few = list(matrices[: 2 * threads])

    def quickest(way: Callable[[list[Tensor], int], list[Product]]) -> float:
        return min(seconds(lambda: way(few, rank)) for _ in range(2))

    return min((in_turn, side_by_side, by_one), key=quickest)


def cells(cases: Sequence[str], ranks: Sequence[int], dtypes: Sequence[str]) -> list[Row]:
    """Every solver on every case, rank and dtype; a process for each of these."""
    rows: list[Row] = []
    for case in cases:
        for dtype in dtypes:
            for rank in ranks:
                Console(stderr=True).print(f"{case}, rank {rank}, {dtype}", highlight=False)
                chosen = ["--case", case, "--rank", str(rank), "--dtype", dtype]
                rows += in_own_process("bench.solvers", "measure", *chosen)
    return rows


def in_short(rows: Sequence[Row]) -> list[Row]:
    """A row for each case, rank and dtype: our milliseconds, and each drawn peer's time over ours.

    A peer's excess stands beside it where it is above AS_GOOD: such a time is not of the same work.
    """
    short: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        case = row["case"], row["rank"], row["dtype"]
        own = short.setdefault(case, dict(zip(("case", "rank", "dtype"), case, strict=True)))
        if row["solver"] == OURS:
            own |= {"ours, ms a matrix": f"{row['ms']:.3g}", "excess": f"{row['excess']:.0e}"}
        elif row["solver"] in DRAWN:
            worse = "" if row["excess"] <= AS_GOOD else f" ({row['excess']:.0e})"
            own[row["solver"]] = f"{row['over ours']:.2f}{worse}"
    return list(short.values())


def publish_cells(rows: list[Row], command: str, note: str) -> None:
    """In full and in short, as parts of this kind of processor; the picture is of the last one measured."""
    kind = llvmlite.binding.get_host_cpu_name()
    publish("solvers", f"cells in short, {kind}", in_short(rows), command, note=f"{note} Peers: their time over ours.")
    publish("solvers", f"cells, {kind}", rows, command, note=note, figure=_plot(rows))


def table5_row(model: Model, sample: int | None, models: Path | None) -> Row:
    """A row of Table 5: a checkpoint of its shapes and dtype on disk, factorized by the public function.

    models: a folder in which checkpoints stay, and are taken if they are there.
    """
    shapes = model.shapes
    chosen = list(range(len(shapes))) if sample is None else []
    # Of queries and of values apart, since the default targets are both.
    for kind in dict.fromkeys(zip(shapes, itertools.cycle("qv"))) if sample is not None else ():
        chosen += [i for i, own in enumerate(shapes) if (own, "qv"[i % 2]) == kind][:sample]
    dtype = getattr(torch, model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        # A file a matrix, of which one is in memory at a time; the index makes them one checkpoint.
        index = {}
        place = Path(folder) if models is None else models / model.name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        for i in chosen:
            name, file = f"layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj.weight", place / f"model-{i}.safetensors"
            if not file.exists():
                save_file({name: like_the_real(shapes[i], dtype, seed=i)}, file)
            index[name] = file.name
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        found: list[FactorSet] = []
        taken = seconds(
            lambda: found.append(approximate_model(place, TABLE5_RANK, solver="krylov", cache=False, progress=False))
        )
    total = taken * len(shapes) / len(chosen)
    adam = measure_adam(model, "ours", "cpu").minutes
    return {
        "model": model.name,
        "matrices": len(shapes),
        "measured": len(chosen),
        "krylov s" if len(chosen) == len(shapes) else "krylov s (extrapolated)": total,
        "worst excess": max(one.certificate.excess for one in found[0].values()),
        "Adam-20,000 min (extrapolated)": adam,
        "Adam / krylov": 60 * adam / total,
        "paper min (RTX 4090)": model.minutes,
        "paper / krylov": 60 * model.minutes / total,
    }


def _plot(rows: list[Row]) -> Figure:
    """Time over rank of six solvers, a panel for each case; hollow where the excess is above AS_GOOD.

    Three panels a row, so that they can be read at the width of a page.
    """
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"] and row["solver"] in DRAWN]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure(figsize=(max(6.0, 3.1 * across), 0.6 + 3.3 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[len(cases) :]:
        unused.remove()
    for axes, case in zip(panels, cases, strict=False):
        for place, (solver, marker) in enumerate(zip(DRAWN, "oPsDv^", strict=True)):
            own = [row for row in rows if row["case"] == case and row["solver"] == solver]
            if not own:
                continue
            ranks, times = [row["rank"] for row in own], [row["ms"] for row in own]
            wide = 2.5 if solver == OURS else 1.2
            axes.plot(ranks, times, color=f"C{place}", linewidth=wide, zorder=3 if solver == OURS else 2)
            for row in own:
                face = f"C{place}" if row["excess"] <= AS_GOOD else "white"
                axes.plot(row["rank"], row["ms"], marker, color=f"C{place}", markerfacecolor=face, zorder=4)
            axes.plot([], [], marker=marker, color=f"C{place}", linewidth=wide, label=solver)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(RANKS)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(case)
        axes.set_xlabel("rank")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.supylabel(f"time a matrix (ms), {rows[0]['dtype']}", fontsize=10)
    named = {}
    for axes in panels[: len(cases)]:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("all", "cells", "files", "table5", "measure")
    parser.add_argument("part", nargs="?", choices=parts, default="all")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="of cells; repeat for more")
    parser.add_argument("--rank", action="append", type=int, help="of cells; repeat for more")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of cells; repeat for more")
    known = [*file_to_file.MODELS, *(model.name for model in MODELS)]
    parser.add_argument("--models", nargs="+", choices=known, help="of files and table5")
    parser.add_argument("--sample", type=int, help="of table5: this many matrices of each shape, the rest extrapolated")
    parser.add_argument(
        "--checkpoints", type=Path, help="of table5: keep the models in this folder, or take them there"
    )
    options = parser.parse_args()
    if options.part == "measure":
        print(json.dumps(measure(options.case[0], options.rank[0], options.dtype[0])))
        return
    command = " ".join(["python -m bench.solvers", *sys.argv[1:]])
    note = f"Synthetic matrices: σ_i ∝ i^−{decay():.2f}, see bench/spectra.py."
    if options.part in ("all", "cells"):
        rows = cells(options.case or list(CASES), options.rank or RANKS, options.dtype or DTYPES)
        publish_cells(rows, command, note)
    if options.part in ("all", "files"):
        models = [name for name in file_to_file.MODELS if not options.models or name in options.models]
        rows = [row for name in models for row in file_to_file.measure(name)]
        kind = llvmlite.binding.get_host_cpu_name()
        publish("solvers", f"files, {kind}", rows, command, note=f"{note} {file_to_file.NOTE}")
    if options.part in ("all", "table5"):
        chosen = [model for model in MODELS if not options.models or model.name in options.models]
        publish(
            "solvers",
            "table5",
            [table5_row(model, options.sample, options.checkpoints) for model in chosen],
            command,
            note=note,
        )


if __name__ == "__main__":
    main()
