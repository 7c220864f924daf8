"""The six models of the paper's Table 5: their matrices, what the cost model predicts for them, and one run of a row.

Needs torch, numpy and, on a GPU, triton; nothing that a bare CUDA image lacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inilora_kernels.kernels.backend import Batch, Problem, Schedule
from inilora_kernels.kernels.gpu.cost_model import Matrix
from inilora_kernels.kernels.gpu.forecast import Plan, plan
from inilora_kernels.kernels.gpu.gpus import GPUS
from inilora_kernels.kernels.loading import load_backend

from .harness import PeakMemory, seconds
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


# Shape, dtype and reader of each matrix.
Loaders = list[tuple[tuple[int, int], torch.dtype, Callable[[], Tensor]]]


def synthetic_loaders(model: Model) -> Loaders:
    """Synthetic query and value matrices."""
    dtype = getattr(torch, model.dtype)
    return [
        (shape, dtype, partial(synthetic, shape, dtype, place % DISTINCT)) for place, shape in enumerate(model.shapes)
    ]


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


def measure(
    model: Model, way: str, device: str, *, matrices: Loaders | None = None, steps: int | None = None
) -> Measured:
    """Run one way of one row on `device` in this process. matrices: a real model's; otherwise synthetic ones."""
    everything = synthetic_loaders(model) if matrices is None else matrices
    if device == "cpu":
        entries = model.query[0] * model.query[1]
        count, ours_steps, paper_steps = next(sample for limit, sample in CPU_SAMPLE if entries < limit)
        chosen = everything[:count]
        run_steps = steps or (ours_steps if way == "ours" else paper_steps)
    else:
        chosen = everything
        run_steps = steps or (STEPS if way == "ours" else GPU_PAPER_STEPS)
    if device == "cpu" or matrices is None:
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
