"""Everything worth asking a GPU, in under ten minutes, without a network; one JSON file to send back.

    python -m bench.gpu                           writes results/gpu-NAME.json and .md, after each row
    python -m bench.gpu --only correctness steps  these parts alone: several short runs add up in one file
    python -m bench.gpu_report                    makes tables and plots from it, prediction next to measurement

Each part runs in its own process with its own time limit, so that a CUDA error or a hang costs that part alone; its
rows so far are kept. The parts are in order of importance. Needs torch, triton, numpy, safetensors, rich and
matplotlib; `whole` needs pydantic and platformdirs as well, and its row says so where they are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from inilora_kernels.kernels.backend import Batch, Problem, Sample
from inilora_kernels.kernels.gpu.backend import GRAPH_STEPS, TritonBackend
from inilora_kernels.kernels.gpu.cost_model import Matrix, choose, step_of
from inilora_kernels.kernels.gpu.tiles import RANKS
from inilora_kernels.kernels.gpu.waves import divide
from inilora_kernels.kernels.reference import AdamState, adam_step, gradient_products, residual_loss

from . import gpu_direct, gpu_tiles, gpu_whole
from .gpu_timing import distance, duration, problems_of, replayed, schedule_of, wave_of
from .harness import RESULTS, Row, publish, seconds
from .six_models import MODELS, Model, measure, synthetic

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """How large each question is.

    window: seconds that a timing lasts, with clocks warm. most: matrices in a wave. whole: shape, dtype, how many
    matrices, and Adam's steps.
    """

    ragged: tuple[Shape, ...]
    steps: tuple[tuple[Shape, torch.dtype], ...]
    ranks: tuple[int, ...]
    repeated_steps: int
    window: float
    waves: int
    most: int
    direct: tuple[gpu_direct.Cell, ...]
    batch: int
    whole: tuple[Shape, torch.dtype, int, int]
    table5: tuple[Model, ...]


FULL = Sizes(
    ragged=((530, 397), (300, 1040), (33, 24)),
    steps=(
        ((4096, 4096), torch.bfloat16),
        ((768, 768), torch.float32),
        ((1024, 1024), torch.float32),
        ((5120, 5120), torch.bfloat16),
        ((1024, 4096), torch.float16),
    ),
    ranks=RANKS,
    repeated_steps=500,
    window=0.1,
    waves=3,
    most=64,
    direct=gpu_direct.CELLS,
    batch=16,
    whole=((4096, 4096), torch.bfloat16, 16, 2_000),
    table5=MODELS,
)
TOY = Sizes(
    ragged=((40, 24), (33, 24)),
    steps=(((40, 24), torch.bfloat16), ((24, 40), torch.float32)),
    ranks=(8,),
    repeated_steps=1,
    window=0.0,
    waves=2,
    most=2,
    direct=(((530, 520), torch.bfloat16, 8),),
    batch=1,
    whole=((40, 24), torch.bfloat16, 2, 1),
    table5=(),
)


def compiling(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Every kernel of the other parts into triton's cache, a process a rank at once: what a first run waits for."""
    if not backend.place().compiles:
        return
    command = [sys.executable, "-m", "bench.gpu", *(["--toy"] if sizes is TOY else []), "--compile"]
    start = time.perf_counter()
    running = {
        rank: subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in sizes.ranks
    }
    for rank, process in running.items():
        _, errors = process.communicate()
        row: Row = {"rank": rank, "s": time.perf_counter() - start}
        yield row if not process.returncode else {**row, "error": errors.strip().splitlines()[-1]}


def compile_all(backend: TritonBackend, sizes: Sizes, rank: int) -> None:
    """The kernels of one rank, and with rank 8 the direct solver's, by running them."""
    for dtype in DTYPES:
        weights = [synthetic(sizes.ragged[-1], dtype, 0)]
        for resident in (True, False):
            wave = wave_of(weights, rank, backend, 1, resident=resident)
            wave.advance(1)
            wave.judge(wide=not resident)
        if rank == sizes.ranks[0]:
            gpu_direct.products(backend, weights)


