"""The Triton kernels, interpreted, against float64; and the faults these tests must catch."""

from __future__ import annotations

import inspect
import linecache
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.errors import BackendError
from inilora_kernels.kernels import Problem, Sample, Schedule, load_backend
from inilora_kernels.kernels.reference import AdamState, adam_step, gradient_products, residual_loss

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from inilora_kernels.kernels import triton_kernels
from inilora_kernels.kernels.triton import TritonBackend
from inilora_kernels.kernels.triton_tiles import RANKS, BlockTile, StripTile, Tiles, padded_rank
from inilora_kernels.kernels.triton_wave import Wave, lay_out, padded_weight

from .triton_interpreter import ADAM, GRADIENT_PRODUCTS, interpreted

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
        Problem(lambda W=W: W, (W.shape[0], W.shape[1]), normal(rank, W.shape[1]), normal(W.shape[0], rank))
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
    return Wave(layout, problems, [padded_weight(W, CPU) for W in weights], schedule, schedule.steps)


def products(wave: Wave, index: int) -> tuple[Tensor, Tensor]:
    """P and Q of one matrix, its slots summed in float64."""
    place = wave.layout.places[index]
    P = wave.slots[place.P : place.Q].view(-1, place.rank, place.row_stride).double().sum(0)
    Q = wave.slots[place.Q :][: place.chunks * place.rank * place.column_stride]
    Q = Q.view(-1, place.rank, place.column_stride).double().sum(0)
    return P[:, : place.columns], Q[:, : place.rows].T


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check_products(wave: Wave, weights: Sequence[Tensor], problems: Sequence[Problem]) -> None:
    for index, (W, problem) in enumerate(zip(weights, problems, strict=True)):
        expected = gradient_products(W.double(), problem.A.double(), problem.B.double())
        for found, true in zip(products(wave, index), expected, strict=True):
            assert relative(found, true) < PRODUCT_ERROR[W.dtype]


sizes = st.integers(1, 70)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 3),
    prefetch=st.booleans(),
    scale=st.sampled_from([1e-4, 0.02, 8.0]),
)
def test_products_of_mixed_shapes_match_float64(
    shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype, parts: int, prefetch: bool, scale: float
) -> None:
    # Ranks need not be equal within a wave, only pad to the same.
    ranks = [max(rank - index, padded_rank(rank) // 2 + 1 if rank > 8 else 1) for index in range(len(shapes))]
    weights, problems = make(shapes, ranks, dtype, scale=scale)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank, prefetch=prefetch), [parts] * len(shapes))
        wave.multiply()
    check_products(wave, weights, problems)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64, 128])
def test_products_at_every_padded_rank(rank: int, dtype: torch.dtype) -> None:
    weights, problems = make([(130, 131), (33, 140)], [rank, rank], dtype)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank, 64, 32))
        wave.multiply()
    check_products(wave, weights, problems)


def test_products_read_a_transposed_or_sliced_weight() -> None:
    base, problems = make([(40, 60)], [8], torch.bfloat16)
    for W in (base[0], base[0].T.contiguous().T, torch.cat([base[0], base[0]], dim=1)[:, :60]):
        with interpreted():
            wave = make_wave([W], problems, small_tiles(8))
            wave.multiply()
        check_products(wave, base, problems)


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_gram_matrices_are_summed_from_their_shares(rank: int) -> None:
    weights, problems = make([(70, 45), (33, 100)], [rank, rank], torch.float32)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank))
        wave.advance(2)
        A_before = [wave.pair(index)[0].clone() for index in range(2)]
        wave.multiply()
    for index, place in enumerate(wave.layout.places):
        padded = wave.layout.tiles.rank
        gram = wave.grams[place.A_gram :][: padded * padded].view(padded, padded)
        expected = A_before[index].double() @ A_before[index].double().T
        assert relative(gram[:rank, :rank], expected) < 1e-6
        assert gram[rank:].abs().sum() == 0
        assert gram[:, rank:].abs().sum() == 0


