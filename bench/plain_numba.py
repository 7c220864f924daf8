"""What the LLVM intrinsics of kernels/cpu/simd.py are worth: the same step with plain numba loops in their place.

    python -m bench.plain_numba         prints a table: the four shapes of the step benchmark, rank 8, ms a step

`loops` is the simplest plain form: fastmath, slices of known origin, the innermost loop over
neighbours. Each variant runs in a process of its own with a cache of its own, since numba's files do not know which
functions a kernel has called.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from numba import njit
from rich.console import Console
from rich.table import Table

from inilora_kernels.kernels.backend import Batch, Problem, Schedule
from inilora_kernels.kernels.cpu import simd

SHAPES = {(12, 384): 1200, (24, 768): 240, (8, 2048): 40, (4, 4096): 12}
RANK, TURNS = 8, 3


def replace_intrinsics() -> None:
    """Put plain loops in place of both products; before step.py is imported, which compiles what it finds."""
    panel = simd.PANEL

    @njit(nogil=True, fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
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

    @njit(nogil=True, fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
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


def measure(variant: str) -> list[float]:
    """Seconds a step of each shape, float32, the median of TURNS."""
    if variant == "loops":
        replace_intrinsics()
    from inilora_kernels.kernels.cpu.backend import CpuBackend

    backend = CpuBackend(torch.get_num_threads())
    found = []
    for (count, size), intrinsic_steps in SHAPES.items():
        steps = intrinsic_steps if variant == "intrinsics" else max(3, intrinsic_steps // 8)
        torch.manual_seed(0)
        A, B = torch.randn(RANK, size) * 0.02, torch.randn(size, RANK) * 0.02
        matrices = [torch.randn(size, size) * 0.05 for _ in range(count)]
        problems = [Problem(lambda W=W: W, (size, size), W.dtype, A, B) for W in matrices]

        def seconds(steps: int, problems: list[Problem] = problems) -> float:
            schedule = Schedule(steps, 5e-4, 5000, 0.9, "mse")
            start = time.perf_counter()
            backend.adam(Batch(problems, schedule, [steps]))
            return time.perf_counter() - start

        seconds(2)
        # Packing and the final loss are in both: the difference is the steps alone.
        found.append(statistics.median((seconds(steps) - seconds(1)) / (steps - 1) for _ in range(TURNS)))
    return found


def main() -> None:
    columns = {}
    for variant in ("intrinsics", "loops"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "bench.plain_numba", variant]
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600)
        columns[variant] = [float(value) for value in done.stdout.split()]
    table = Table("matrices", "intrinsics, ms a step", "GFLOP/s", "plain numba, ms a step", "GFLOP/s", "ratio")
    for (count, size), fast, slow in zip(SHAPES, *columns.values(), strict=True):
        flops = 4 * count * size * size * RANK / 1e9
        cells = (1e3 * fast, flops / fast, 1e3 * slow, flops / slow, slow / fast)
        table.add_row(f"{count}×{size}²", *(f"{cell:.3g}" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]))
    else:
        main()
