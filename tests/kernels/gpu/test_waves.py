"""Which matrices step together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.errors import BackendError
from inilora_kernels.kernels.gpu.cost_model import WAVE_MATRICES, Matrix, choose, wave_step
from inilora_kernels.kernels.gpu.gpus import GPUS, Gpu
from inilora_kernels.kernels.gpu.waves import divide

ADA, HOPPER = GPUS["rtx4090"], GPUS["h100"]
shapes = st.sampled_from([(384, 384), (768, 768), (1024, 4096), (4096, 4096), (300, 70)])


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([8, 16]))),
    memory=st.sampled_from([2e8, 1e9, 1e12]),
)
def test_every_matrix_once_with_its_like_within_cache_and_memory(
    batch: list[tuple[tuple[int, int], torch.dtype, int]], memory: float
) -> None:
    matrices = [Matrix(shape, dtype.itemsize, rank) for shape, dtype, rank in batch]
    waves = divide(matrices, [dtype for _, dtype, _ in batch], ADA, memory)
    assert Counter(index for wave in waves for index in wave.members) == Counter(range(len(batch)))
    for wave in waves:
        assert len({(batch[index][1], batch[index][2]) for index in wave.members}) == 1
        assert len(wave.members) <= WAVE_MATRICES
        assert wave.bytes <= memory
        if wave.resident:
            assert wave.weight_bytes + wave.layout.state_bytes <= ADA.cache * ADA.cache_usable


def test_equal_matrices_are_divided_evenly_and_share_a_layout() -> None:
    waves = divide([Matrix((768, 768), 4, 8)] * 24, [0] * 24, ADA)
    assert [len(wave.members) for wave in waves] == [12, 12]
    llama = divide([Matrix((4096, 4096), 2, 8)] * 64, [0] * 64, ADA)
    assert len(llama) == 64
    assert len({wave.layout for wave in llama}) == 1


@pytest.mark.parametrize(
    ("gpu", "matrix", "count"),
    [(GPUS["b200"], Matrix((576, 576), 2, 8), 64), (GPUS["mi300x"], Matrix((1280, 1280), 4, 32), 24)],
)
def test_many_that_would_take_two_waves_in_the_cache_stream_as_one_where_that_is_faster(
    gpu: Gpu, matrix: Matrix, count: int
) -> None:
    (wave,) = divide([matrix] * count, [0] * count, gpu)
    assert not wave.resident
    choice = choose(matrix, gpu)
    assert choice.resident
    members = [(matrix, choice.parts)]
    halves = 2 * wave_step(members * (count // 2), gpu, resident=True).seconds
    assert wave_step(members * count, gpu, resident=False).seconds < 0.8 * halves
    # The bits of each follow from the division of its columns, which is what it is for one alone.
    (alone,) = divide([matrix], [0], gpu)
    assert {place.chunk for place in wave.layout.places} == {alone.layout.places[0].chunk}


def test_three_ragged_matrices_are_one_wave() -> None:
    ragged = [Matrix((530, 397), 4, 8), Matrix((300, 1040), 4, 8), Matrix((33, 24), 4, 8)]
    for gpu in GPUS.values():
        (wave,) = divide(ragged, [0] * 3, gpu)
        assert sorted(wave.members) == [0, 1, 2]


def test_what_never_fits_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        BackendError, match=r"H100 SXM has 1 GB free, but a 53248×16384 matrix at rank 8 needs 1\.\d+ GB"
    ):
        divide([Matrix((64, 64), 2, 8), Matrix((53_248, 16_384), 2, 8)], [0, 0], HOPPER, 1e9)