@pytest.mark.parametrize(
    ("rank", "dtype", "loss"),
    [
        (4, torch.float32, "mse"),
        (4, torch.bfloat16, "mse"),
        (16, torch.float16, "mse"),
        (16, torch.bfloat16, "frobenius"),
        (8, torch.float32, "frobenius"),
    ],
)
def test_fifty_steps_follow_the_reference(rank: int, dtype: torch.dtype, loss: str) -> None:
    schedule = Schedule(steps=50, lr=2e-3, step_size=20, gamma=0.9, loss=loss)
    weights, problems = make([(48, 37), (20, 33)], [rank, rank], dtype)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank, columns=32), [1, 2], schedule)
        wave.advance(50)
    for index, (W, problem) in enumerate(zip(weights, problems, strict=True)):
        state = AdamState.start(problem.A.double(), problem.B.double())
        for step in range(50):
            adam_step(W.double(), state, step, schedule)
        A, B = wave.pair(index)
        moved = state.A - problem.A.double()
        # Against the distance moved. Where a gradient is nearly zero Adam's quotient turns on its last digits, so a
        # product error of 2e-5 shows as up to a hundred times that in single entries, and far less in the norm.
        assert float((A.double() - state.A).norm() / moved.norm()) < 50 * PRODUCT_ERROR[dtype]
        assert float((B.double() - state.B).norm() / (state.B - problem.B.double()).norm()) < 50 * PRODUCT_ERROR[dtype]
        found, true = residual_loss(W, A, B), residual_loss(W.double(), state.A, state.B)
        assert math.isclose(found, true, rel_tol=50 * PRODUCT_ERROR[dtype])


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


def test_any_program_order_gives_the_same_bits_and_writes_every_output() -> None:
    straight = poisoned_run(None)
    for seed in (1, 2):
        for one, other in zip(straight, poisoned_run(seed), strict=True):
            assert torch.equal(one, other)
    assert not any(torch.isnan(buffer).any() for buffer in straight)


def guard(buffer: Tensor, width: int = 512) -> tuple[Tensor, Tensor]:
    """The buffer's copy in the middle of a larger one of NaN; the larger one, to look at afterwards."""
    whole = torch.full((buffer.numel() + 2 * width,), math.nan, dtype=buffer.dtype)
    inner = whole[width : width + buffer.numel()]
    inner.copy_(buffer.flatten())
    return inner.view(buffer.shape), whole


BUFFERS = ("factors", "means", "squares", "slots", "shares", "grams", "rates", "epsilons")


