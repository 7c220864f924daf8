"""The cost model: its arithmetic on small cases, and the bars that Table 5 sets it."""

from __future__ import annotations

import pytest

from bench.six_models import MODELS, Model, predicted
from inilora_kernels.kernels.gpu.cost_model import (
    PARTIAL_SHARE,
    SMALL_WAVE,
    Matrix,
    choose,
    reached,
    step_of,
    wave_step,
)
from inilora_kernels.kernels.gpu.gpus import GPUS
from inilora_kernels.kernels.gpu.waves import divide

ADA = GPUS["rtx4090"]


def test_the_arithmetic_of_a_step_from_dram() -> None:
    matrix, parts, count = Matrix((4096, 4096), 2, 8), 2, 64
    step = step_of(matrix, ADA, parts, count, resident=False)
    weights = 4096 * 4096 * 2
    # 16 strips of 256 rows leave a P slot each, and each of the two parts a Q slot.
    partial = 4 * 8 * (16 * 4096 + 2 * 4096)
    assert step.weight_bytes == count * weights
    assert step.partial_bytes == count * partial
    assert step.bound == "DRAM"
    assert step.products == pytest.approx(count * (weights + partial) / (1.008e12 * reached(ADA).dram) + 2e-6)
    # Two products, each of a high and a low half.
    assert step.flops == count * 2 * (2 * 2 * 4096 * 4096 * 8)


def test_the_arithmetic_of_a_step_in_cache() -> None:
    matrix = Matrix((4096, 4096), 2, 8)
    step = step_of(matrix, ADA, 8, 1, resident=True)
    # 16 strips in 8 parts are 128 programs: one for each multiprocessor, so all are busy.
    partial = 4 * 8 * (16 * 4096 + 8 * 4096)
    cache = (4096 * 4096 * 2 + 2 * partial) / (ADA.cache_bandwidth * reached(ADA).cache)
    cores = step.flops / (ADA.half * reached(ADA).products(2, 8))
    assert step.products == pytest.approx(max(cache, cores) + ADA.launch)
    half_idle = step_of(matrix, ADA, 4, 1, resident=True)
    assert half_idle.products > 1.5 * step.products


def test_waves_fit_the_cache_where_they_are_taken() -> None:
    for gpu in GPUS.values():
        for model in MODELS:
            for group in predicted(model).groups:
                choice = choose(group.matrix, gpu)
                weights = group.matrix.shape[0] * group.matrix.shape[1] * group.matrix.itemsize
                if choice.resident:
                    assert choice.wave * weights <= gpu.cache * gpu.cache_usable
    # A matrix that no cache holds streams.
    assert not choose(Matrix((8192, 8192), 2, 8), ADA).resident


def test_a_choice_does_not_depend_on_the_neighbours() -> None:
    small, large = Matrix((768, 768), 4, 8), Matrix((4096, 4096), 4, 8)
    (alone,) = divide([small], [0], ADA)
    among = divide([small, large] * 5, [0] * 10, ADA)
    chunks = {wave.layout.places[wave.members.index(i)].chunks for wave in among for i in wave.members if i % 2 == 0}
    assert chunks == {alone.layout.places[0].chunks}


def test_a_mixed_wave_is_the_sum_of_its_members() -> None:
    one, other = (Matrix((1024, 4096), 2, 8), 4), (Matrix((4096, 4096), 2, 8), 8)
    both = wave_step([one, other, one], ADA, resident=False)
    apart = [step_of(matrix, ADA, parts, count, resident=False) for (matrix, parts), count in ((one, 2), (other, 1))]
    assert both.matrices == 3
    for name in ("weight_bytes", "partial_bytes", "state_bytes", "flops"):
        assert getattr(both, name) == sum(getattr(step, name) for step in apart)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.name)
def test_no_kernel_that_reads_W_from_the_cache_each_step_is_three_times_as_fast(model: Model, gpu: str) -> None:
    """What docs/kernels.md says of the launch-bound rows: reading and multiplying alone take more than a third."""
    plan = predicted(model, gpu)
    step = sum(group.seconds for group in plan.groups) / plan.steps
    share = reached(GPUS[gpu])
    cache = plan.weight_bytes / (GPUS[gpu].cache_bandwidth * share.cache)
    flops = sum(group.waves * group.step.flops for group in plan.groups)
    products = flops / (GPUS[gpu].float32 * share.products(4, plan.groups[0].matrix.rank))
    assert max(cache, products) > step / 3


@pytest.mark.parametrize("rank", [8, 16])
def test_parts_keep_their_partial_sums_small(rank: int) -> None:
    for shape in ((768, 768), (4096, 4096), (1024, 4096)):
        for itemsize in (2, 4):
            matrix = Matrix(shape, itemsize, rank)
            choice = choose(matrix, ADA)
            step = step_of(matrix, ADA, choice.parts, 1, choice.resident)
            assert choice.parts == 1 or step.partial_bytes <= PARTIAL_SHARE * step.weight_bytes


@pytest.mark.parametrize(
    ("count", "matrix"), [(12, Matrix((384, 384), 4, 8)), (8, Matrix((256, 256), 4, 8)), (24, Matrix((384, 384), 2, 8))]
)
@pytest.mark.parametrize("gpu", GPUS)
def test_the_few_matrices_of_a_small_model_are_divided_to_fill_the_gpu(count: int, matrix: Matrix, gpu: str) -> None:
    """MiniLM, BERT Mini and Whisper Tiny: their partial sums do not matter, idle multiprocessors do."""
    parts = choose(matrix, GPUS[gpu]).parts

    def seconds(parts: int, count: int = count) -> float:
        return wave_step([(matrix, parts)] * count, GPUS[gpu], resident=True).seconds

    assert parts > 1
    assert seconds(parts) < 0.92 * seconds(1)
    # The division is the same in every wave, and best in a full one of a small model.
    assert seconds(parts, SMALL_WAVE) < 1.2 * min(seconds(parts, SMALL_WAVE) for parts in range(1, 9))