def correctness(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Every kernel, dtype and rank on the device against float64: relative errors."""
    for rank in sizes.ranks:
        for dtype in DTYPES:
            weights = [synthetic(shape, dtype, seed) for seed, shape in enumerate(sizes.ragged)]
            problems = problems_of(weights, rank)
            wave = wave_of(weights, rank, backend, 2, resident=True)
            wave.multiply()
            products, factors, losses = [], [], []
            slots = wave.slots.double().cpu()
            for place, W, one in zip(wave.layout.places, weights, problems, strict=True):
                P = slots[place.P_offset : place.Q_offset].view(-1, rank, place.row_stride).sum(0)[:, : place.columns]
                Q = slots[place.Q_offset :][: place.chunks * rank * place.column_stride]
                Q = Q.view(-1, rank, place.column_stride).sum(0)[:, : place.rows].T
                true = gradient_products(W.double(), one.A.double(), one.B.double())
                products += [distance(mine, exact, exact) for mine, exact in zip((P, Q), true, strict=True)]
            wave = wave_of(weights, rank, backend, 2, resident=True)
            wave.advance(5)
            wave.judge(wide=True)
            for index, (loss, A, B) in wave.sampled().items():
                W, one = weights[index].double(), problems[index]
                state = AdamState.start(one.A.double(), one.B.double())
                for step in range(5):
                    adam_step(W, state, step, schedule_of(5))
                factors.append(distance(A, state.A, state.A - one.A))
                factors.append(distance(B, state.B, state.B - one.B))
                losses.append(abs(loss / residual_loss(W, A.double(), B.double()) - 1))
            yield {
                "dtype": str(dtype),
                "rank": rank,
                "products": max(products),
                "factors after 5 steps": max(factors),
                "loss": max(losses),
            }


def repeats(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Whether two runs through the backend, graphs included, and each matrix alone give the same bits."""
    for dtype in DTYPES:
        weights = [synthetic(shape, dtype, seed) for seed, shape in enumerate(sizes.ragged)]
        problems = problems_of(weights, 8)
        first, second = (final(backend, problems, sizes.repeated_steps) for _ in range(2))
        alone = [final(backend, [problem], sizes.repeated_steps)[0] for problem in problems]
        equal = all(
            torch.equal(a, b)
            for other in (second, dict(enumerate(alone)))
            for index in first
            for a, b in zip(first[index], other[index], strict=True)
        )
        yield {"dtype": str(dtype), "steps": sizes.repeated_steps, "same bits": equal}


def final(backend: TritonBackend, problems: Sequence[Problem], steps: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Every matrix's factors after `steps` steps."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(sample: Sample) -> bool:
        found[sample.index] = (sample.A, sample.B)
        return True

    backend.adam(Batch(problems, schedule_of(steps), [steps], observe))
    return found


def steps(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """A step as the backend runs it: by graph, launch by launch, kernel by kernel; next to the prediction."""
    gpu, block = backend.gpu(), GRAPH_STEPS[0] if backend.place().captures else 1
    for rank in sizes.ranks:
        # The rank of the paper's table on every shape; the others on one of each size of weights.
        for shape, dtype in sizes.steps if rank == sizes.ranks[0] else sizes.steps[:2]:
            matrix = Matrix(shape, dtype.itemsize, rank)
            # The first wave of as many as Table 5 has in a row.
            first = divide([matrix] * sizes.most, [0] * sizes.most, gpu)[0]
            W, count, parts = synthetic(shape, dtype, 0), len(first.members), choose(matrix, gpu).parts
            wave = wave_of([W] * count, rank, backend, parts, resident=first.resident)
            kernels: dict[str, Callable[[], None]] = {
                "products": wave.multiply,
                "adam": wave.update,
                "loss": lambda wave=wave: wave.judge(wide=False),  # type: ignore[misc]
                "float64 loss": lambda wave=wave: wave.judge(wide=True),  # type: ignore[misc]
            }
            for kernel in kernels.values():
                kernel()
            eager = duration(lambda wave=wave: wave.advance(block), backend, sizes.window) / block  # type: ignore[misc]
            by_graph = replayed(wave, backend, sizes.window)
            wave.begin(wave.state)
            apart = {f"{name} µs": 1e6 * duration(kernel, backend, sizes.window) for name, kernel in kernels.items()}
            model = step_of(matrix, gpu, parts, count, first.resident)
            taken = by_graph or eager
            yield {
                "matrix": f"{count}×{shape[0]}×{shape[1]}",
                "dtype": str(dtype),
                "rank": rank,
                "in cache": first.resident,
                "captured": by_graph is not None,
                "graph µs": by_graph and 1e6 * by_graph,
                "launches µs": 1e6 * eager,
                "predicted µs": 1e6 * model.seconds,
                "measured / predicted": taken / model.seconds,
                "share of DRAM": model.weight_bytes / taken / gpu.dram,
                "bound": model.bound,
                **apart,
            }


def other_tiles(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Steps by tiles that the cost model does not tell apart from those that are taken."""
    for shape, dtype in sizes.steps[:2]:
        yield from gpu_tiles.alternatives(backend, synthetic(shape, dtype, 0), sizes.most, sizes.window)


def uploads(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Host memory to the device, pinned and not; and whether the waves' uploads hide behind their steps."""
    shape, dtype = sizes.steps[0]
    place, W = backend.place(), synthetic(shape, dtype, 0)
    target = torch.empty(W.shape, dtype=dtype, device=backend.device)
    pinned = place.staging(W.numel(), dtype).view(W.shape).copy_(W)
    size = W.numel() * W.element_size()
    for name, source in (("pageable", W), ("pinned", pinned)):

        def copy(source: Tensor = source) -> None:
            place.wait(place.copy(target, source))

        yield {"upload": name, "GB/s": size / duration(copy, backend, sizes.window) / 1e9}
    wave = min(choose(Matrix(shape, dtype.itemsize, 8), backend.gpu()).wave, sizes.most)
    for waves in (1, sizes.waves):
        problems = problems_of([W] * min(64, wave * waves), 8)
        for count in (sizes.repeated_steps, 2 * sizes.repeated_steps):

            def run(problems: Sequence[Problem] = problems, count: int = count) -> None:
                final(backend, problems, count)

            run()
            yield {"upload": f"whole run, {len(problems)} matrices, {count} steps", "s": seconds(run)}


def direct(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """The direct solver: its products against float64, a pass and a whole batch next to the prediction, and the CPU."""
    for dtype in DTYPES:
        weights = [synthetic(shape, dtype, seed) for seed, shape in enumerate(sizes.ragged)]
        yield gpu_direct.products(backend, weights)
    for shape, dtype, rank in sizes.direct:
        weights = [synthetic(shape, dtype, seed) for seed in range(sizes.batch)]
        yield gpu_direct.one_pass(backend, weights, sizes.window)
        yield from gpu_direct.whole_batch(backend, weights, rank)
    shape, dtype, _ = sizes.direct[0]
    yield gpu_direct.on_the_processor(synthetic(shape, dtype, 0))


def processes(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Two processes on one GPU at once, as two users would: both finish, with the bits of one alone."""
    shape, dtype = sizes.steps[0]
    problems = problems_of([synthetic(shape, dtype, 0)], 8)
    (A, _), *_ = final(backend, problems, sizes.repeated_steps).values()
    expected = float(A.double().sum())
    command = [sys.executable, "-m", "bench.gpu", "--checksum", *(["--toy"] if sizes is TOY else [])]
    start = time.perf_counter()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for number, process in enumerate(both):
        output, _ = process.communicate(timeout=120)
        same = process.returncode == 0 and float(output.splitlines()[-1]) == expected
        yield {"process": number, "same bits": same, "s": time.perf_counter() - start}


def whole(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """The public function from a file, next to what `inilora plan` says."""
    shape, dtype, count, adam_steps = sizes.whole
    weights = [synthetic(shape, dtype, seed) for seed in range(count)]
    yield from gpu_whole.public_function(backend, weights, adam_steps)


def table5(backend: TritonBackend, sizes: Sizes) -> Iterator[Row]:
    """Table 5: each row by ours and by the paper's way, with fewer steps and extrapolated, which the rows say."""
    # The row that matters most comes first, should the time not do for all.
    yield from gpu_whole.table5_rows(sorted(sizes.table5, key=lambda model: model.name != "LLaMA2-7B"))


# Seconds each may take: nine and a half minutes in all.
PARTS: dict[str, tuple[Callable[[TritonBackend, Sizes], Iterator[Row]], int]] = {
    "compiling": (compiling, 60),
    "correctness": (correctness, 45),
    "steps": (steps, 90),
    "repeats": (repeats, 30),
    "uploads": (uploads, 30),
    "processes": (processes, 35),
    "direct": (direct, 60),
    "whole": (whole, 40),
    "tiles": (other_tiles, 30),
    "table5": (table5, 150),
}


def run_part(
    name: str, backend: TritonBackend, sizes: Sizes, file: str, folder: Path, longest: int | None = None
) -> list[Row]:
    """One part in this process, published after each row. An error is its last row. longest: as in `run_apart`."""
    rows: list[Row] = []
    question, limit = PARTS[name][0], longest or PARTS[name][1]
    until = time.monotonic() + 0.8 * limit
    try:
        for row in question(backend, sizes):
            rows.append(row)
            publish(file, name, rows, "python -m bench.gpu", note=note(backend), folder=folder)
            if time.monotonic() > until:
                rows.append({"left out": f"what came after {0.8 * limit:.0f} s"})
                break
    except Exception as error:
        traceback.print_exc()
        rows.append({"error": f"{type(error).__name__}: {error}"})
    publish(file, name, rows, "python -m bench.gpu", note=note(backend), folder=folder)
    return rows


def note(backend: TritonBackend) -> str:
    """What a GPU's numbers need next to them: versions, driver, clocks."""
    text = f"triton {triton.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}, {backend.gpu().name}"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return f"{text}. {found}".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts; all if left out")
    parser.add_argument("--limit", type=int, help="seconds for each part, in place of its own limit")
    parser.add_argument("--toy", action="store_true", help="tiny matrices, to see whether it runs")
    # What the processes that this one starts are asked for.
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, metavar="RANK", help=argparse.SUPPRESS)
    parser.add_argument("--checksum", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a GPU; without one see bench.table5, and tests/kernels for the proofs")
    backend = TritonBackend(torch.device("cuda", torch.cuda.current_device()))
    sizes = TOY if given.toy else FULL
    file = f"gpu-{torch.cuda.get_device_name().replace(' ', '-')}"
    if given.checksum:
        shape, dtype = sizes.steps[0]
        (A, _), *_ = final(backend, problems_of([synthetic(shape, dtype, 0)], 8), sizes.repeated_steps).values()
        print(float(A.double().sum()))
    elif given.compile:
        compile_all(backend, sizes, given.compile)
    elif given.row:
        name, way = given.row
        model = next(model for model in MODELS if model.name == name)
        print(json.dumps(asdict(measure(model, way, backend.device.type))))
    elif given.part:
        run_part(given.part, backend, sizes, file, given.output, given.limit)
    else:
        run_apart(given.only, file, given.output, ["--toy"] if given.toy else [], given.limit)


def run_apart(
    parts: Sequence[str], file: str, folder: Path, options: Sequence[str], longest: int | None = None
) -> None:
    """Each part in a process of its own, within `longest` seconds, or its own limit."""
    for name in parts:
        limit = longest or PARTS[name][1]
        command = [sys.executable, "-m", "bench.gpu", "--part", name, "--output", str(folder)]
        command += ["--limit", str(limit), *options]
        try:
            subprocess.run(command, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit} s; its rows so far are kept", file=sys.stderr)
    print(f"wrote {folder / file}.json: please send it back", file=sys.stderr)


if __name__ == "__main__":
    main()