def guarded_run(kernel: Any = GRADIENT_PRODUCTS, adam: Any = ADAM, dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError if a kernel reads or writes outside its tensors."""
    weights, problems = make([(70, 45), (33, 97)], [3, 5], dtype)
    with interpreted(kernel, adam):
        # Tiles of 32 columns over rows of 48 and 112 elements: every row ends inside a tile.
        wave = make_wave(weights, problems, small_tiles(5, columns=32), [2, 1])
        wholes = []
        for name in BUFFERS:
            inner, whole = guard(getattr(wave, name))
            setattr(wave, name, inner)
            wholes.append((name, inner, whole))
        for index, W in enumerate(wave.weights):
            wave.weights[index], whole = guard(W)
            wholes.append((f"W{index}", wave.weights[index], whole))
        wave.keep(wave.active)
        wave.multiply()
        check_products(wave, weights, problems)
        wave.update()
    for name, inner, whole in wholes:
        assert not torch.isnan(inner).any(), f"{name}: a read out of bounds came back as NaN"
        assert int(torch.isnan(whole).sum()) == 1024, f"{name}: a guard band was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_bands_stay_untouched(dtype: torch.dtype) -> None:
    guarded_run(dtype=dtype)


def planted(kernel: Callable[..., Any], right: str, wrong: str, count: int = 1) -> InterpretedFunction:
    """The kernel with one piece of its source replaced: a fault that the tests above must find."""
    source = inspect.getsource(kernel.fn)  # type: ignore[attr-defined]
    source = source[source.index("def ") :]
    assert source.count(right) >= 1, right
    source = source.replace(right, wrong, count)
    name = f"<planted {wrong}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(triton_kernels.__dict__)
    exec(compile(source, name, "exec"), namespace)
    return InterpretedFunction(namespace[kernel.fn.__name__])  # type: ignore[attr-defined]


STRIPS, BLOCKS = triton_kernels.gradient_products_kernel, triton_kernels.adam_kernel


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inside_rows = row < rows", "inside_rows = row <= rows"),
        ("inside_rank = r < rank", "inside_rank = r <= rank"),
        ("inside_columns = column < last_column", "inside_columns = column <= last_column"),
        ("mask=inside_rows[:, None] & (column_next < last_column)[None, :]", "mask=inside_rows[:, None]"),
    ],
)
def test_an_off_by_one_mask_is_caught(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, right, wrong))


def test_a_wrong_stride_is_caught() -> None:
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, "r[:, None] * B_stride", "r[:, None] * stride"))
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, "row[:, None] * stride", "row[:, None] * (stride - 1)"))


def test_a_race_between_two_programs_is_caught() -> None:
    # Every strip writes the first strip's slot: the last program to run wins, and the other slots stay unwritten.
    racing = planted(STRIPS, "P = tl.multiple_of(tl.load(work + 8), 16)", "P = tl.load(strips + 8)")
    with pytest.raises(AssertionError):
        for one, other in zip(poisoned_run(1, racing), poisoned_run(2, racing), strict=True):
            assert torch.equal(one, other)
            assert not torch.isnan(one).any()
    # An Adam block that leaves its share in its neighbour's place.
    racing = planted(BLOCKS, "share = tl.multiple_of(tl.load(work + 8), 16)", "share = tl.load(blocks + 8)")
    outcomes = [poisoned_run(seed, adam=racing) for seed in (1, 2)]
    assert any(torch.isnan(buffer).any() for buffer in outcomes[0]) or not all(
        torch.equal(one, other) for one, other in zip(*outcomes, strict=True)
    )


@pytest.fixture
def backend() -> Iterator[TritonBackend]:
    with interpreted():
        yield TritonBackend(device=CPU)


def test_the_backend_shows_every_milestone_and_loads_once(backend: TritonBackend) -> None:
    weights, _ = make([(20, 30), (64, 16), (20, 30)], [4, 4, 12], torch.bfloat16)
    weights[2] = weights[2].half()
    _, starts = make([(20, 30), (64, 16), (20, 30)], [4, 4, 12], torch.bfloat16, seed=1)
    loads: list[int] = []

    def loader(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            loads.append(index)
            return weights[index]

        return load

    problems = [Problem(loader(i), p.shape, p.A, p.B) for i, p in enumerate(starts)]
    schedule = Schedule(steps=6, lr=1e-3, step_size=3, gamma=0.9, loss="mse")
    samples: list[Sample] = []
    counted: list[int] = []

    def observe(sample: Sample) -> bool:
        samples.append(sample)
        return not (sample.index == 1 and sample.step == 2)

    backend.adam(problems, schedule, [0, 2, 6], observe, counted.append)
    assert sorted(loads) == [0, 1, 2]
    assert sorted((s.index, s.step) for s in samples) == [
        (0, 0),
        (0, 2),
        (0, 6),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 2),
        (2, 6),
    ]
    assert sum(counted) == 6 + 2 + 6
    for sample in samples:
        W, start = weights[sample.index].double(), starts[sample.index]
        state = AdamState.start(start.A.double(), start.B.double())
        for step in range(sample.step):
            adam_step(W, state, step, schedule)
        assert sample.A.dtype == torch.float32
        assert relative(sample.A, state.A) < PRODUCT_ERROR[weights[sample.index].dtype]
        assert relative(sample.B, state.B) < PRODUCT_ERROR[weights[sample.index].dtype]
        assert math.isclose(sample.loss, residual_loss(W, sample.A, sample.B), rel_tol=1e-12)


def test_a_matrix_has_the_same_bits_in_any_batch(backend: TritonBackend) -> None:
    weights, problems = make([(40, 24), (24, 40), (40, 24)], [4, 4, 4], torch.float32)
    schedule = Schedule(steps=3, lr=1e-3, step_size=3, gamma=0.9, loss="mse")

    def final(batch: list[Problem]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def observe(sample: Sample) -> bool:
            found[sample.index] = sample.A
            return True

        backend.adam(batch, schedule, [3], observe, lambda _: None)
        return found

    together = final(problems)
    for index, problem in enumerate(problems):
        assert torch.equal(final([problem])[0], together[index])


def test_ranks_beyond_the_kernels_are_refused(backend: TritonBackend) -> None:
    _, problems = make([(140, 140)], [129], torch.float32)
    with pytest.raises(BackendError, match="ranks up to 128.*140×140.*rank 129"):
        backend.adam(problems, Schedule(1, 1e-3, 1, 0.9, "mse"), [1], lambda _: True, lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so() -> None:
    with pytest.raises(BackendError, match="found no GPU"):
        load_backend("triton")
    with pytest.raises(BackendError, match="not on device 'cpu'"):
        load_backend("triton", "cpu")


def test_every_rank_has_a_padded_rank() -> None:
    assert [padded_rank(rank) for rank in (1, 8, 9, 128)] == [8, 8, 16, 128]
    assert RANKS == (8, 16, 32, 64, 128)
