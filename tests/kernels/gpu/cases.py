"""Matrices, waves and checks that the tests of the Triton kernels share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inilora_kernels.kernels.backend import Problem, Schedule
from inilora_kernels.kernels.gpu.layout import Layout, lay_out
from inilora_kernels.kernels.gpu.tiles import BlockTile, StripTile, Tiles, padded_rank
from inilora_kernels.kernels.gpu.wave import Wave, padded_view, rate_table, start_of
from inilora_kernels.kernels.reference import gradient_products

from .interpreter import ADAM, GRADIENT_PRODUCTS, interpreted

# Relative to the product's norm. float32 and float16's two halves carry 24 and 22 bits: a few roundings of 2⁻²⁴ or
# 2⁻²². bfloat16's two halves carry 16 bits: half a unit in the last place of the low half, 2⁻¹⁷ = 7.6e-6 at worst each,
# as the design allows: 2e-5.
PRODUCT_ERROR = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2e-5}
DTYPES = tuple(PRODUCT_ERROR)
CPU = torch.device("cpu")


def small_tiles(rank: int, rows: int = 32, columns: int = 16, prefetch: bool = True) -> Tiles:
    padded = padded_rank(rank)
    inner = min(16, padded)
    return Tiles(
        padded,
        StripTile(rows, columns, 4, 1 if prefetch else 3),
        BlockTile(32, 2, inner, 4),
        "ieee",
        sum_block=max(32, padded * padded // 4),
        sum_width=2,
    )


def make(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype, seed: int = 0, scale: float = 0.02
) -> tuple[list[Tensor], list[Problem]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    weights = [normal(*shape).to(dtype) for shape in shapes]
    problems = [
        Problem(lambda W=W: W, (W.shape[0], W.shape[1]), dtype, normal(rank, W.shape[1]), normal(W.shape[0], rank))
        for W, rank in zip(weights, ranks, strict=True)
    ]
    return weights, problems


def make_wave(
    weights: Sequence[Tensor],
    problems: Sequence[Problem],
    tiles: Tiles,
    parts: Sequence[int] | None = None,
    schedule: Schedule | None = None,
) -> Wave:
    layout = lay_out([p.shape for p in problems], [p.rank for p in problems], parts or [1] * len(problems), tiles)
    schedule = schedule or Schedule(steps=50, lr=5e-3, step_size=20, gamma=0.9, loss="mse")
    return loaded_wave(layout, weights, problems, schedule)


def loaded_wave(
    layout: Layout,
    weights: Sequence[Tensor],
    problems: Sequence[Problem],
    schedule: Schedule,
    device: torch.device = CPU,
) -> Wave:
    wave = Wave(layout, weights[0].dtype, rate_table(schedule, schedule.steps).to(device), schedule)
    for place, W in zip(layout.places, weights, strict=True):
        padded_view(wave.weights, place)[:, : place.columns].copy_(W)
    norms = [float(W.float().norm()) if W.dtype == torch.float16 else 0.0 for W in weights]
    wave.begin(start_of(layout, problems, schedule, norms).values)
    return wave


def products(wave: Wave, index: int) -> tuple[Tensor, Tensor]:
    """P and Q of one matrix, its slots summed in float64."""
    place = wave.layout.places[index]
    P = wave.slots[place.P_offset : place.Q_offset].view(-1, place.rank, place.row_stride).double().sum(0)
    Q = wave.slots[place.Q_offset :][: place.chunks * place.rank * place.column_stride]
    Q = Q.view(-1, place.rank, place.column_stride).double().sum(0)
    return P[:, : place.columns], Q[:, : place.rows].T


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check_products(wave: Wave, weights: Sequence[Tensor], problems: Sequence[Problem]) -> None:
    for index, (W, problem) in enumerate(zip(weights, problems, strict=True)):
        wide = W.double(), problem.A.double(), problem.B.double()
        # Each term errs on its own, so the scale is the root of the terms' squares: where they cancel, the sum is less.
        scales = gradient_products(*(matrix.square() for matrix in wide))
        for found, true, scale in zip(products(wave, index), gradient_products(*wide), scales, strict=True):
            assert float((found.double() - true).norm()) < PRODUCT_ERROR[W.dtype] * float(scale.sum().sqrt())


def poisoned_run(seed: int | None, kernel: Any = GRADIENT_PRODUCTS, adam: Any = ADAM, rank: int = 5) -> list[Tensor]:
    """Three steps with every output that a launch must write filled with NaN first."""
    weights, problems = make([(70, 45), (33, 100), (64, 64)], [rank] * 3, torch.bfloat16)
    with interpreted(kernel, adam, seed):
        wave = make_wave(weights, problems, small_tiles(rank), [2, 3, 1])
        for _ in range(3):
            wave.slots.fill_(math.nan)
            wave.grams.fill_(math.nan)
            wave.multiply()
            wave.shares.fill_(math.nan)
            wave.update()
    return [wave.factors, wave.means, wave.squares, wave.slots, wave.shares, wave.grams]


def guard(buffer: Tensor, width: int = 512) -> tuple[Tensor, Tensor]:
    """The buffer's copy in the middle of a larger one of NaN; the larger one, to look at afterwards."""
    whole = torch.full((buffer.numel() + 2 * width,), math.nan, dtype=buffer.dtype)
    inner = whole[width : width + buffer.numel()]
    inner.copy_(buffer.flatten())
    return inner.view(buffer.shape), whole


BUFFERS = (
    "weights",
    "factors",
    "means",
    "squares",
    "slots",
    "shares",
    "grams",
    "exponents",
    "rates",
    "epsilons",
    "losses",
)


def guarded_run(
    kernel: Any = GRADIENT_PRODUCTS,
    adam: Any = ADAM,
    dtype: torch.dtype = torch.float32,
    context: AbstractContextManager[None] | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Raise AssertionError if a kernel reads or writes outside its tensors. context: another way to run them."""
    weights, problems = make([(70, 45), (33, 97)], [3, 5], dtype)
    with context or interpreted(kernel, adam):
        # Tiles of 32 columns over rows of 48 and 112 elements: every row ends inside a tile.
        wave = make_wave(weights, problems, tiles or small_tiles(5, columns=32), [2, 1])
        wholes = []
        for name in BUFFERS:
            inner, whole = guard(getattr(wave, name))
            setattr(wave, name, inner)
            wholes.append((name, inner, whole))
        wave.multiply()
        check_products(wave, weights, problems)
        wave.update()
        for wide in (False, True):
            wave.judge(wide=wide)
    for name, inner, whole in wholes:
        assert not torch.isnan(inner).any(), f"{name}: a read out of bounds came back as NaN"
        assert int(torch.isnan(whole).sum()) == 1024, f"{name}: a guard band was written"
