"""Both kernels as GPUs would run them, compiled ahead for every target, read from the binaries.

What `make test` compiles is a part that has every target, dtype and rank in it; the rest is marked slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton

from inilora_kernels.kernels.backend import WIDTH
from inilora_kernels.kernels.gpu.tiles import RANKS, StripTile, tiles

from .cases import make, make_wave
from .compiled import (
    MATRIX_PRODUCT,
    SHARED_MEMORY,
    TARGETS,
    Machine,
    compiled,
    gram_launches,
    launches,
    loaded_bytes,
    read,
    recorded,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK = {
    *((target, dtype, 8) for target in TARGETS if target != "sm_86" for dtype in (torch.bfloat16, torch.float32)),
    ("sm_89", torch.float16, 32),
    ("sm_80", torch.bfloat16, 64),
    ("sm_90", torch.float16, 128),
    ("sm_100", torch.float32, 128),
    ("gfx942", torch.float16, 16),
}
QUICK_ADAM = {("sm_80", 64), ("sm_80", 128), ("sm_89", 8), ("sm_90", 16), ("sm_100", 64), ("gfx942", 32)}


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def marked(cases: Iterable[tuple[object, ...]], quick: Iterable[tuple[object, ...]]) -> list[object]:
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def check(machine: Machine, target: str, warps: int) -> None:
    """No spills, and what one program takes fits the multiprocessor, whose share the cost model counts on."""
    assert machine.spilled == 0
    assert machine.shared <= SHARED_MEMORY[target]
    if target.startswith("sm"):
        # 64 Ki registers a multiprocessor, given out to warps in units of 256 (8 a thread).
        assert -(-machine.registers // 8) * 8 * 32 * warps <= 65_536
    else:
        # Four SIMDs a compute unit, 512 registers (vector and accumulation) for each lane of one.
        assert machine.registers * -(-warps // 4) <= 512


@pytest.mark.parametrize(
    ("target", "dtype", "rank"),
    marked(((target, dtype, rank) for target in TARGETS for dtype in DTYPES for rank in RANKS), QUICK),
)
def test_gradient_products_as_compiled(target: str, dtype: torch.dtype, rank: int) -> None:
    (launch, *_), chosen = launches(target, dtype, rank)
    kernel = compiled(launch, target)
    machine = read(kernel)
    if target.startswith("sm"):
        # W and the slots tell L2 what to keep; W's asynchronous copies did not before triton 3.9.
        told = set(re.findall(r"createpolicy\.fractional\.L2::(\w+)", kernel.asm["ptx"]))
        plain = chosen.strip.stages == 1 or triton_version() >= (3, 9)
        assert ({"evict_last", "evict_first"} if plain else {"evict_first"}) <= told
    threads = launch.options["num_warps"] * TARGETS[target].warp_size
    check(machine, target, launch.options["num_warps"])
    W_bytes = chosen.strip.rows * chosen.strip.columns * dtype.itemsize
    A_bytes = 4 * chosen.rank * chosen.strip.columns
    # The loop reads its tile of W once and its block of A once, and not a byte more; all of W by 128-bit loads.
    assert loaded_bytes(machine) * threads == W_bytes + A_bytes
    assert loaded_bytes(machine, width=16) * threads >= W_bytes
    assert any(map(MATRIX_PRODUCT.search, machine.loop))


@pytest.mark.parametrize(
    ("target", "rank"), marked(((target, rank) for target in TARGETS for rank in RANKS), QUICK_ADAM)
)
def test_adam_as_compiled(target: str, rank: int) -> None:
    (_, launch, *_), chosen = launches(target, torch.bfloat16, rank)
    machine = read(compiled(launch, target))
    check(machine, target, launch.options["num_warps"])
    # At rank 8 the product of an 8×8 matrix is too small for the tensor cores.
    assert any(map(MATRIX_PRODUCT.search, machine.instructions)) == (chosen.rank > 8)


@pytest.mark.parametrize(
    ("target", "dtype"),
    marked(
        ((target, dtype) for target in TARGETS for dtype in DTYPES),
        {("sm_89", torch.bfloat16), ("sm_90", torch.float32), ("gfx942", torch.float16)},
    ),
)
def test_loss_as_compiled(target: str, dtype: torch.dtype) -> None:
    (*_, narrow, wide), _ = launches(target, dtype, 8)
    for launch in (narrow, wide):
        check(read(compiled(launch, target)), target, launch.options["num_warps"])


@pytest.mark.parametrize(
    ("target", "dtype"),
    marked(
        ((target, dtype) for target in TARGETS for dtype in DTYPES),
        {
            ("sm_80", torch.bfloat16),
            ("sm_89", torch.float32),
            ("sm_90", torch.float16),
            ("sm_90", torch.float32),
            ("sm_100", torch.bfloat16),
            ("sm_120", torch.float16),
            ("gfx942", torch.bfloat16),
        },
    ),
)
def test_gram_as_compiled(target: str, dtype: torch.dtype) -> None:
    both, tile = gram_launches(target, dtype)
    for launch in both:
        machine = read(compiled(launch, target))
        check(machine, target, tile.warps)
        threads = tile.warps * TARGETS[target].warp_size
        # Its tile of W, and of the given block what is not loaded ahead of the loop: nothing twice, all 128 bits wide.
        W_bytes, given_bytes = tile.own * tile.inner * dtype.itemsize, 4 * WIDTH * tile.inner
        assert W_bytes <= loaded_bytes(machine, width=16) * threads == loaded_bytes(machine) * threads
        assert loaded_bytes(machine) * threads <= W_bytes + given_bytes
        assert any(map(MATRIX_PRODUCT.search, machine.loop))


def test_a_tile_too_large_is_caught() -> None:
    chosen = tiles("sm_80", 2, 32)
    weights, problems = make([(300, 272)], [32], torch.bfloat16)
    wave = make_wave(weights, problems, replace(chosen, strip=StripTile(256, 64, 8, 1)))
    machine = read(compiled(recorded(wave)[0], "sm_80"))
    with pytest.raises(AssertionError):
        check(machine, "sm_80", 8)


def test_half_the_warps_that_a_tile_needs_are_caught() -> None:
    chosen = tiles("sm_90", 2, 8)
    weights, problems = make([(300, 272)], [8], torch.bfloat16)
    wave = make_wave(weights, problems, replace(chosen, strip=StripTile(256, 128, 4, 1)))
    machine = read(compiled(recorded(wave)[0], "sm_90"))
    with pytest.raises(AssertionError):
        check(machine, "sm_90", 4)
