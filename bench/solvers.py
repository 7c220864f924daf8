"""The Krylov solver against what a user would pick today: the same matrices, the same threads, one run.

    python -m bench.solvers pareto             time, peak memory and excess of every solver       (about 25 minutes)
    python -m bench.solvers table5             the six models of Table 5 by krylov, next to Adam  (about 15 minutes)
    python -m bench.solvers                    both

pareto: each measurement is a process of its own, warmed up on two smaller matrices; its time is the median of its
turns, its memory the high-water mark over what was resident before. The excess f/f* − 1 is from the float64 residual
and the f* of a certified solve at 1e-11. table5: krylov is measured over every matrix of the row (with --sample N, over
N of each shape, and the total says that it is extrapolated); Adam as bench/table5.py measures it, over fewer steps and
matrices. The results are results/solvers.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from inilora_kernels import FactorSet, approximate, approximate_model
from inilora_kernels.kernels.streaming import losses
from inilora_kernels.solvers.krylov import principal

from .harness import PeakMemory, Row, in_own_process, publish, seconds
from .spectra import decay, like_the_real, real_matrices
from .table5 import MODELS, Model
from .table5 import measure as measure_adam

RANK = 8
CASES: dict[str, tuple[int, int] | None] = {
    "12×384² (real)": None,
    "768²": (768, 768),
    "1024×4096": (1024, 4096),
    "4096²": (4096, 4096),
    "5120²": (5120, 5120),
}
# A full decomposition of these takes a minute: one turn.
_SLOW = ("torch.linalg.svd", "PEFT pissa")
_TURNS = {"12×384² (real)": 7, "768²": 7, "1024×4096": 5, "4096²": 5, "5120²": 3}

Product = tuple[Tensor, Tensor]


def _split(U: Tensor, S: Tensor, V: Tensor) -> Product:
    """(A, B) of the leading triplets."""
    return (V[:, :RANK] * S[:RANK]).T, U[:, :RANK]


def _ours(method: str) -> Callable[[Tensor], Product]:
    def solve(W: Tensor) -> Product:
        factors = approximate(W, RANK, method=method, solver="krylov")
        return factors.A, factors.B  # type: ignore[union-attr]

    return solve


def _peft(init: str) -> Callable[[Tensor], Product]:
    def solve(W: Tensor) -> Product:
        from peft import LoraConfig, get_peft_model

        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(W, requires_grad=False)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=init)
        layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    return solve


def _svd(W: Tensor) -> Product:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _split(U, S, Vh.T)


def _lowrank(rounds: int) -> Callable[[Tensor], Product]:
    return lambda W: _split(*torch.svd_lowrank(W, q=RANK, niter=rounds))


def _randomized(rounds: int) -> Callable[[Tensor], Product]:
    def solve(W: Tensor) -> Product:
        from sklearn.utils.extmath import randomized_svd

        U, S, Vh = randomized_svd(W.numpy(), RANK, n_iter=rounds, random_state=0)
        return _split(*(torch.from_numpy(part.copy()) for part in (U, S, Vh.T)))

    return solve


def _svds(solver: str) -> Callable[[Tensor], Product]:
    def solve(W: Tensor) -> Product:
        from scipy.sparse.linalg import svds

        U, S, Vh = svds(W.numpy(), RANK, solver=solver, rng=0)
        return _split(*(torch.from_numpy(part.copy()) for part in (U, S, Vh.T)))

    return solve


SOLVERS: dict[str, Callable[[Tensor], Product]] = {
    "inilora krylov": _ours("inilora"),
    "inilora pissa": _ours("pissa"),
    "PEFT pissa_niter_4": _peft("pissa_niter_4"),
    "PEFT pissa_niter_16": _peft("pissa_niter_16"),
    "PEFT pissa": _peft("pissa"),
    "torch.svd_lowrank(niter=4)": _lowrank(4),
    "torch.svd_lowrank(niter=16)": _lowrank(16),
    "torch.linalg.svd": _svd,
    "sklearn randomized_svd(n_iter=4)": _randomized(4),
    "sklearn randomized_svd(n_iter=16)": _randomized(16),
    "scipy svds arpack": _svds("arpack"),
    "scipy svds propack": _svds("propack"),
}


def _matrices(case: str) -> list[Tensor]:
    shape = CASES[case]
    return real_matrices() if shape is None else [like_the_real(shape, torch.float32, seed=0)]


def measure(case: str, solver: str) -> dict[str, float]:
    """Seconds a matrix, peak bytes over what was resident, and the worst excess; in this process."""
    solve = SOLVERS[solver]
    matrices = _matrices(case)
    for size in 256, 1500:
        solve(like_the_real((size, size), torch.float32, seed=1))
    memory = PeakMemory()
    times: list[float] = []
    peak = 0
    found: list[Product] = []
    for _ in range(1 if solver in _SLOW and len(matrices) == 1 else _TURNS[case]):
        # PEFT overwrites the weight that it is given; copies are made outside the clock.
        inputs = [W.clone() for W in matrices]
        held = sum(W.nbytes for W in inputs)
        found.clear()
        times.append(seconds(lambda inputs=inputs: found.extend(map(solve, inputs))) / len(matrices))
        peak = max(peak, memory.bytes() - held)
    worst = -1.0
    for W, pair in zip(matrices, found, strict=True):
        best = principal(W, [RANK], tolerance=1e-11)
        energy, [loss] = losses(W, [pair])
        optimum = energy - float(best.S.square().sum()) - best.shortfalls[RANK]
        worst = max(worst, loss / optimum - 1)
    return {"ms": 1e3 * median(times), "peak MiB": peak / 2**20, "excess": worst}


def pareto(cases: list[str]) -> list[Row]:
    """Every solver on every case, each in a process of its own."""
    rows: list[Row] = []
    for case in cases:
        for solver in SOLVERS:
            Console(stderr=True).print(f"{case}: {solver}", highlight=False)
            measured = in_own_process("bench.solvers", "measure", "--case", case, "--solver", solver)
            rows.append({"case": case, "solver": solver, **measured})
        peer = next(row for row in rows if row["case"] == case and row["solver"] == "PEFT pissa_niter_16")
        for row in rows:
            if row["case"] == case:
                row["speed over pissa_niter_16"] = peer["ms"] / row["ms"]
    return rows


def table5_row(model: Model, sample: int | None) -> Row:
    """A row of Table 5: a checkpoint of its shapes and dtype on disk, factorized by the public function."""
    shapes = model.shapes
    chosen = list(range(len(shapes))) if sample is None else []
    for shape in dict.fromkeys(shapes) if sample is not None else ():
        chosen += [i for i, own in enumerate(shapes) if own == shape][:sample]
    dtype = getattr(torch, model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        # A file a matrix, of which one is in memory at a time; the index makes them one checkpoint.
        index = {}
        for i in chosen:
            name = f"layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj.weight"
            save_file({name: like_the_real(shapes[i], dtype, seed=i)}, Path(folder) / f"model-{i}.safetensors")
            index[name] = f"model-{i}.safetensors"
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        found: list[FactorSet] = []
        taken = seconds(
            lambda: found.append(approximate_model(folder, RANK, solver="krylov", cache=False, progress=False))
        )
    total = taken * len(shapes) / len(chosen)
    adam = measure_adam(model, "ours", "cpu", None, None).minutes
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
    """Time and excess of every solver, a panel for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(max(10, 4.2 * len(cases)), 5.6), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    markers = "*PovsD^<>dXh"
    for axes, case in zip(panels, cases, strict=True):
        for (solver, marker), color in zip(zip(SOLVERS, markers, strict=True), range(12), strict=True):
            row = next((row for row in rows if row["case"] == case and row["solver"] == solver), None)
            if row is not None:
                size = 180 if marker == "*" else 60
                # A float32 result may come out at or below the certified optimum: the floor stands for that.
                axes.scatter(
                    row["ms"], max(row["excess"], 1e-12), s=size, marker=marker, color=f"C{color}", label=solver
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(case)
        axes.set_xlabel("time a matrix (ms)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("excess over the optimum, f/f* − 1")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "pareto", "table5", "measure"), default="all")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="of pareto; repeat for more")
    parser.add_argument("--solver", choices=tuple(SOLVERS), help="of measure")
    parser.add_argument("--models", nargs="+", help="of table5, by name")
    parser.add_argument("--sample", type=int, help="of table5: this many matrices of each shape, the rest extrapolated")
    options = parser.parse_args()
    if options.part == "measure":
        print(json.dumps(measure(options.case[0], options.solver)))
        return
    command = " ".join(["python -m bench.solvers", *sys.argv[1:]])
    note = f"Synthetic matrices: σ_i ∝ i^−{decay():.2f}, see bench/spectra.py."
    if options.part in ("all", "pareto"):
        rows = pareto(options.case or list(CASES))
        publish("solvers", "pareto", rows, command, note=note, figure=_plot(rows))
    if options.part in ("all", "table5"):
        models = [model for model in MODELS if not options.models or model.name in options.models]
        publish("solvers", "table5", [table5_row(model, options.sample) for model in models], command, note=note)


if __name__ == "__main__":
    main()
