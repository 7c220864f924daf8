"""What thousands of steps in one launch would gain, predicted: the arithmetic behind docs/kernels.md, "W on the chip".

python -m bench.one_launch

W on the chip: programs that are all on the device at once (a cooperative launch) each keep a part of W in shared
memory and registers, and meet twice a step at a barrier of atomics in L2. A program a matrix: no barrier but its own;
W comes from L2 each step. Both are compared with today's two launches, as the cost model predicts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from inilora_kernels.kernels.gpu.cost_model import Matrix, choose, product_rate, reached, step_of, wave_step
from inilora_kernels.kernels.gpu.gpus import GPUS, Gpu
from inilora_kernels.kernels.gpu.waves import divide

RANK = 8


@dataclass(frozen=True)
class Chip:
    """What the cost model does not need: shared memory and half the registers of a multiprocessor, and its clock.

    NVIDIA's and AMD's whitepapers, as in gpus.py. A multiprocessor draws 64 bytes a clock from L2.
    """

    kilobytes: int
    clock: float


CHIPS = {
    "rtx4090": Chip(100 + 128, 2.52e9),
    "a100": Chip(164 + 128, 1.41e9),
    "h100": Chip(228 + 128, 1.83e9),
    "h200": Chip(228 + 128, 1.83e9),
    "b200": Chip(228 + 128, 1.85e9),
    "mi300x": Chip(64 + 256, 2.1e9),
}
DRAWN = 64
# A barrier of atomics through L2, and the latencies of a step within one program: assumptions.
BARRIER, LATENCIES = 1.25e-6, 1e-6

# Query and value matrices of small models as published: Table 5's rows first.
ROWS: dict[str, tuple[int, Matrix]] = {
    "RoBERTa Base, 24 of 768² float32": (24, Matrix((768, 768), 4, RANK)),
    "RoBERTa Large, 48 of 1024² float32": (48, Matrix((1024, 1024), 4, RANK)),
    "MiniLM, 12 of 384² float32": (12, Matrix((384, 384), 4, RANK)),
    "BERT Mini, 8 of 256² float32": (8, Matrix((256, 256), 4, RANK)),
    "MobileBERT, 48 of 128² float32": (48, Matrix((128, 128), 4, RANK)),
    "Whisper Tiny, 24 of 384² float16": (24, Matrix((384, 384), 2, RANK)),
    "64 of 256² bfloat16": (64, Matrix((256, 256), 2, RANK)),
}
TABLE5 = tuple(ROWS)[:2]


def today(count: int, matrix: Matrix, gpu: Gpu) -> float:
    """Seconds of a step of all matrices by two launches, in the waves that would run."""
    waves = divide([matrix] * count, [0] * count, gpu)
    parts = choose(matrix, gpu).parts
    return sum(wave_step([(matrix, parts)] * len(wave.members), gpu, wave.resident).seconds for wave in waves)


def on_the_chip(count: int, matrix: Matrix, name: str) -> float:
    """The same with W on the chip, in as few rounds as the chip's memory allows."""
    gpu, chip = GPUS[name], CHIPS[name]
    rounds = math.ceil(count / (gpu.multiprocessors * chip.kilobytes * 1024 // _bytes(matrix)))
    step = step_of(matrix, gpu, 1, count, resident=True)
    cache = gpu.cache_bandwidth * reached(gpu).cache
    # On GeForce plain float32 has three times tf32x3's peak; at best it reaches as much of it.
    peak = gpu.half if matrix.itemsize == 2 else max(gpu.float32, gpu.vector if name == "rtx4090" else 0.0)
    slots_and_state = (2 * step.partial_bytes + step.state_bytes) / cache
    return (
        step.flops / (peak * reached(gpu).products(matrix.itemsize, matrix.rank))
        + slots_and_state
        + rounds * 2 * BARRIER
    )


def a_program_a_matrix(count: int, matrix: Matrix, name: str) -> float:
    """The same with a multiprocessor a matrix."""
    gpu, chip = GPUS[name], CHIPS[name]
    at_once = min(count, gpu.multiprocessors)
    step = step_of(matrix, gpu, 1, 1, resident=True)
    drawn = min(DRAWN * chip.clock, gpu.cache_bandwidth * reached(gpu).cache / at_once)
    peak = product_rate(gpu, matrix.itemsize, matrix.rank) / gpu.multiprocessors
    one = max(_bytes(matrix) / drawn, step.flops / peak) + step.state_bytes / drawn + LATENCIES
    return one * math.ceil(count / gpu.multiprocessors)


def _bytes(matrix: Matrix) -> int:
    return math.prod(matrix.shape) * matrix.itemsize


def main() -> None:
    print(f"| today's µs a step; how many times faster W on the chip; a program a matrix | {' | '.join(GPUS)} |")
    print("|---|" + "--:|" * len(GPUS))
    for row, (count, matrix) in ROWS.items():
        cells = []
        for name, gpu in GPUS.items():
            now = today(count, matrix, gpu)
            gains = now / on_the_chip(count, matrix, name), now / a_program_a_matrix(count, matrix, name)
            cells.append(f"{1e6 * now:.3g}; {gains[0]:.1f}; {gains[1]:.1f}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
