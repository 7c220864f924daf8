"""The loss kernel, interpreted, against the residual in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from inilora_kernels.kernels.reference import residual_loss

from .cases import DTYPES, make, make_wave, small_tiles
from .interpreter import interpreted

SHAPES, PARTS = [(70, 145), (33, 24)], [2, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_ragged_matrices(dtype: torch.dtype) -> None:
    weights, problems = make(SHAPES, [5, 8], dtype, scale=0.3)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(8), PARTS)
        for wide, error in ((True, 1e-13), (False, 1e-8)):
            wave.judge(wide=wide)
            for index, (loss, A, B) in wave.sampled().items():
                true = residual_loss(weights[index].double(), A.double(), B.double())
                # float64 sums of 10⁴ terms; float32 residuals, whose roundings of 2⁻²⁴ differ in sign.
                assert loss == pytest.approx(true, rel=error)


def test_the_stated_error_of_a_float32_residual_holds_where_it_hurts() -> None:
    """W = BA but for rounding: the residual is all error, and the bound 2·√f·δ + δ² is what is left."""
    weights, problems = make([(64, 96)], [8], torch.float32, scale=1.0)
    A, B = problems[0].A, problems[0].B
    weights[0].copy_(B @ A)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(8))
        wave.judge(wide=False)
        (loss, _, _) = wave.sampled()[0]
    true = residual_loss(weights[0].double(), A.double(), B.double())
    delta = 9 * 2.0**-24 * float((weights[0].abs() + B.abs() @ A.abs()).double().norm())
    assert abs(loss - true) <= 2 * true**0.5 * delta + delta**2


def test_the_sum_keeps_what_float32_would_lose() -> None:
    """A first square of 2²⁴ and then thousands of ones: plain float32 would add none of them."""
    weights, problems = make([(64, 2048)], [1], torch.float32)
    weights[0].fill_(1.0)
    weights[0][::16, ::128] = 4096.0
    problems[0].A.zero_()
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(1))
        wave.judge(wide=False)
        assert wave.sampled()[0][0] == float(weights[0].double().square().sum())


def test_a_finished_matrix_costs_no_reading() -> None:
    weights, problems = make(SHAPES, [5, 8], torch.bfloat16)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(8), PARTS)
        wave.keep([1])
        # A read of the first matrix would come back as NaN, and spread.
        wave.weights[: wave.layout.places[1].W_offset] = float("nan")
        wave.advance(2)
        wave.judge(wide=True)
        sampled = wave.sampled()
    assert list(sampled) == [1]
    assert sampled[1][0] > 0
    assert not torch.isnan(wave.losses).any()
