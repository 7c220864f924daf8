"""All four kernels, as triton compiles them for gfx942, executed instruction by instruction and compared with float64.

Needs clang and a checkout of tinygrad's repository on the path, and is skipped without:
    PYTHONPATH=PATH/TO/tinygrad python -m pytest tests/kernels/gpu/emulated
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("test.mockgpu.amd.emu", reason="needs a checkout of tinygrad's repository on the path")

from torch import Tensor

from inilora_kernels.kernels.backend import Schedule
from inilora_kernels.kernels.gpu.tiles import RANKS, gram_tile, tiles
from inilora_kernels.kernels.gpu.wave import Wave
from inilora_kernels.kernels.reference import AdamState, adam_step, residual_loss

from ..cases import DTYPES, PRODUCT_ERROR, check_products, guarded_run, make, make_wave, relative
from ..gram_cases import batch_of, check, matrices, unit_vectors
from .gfx942 import emulated


def rounded(weights: list[Tensor]) -> list[Tensor]:
    """The emulator takes float16's subnormal numbers for zeros in a matrix product, so here W has none."""
    return [W.masked_fill_(W.abs() < 2**-14, 0) if W.dtype == torch.float16 else W for W in weights]


def follows(wave: Wave, weights: list[Tensor], starts: list[AdamState], steps: int, schedule: Schedule) -> None:
    """Assert that the wave's factors are where float64 is after `steps` steps, against the distance moved."""
    for index, (W, state) in enumerate(zip(weights, starts, strict=True)):
        A0, B0 = state.A.clone(), state.B.clone()
        for step in range(steps):
            adam_step(W.double(), state, step, schedule)
        A, B = wave.pair(index)
        # As in test_fifty_steps_follow_the_reference: Adam's quotient magnifies what a product loses.
        bound = 50 * PRODUCT_ERROR[W.dtype]
        assert float((A.double() - state.A).norm() / (state.A - A0).norm()) < bound
        assert float((B.double() - state.B).norm() / (state.B - B0).norm()) < bound
        assert residual_loss(W, A, B) == pytest.approx(residual_loss(W.double(), state.A, state.B), rel=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_step_of_ragged_matrices(rank: int, dtype: torch.dtype) -> None:
    # Two strips and an odd edge; a matrix smaller than its tile; a rank that is not the compiled one.
    shapes, ranks = [(270, 131), (33, 24)], [rank, rank - 3]
    weights, problems = make(shapes, ranks, dtype)
    rounded(weights)
    schedule = Schedule(steps=1, lr=2e-3, step_size=20, gamma=0.9, loss="mse")
    with emulated():
        wave = make_wave(weights, problems, tiles("gfx942", dtype.itemsize, rank), [2, 1], schedule)
        starts = [AdamState.start(problem.A.double(), problem.B.double()) for problem in problems]
        grams = [(state.A @ state.A.T, state.B.T @ state.B) for state in starts]
        wave.multiply()
        check_products(wave, weights, problems)
        compiled_rank = wave.layout.tiles.rank
        for place, expected in zip(wave.layout.places, grams, strict=True):
            for at, true in zip((place.A_gram_offset, place.B_gram_offset), expected, strict=True):
                gram = wave.grams[at:][: compiled_rank**2].view(compiled_rank, compiled_rank)
                assert relative(gram[: place.rank, : place.rank], true) < 1e-6
                assert gram[place.rank :].abs().sum() == 0
        wave.update()
    follows(wave, weights, starts, 1, schedule)


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.bfloat16), (8, torch.float32), (16, torch.float16)])
def test_twenty_steps_follow_the_reference(rank: int, dtype: torch.dtype) -> None:
    weights, problems = make([(70, 100), (33, 24)], [rank, rank], dtype)
    rounded(weights)
    schedule = Schedule(steps=20, lr=2e-3, step_size=8, gamma=0.9, loss="mse")
    with emulated():
        wave = make_wave(weights, problems, tiles("gfx942", dtype.itemsize, rank), [1, 1], schedule)
        wave.advance(20)
    follows(wave, weights, [AdamState.start(p.A.double(), p.B.double()) for p in problems], 20, schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_guard_bands_stay_untouched(dtype: torch.dtype) -> None:
    guarded_run(dtype=dtype, context=emulated(), tiles=tiles("gfx942", dtype.itemsize, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_ragged_matrices(dtype: torch.dtype) -> None:
    weights, problems = make([(70, 145), (33, 24)], [5, 8], dtype, scale=0.3)
    with emulated():
        wave = make_wave(weights, problems, tiles("gfx942", dtype.itemsize, 8), [2, 1])
        # The bounds of the interpreter's test.
        for wide, error in ((True, 1e-13), (False, 1e-8)):
            wave.losses.fill_(torch.nan)
            wave.judge(wide=wide)
            for index, (loss, A, B) in wave.sampled().items():
                true = residual_loss(weights[index].double(), A.double(), B.double())
                assert loss == pytest.approx(true, rel=error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_direct_solvers_products_of_ragged_matrices(dtype: torch.dtype) -> None:
    # A tall, a wide and a small one; several programs and steps of each, and edges in both.
    weights = rounded(matrices([(150, 131), (70, 145), (33, 24)], dtype))
    with emulated():
        batch = batch_of(weights, gram_tile("gfx942", dtype.itemsize), cache=3e4)
        X = unit_vectors(batch)
        batch(X)
    check(batch, X, weights)


def test_a_wrong_stride_is_caught() -> None:
    weights, problems = make([(70, 100)], [8], torch.bfloat16)
    with emulated():
        wave = make_wave(weights, problems, tiles("gfx942", 2, 8))
        wave.strips[:, 1] -= 16
        wave.multiply()
    with pytest.raises(AssertionError):
        check_products(wave, weights, problems)
