"""What the LLVM intrinsics of kernels/cpu/simd.py are worth: the same step with plain numba in their place.

    python -m bench.plain_numba [FOLDER]    prints a table: the four shapes of the step benchmark, rank 8, ms a step

`loops` is the shortest plain form: the innermost loop over neighbours. `unrolled` is the best that we found: blocks
written out by hand, twelve sums of the inner product in a variable each, and four rows of W a pass over four rows of
the outer product's sums. numba may reorder sums in both (fastmath). Each variant runs in a process of its own with a
cache of its own, in FOLDER if given, since numba's files do not know which functions a kernel has called; they take
turns, and all must reach the same loss.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from rich.console import Console
from rich.table import Table

from inilora_kernels.kernels.backend import Batch, Problem, Sample, Schedule
from inilora_kernels.kernels.cpu import simd

# Steps in a turn.
SHAPES = {(12, 384): 200, (24, 768): 30, (8, 2048): 10, (4, 4096): 6}
RANK, TURNS = 8, 5
# Each variant sums products of float32 in an order of its own.
LOSS_ERROR = 1e-7
FAST = {"nogil": True, "fastmath": True, "error_model": "numpy"}


def use_loops() -> None:
    """Put simple loops in place of both products; before step.py is imported, which compiles what it finds."""
    panel = simd.PANEL

    @njit(**FAST)  # type: ignore[untyped-decorator]
    def outer_products(
        out: Any, out_at: int, out_stride: int, x: Any, x_at: int, x_step: int, x_stride: int, W: Any, W_at: int,
        W_step: int, count: int, rows: int, lanes: int, vectors: int,
    ) -> None:  # fmt: skip
        width = lanes * vectors
        for i in range(count):
            values = W[W_at + i * W_step : W_at + i * W_step + width]
            for p in range(rows):
                factor = x[x_at + i * x_step + p * x_stride]
                sums = out[out_at + p * out_stride : out_at + p * out_stride + width]
                for j in range(width):
                    sums[j] += factor * values[j]

    @njit(**FAST)  # type: ignore[untyped-decorator]
    def inner_products(
        out: Any, out_at: int, out_stride: int, W: Any, W_at: int, W_panel: int, A: Any, A_at: int, A_panel: int,
        panels: int, rows: int, group: int,
    ) -> None:  # fmt: skip
        for i in range(rows):
            for p in range(group):
                total = np.float32(0)
                for n in range(panels):
                    values = W[W_at + n * W_panel + i * panel : W_at + n * W_panel + (i + 1) * panel]
                    others = A[A_at + n * A_panel + p * panel : A_at + n * A_panel + (p + 1) * panel]
                    for j in range(panel):
                        total += values[j] * others[j]
                out[out_at + i * out_stride + p] += total

    simd.outer_products, simd.inner_products = outer_products, inner_products


def use_unrolled_loops() -> None:
    """Put blocks written out by hand in place of both products: see `use_loops`."""
    panel = simd.PANEL

    @njit(**FAST)  # type: ignore[untyped-decorator]
    def outer_products(
        out: Any, out_at: int, out_stride: int, x: Any, x_at: int, x_step: int, x_stride: int, W: Any, W_at: int,
        W_step: int, count: int, rows: int, lanes: int, vectors: int,
    ) -> None:  # fmt: skip
        width = lanes * vectors
        whole, fours = count // 4 * 4, rows // 4 * 4
        for p in range(0, fours, 4):
            here = out_at + p * out_stride
            out0, out1 = out[here : here + width], out[here + out_stride : here + out_stride + width]
            here += 2 * out_stride
            out2, out3 = out[here : here + width], out[here + out_stride : here + out_stride + width]
            for i in range(0, whole, 4):
                at, x0 = W_at + i * W_step, x_at + i * x_step + p * x_stride
                W0, W1 = W[at : at + width], W[at + W_step : at + W_step + width]
                W2, W3 = W[at + 2 * W_step : at + 2 * W_step + width], W[at + 3 * W_step : at + 3 * W_step + width]
                x1, x2, x3 = x0 + x_stride, x0 + 2 * x_stride, x0 + 3 * x_stride
                x00, x10, x20, x30 = x[x0], x[x0 + x_step], x[x0 + 2 * x_step], x[x0 + 3 * x_step]
                x01, x11, x21, x31 = x[x1], x[x1 + x_step], x[x1 + 2 * x_step], x[x1 + 3 * x_step]
                x02, x12, x22, x32 = x[x2], x[x2 + x_step], x[x2 + 2 * x_step], x[x2 + 3 * x_step]
                x03, x13, x23, x33 = x[x3], x[x3 + x_step], x[x3 + 2 * x_step], x[x3 + 3 * x_step]
                for j in range(width):
                    w0, w1, w2, w3 = W0[j], W1[j], W2[j], W3[j]
                    out0[j] += x00 * w0 + x10 * w1 + x20 * w2 + x30 * w3
                    out1[j] += x01 * w0 + x11 * w1 + x21 * w2 + x31 * w3
                    out2[j] += x02 * w0 + x12 * w1 + x22 * w2 + x32 * w3
                    out3[j] += x03 * w0 + x13 * w1 + x23 * w2 + x33 * w3
        for p in range(rows):
            sums = out[out_at + p * out_stride : out_at + p * out_stride + width]
            for i in range(whole if p < fours else 0, count):
                factor = x[x_at + i * x_step + p * x_stride]
                values = W[W_at + i * W_step : W_at + i * W_step + width]
                for j in range(width):
                    sums[j] += factor * values[j]

    @njit(**FAST)  # type: ignore[untyped-decorator]
    def inner_products(
        out: Any, out_at: int, out_stride: int, W: Any, W_at: int, W_panel: int, A: Any, A_at: int, A_panel: int,
        panels: int, rows: int, group: int,
    ) -> None:  # fmt: skip
        # Two or three rows and a multiple of four columns, as step.py asks for them.
        for p in range(0, group, 4):
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
            s20 = s21 = s22 = s23 = np.float32(0)
            last = 2 if rows == 3 else 1
            for n in range(panels):
                at, others = W_at + n * W_panel, A_at + n * A_panel + p * panel
                W0, W1 = W[at : at + panel], W[at + panel : at + 2 * panel]
                W2 = W[at + last * panel : at + (last + 1) * panel]
                A0, A1 = A[others : others + panel], A[others + panel : others + 2 * panel]
                A2 = A[others + 2 * panel : others + 3 * panel]
                A3 = A[others + 3 * panel : others + 4 * panel]
                for j in range(panel):
                    w0, w1, w2 = W0[j], W1[j], W2[j]
                    a0, a1, a2, a3 = A0[j], A1[j], A2[j], A3[j]
                    s00 += w0 * a0
                    s01 += w0 * a1
                    s02 += w0 * a2
                    s03 += w0 * a3
                    s10 += w1 * a0
                    s11 += w1 * a1
                    s12 += w1 * a2
                    s13 += w1 * a3
                    s20 += w2 * a0
                    s21 += w2 * a1
                    s22 += w2 * a2
                    s23 += w2 * a3
            for i, sums in enumerate(((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23))):
                if i < rows:
                    for c in range(4):
                        out[out_at + i * out_stride + p + c] += sums[c]

    simd.outer_products, simd.inner_products = outer_products, inner_products


VARIANTS: dict[str, Callable[[], None]] = {
    "intrinsics": lambda: None,
    "unrolled": use_unrolled_loops,
    "loops": use_loops,
}


def serve(variant: str) -> None:
    """Print the loss after eight steps of each shape; then seconds a step for each number of a shape in the input."""
    VARIANTS[variant]()
    from inilora_kernels.kernels.cpu.backend import CpuBackend

    backend = CpuBackend(torch.get_num_threads())
    losses: list[float] = []

    def seconds(problems: Sequence[Problem], steps: int) -> float:
        def keep(sample: Sample) -> bool:
            losses.append(sample.loss)
            return True

        start = time.perf_counter()
        backend.adam(Batch(problems, Schedule(steps, 5e-4, 5000, 0.9, "mse"), [steps], keep))
        return time.perf_counter() - start

    def problems_of(count: int, size: int) -> list[Problem]:
        torch.manual_seed(0)
        A, B = torch.randn(RANK, size) * 0.02, torch.randn(size, RANK) * 0.02
        matrices = [torch.randn(size, size) * 0.05 for _ in range(count)]
        return [Problem(lambda W=W: W, (size, size), W.dtype, A, B) for W in matrices]

    batches = [problems_of(count, size) for count, size in SHAPES]
    for problems in batches:
        seconds(problems, 8)
    print(math.fsum(losses), flush=True)
    for line in sys.stdin:
        problems, steps = batches[int(line)], list(SHAPES.values())[int(line)]
        # Packing and the final loss are in both: the difference is the steps alone.
        print((seconds(problems, steps) - seconds(problems, 1)) / (steps - 1), flush=True)


class Variant:
    """A process that serves one variant."""

    def __init__(self, name: str, cache: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.plain_numba", name],
            env={**os.environ, "NUMBA_CACHE_DIR": str(Path(cache, name))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self, line: str = "") -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def main(cache: str) -> None:
    variants = {name: Variant(name, cache) for name in VARIANTS}
    losses = {name: variant.answer() for name, variant in variants.items()}
    if not all(math.isclose(loss, losses["intrinsics"], rel_tol=LOSS_ERROR) for loss in losses.values()):
        raise SystemExit(f"the variants do not reach the same loss: {losses}")
    table = Table("matrices", "intrinsics, ms a step", "unrolled", "ratio", "loops", "ratio")
    for index, (count, size) in enumerate(SHAPES):
        turns = [[variant.answer(f"{index}\n") for variant in variants.values()] for _ in range(TURNS)]
        taken = [1e3 * statistics.median(column) for column in zip(*turns, strict=True)]
        ratios = [statistics.median(turn[other] / turn[0] for turn in turns) for other in (1, 2)]
        cells = (taken[0], taken[1], ratios[0], taken[2], ratios[1])
        table.add_row(f"{count}×{size}²", *(f"{cell:.3g}" for cell in cells))
    for variant in variants.values():
        variant.end()
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in VARIANTS:
        serve(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(sys.argv[1] if sys.argv[1:] else folder)
