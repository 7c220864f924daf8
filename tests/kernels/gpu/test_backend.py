"""The Triton backend, interpreted: milestones, waves, memory, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from inilora_kernels.errors import BackendError
from inilora_kernels.kernels.backend import Problem, Sample, Schedule
from inilora_kernels.kernels.gpu import backend as triton_backend
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.tiles import RANKS, padded_rank
from inilora_kernels.kernels.gpu.wave import Wave
from inilora_kernels.kernels.loading import load_backend
from inilora_kernels.kernels.reference import AdamState, adam_step, residual_loss

from .cases import CPU, PRODUCT_ERROR, make, relative
from .interpreter import interpreted


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
    _, problems = make([(40, 24), (24, 40), (40, 24)], [4, 4, 4], torch.float32)
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
    with pytest.raises(BackendError, match=r"ranks up to 128.*140×140.*rank 129"):
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


def test_memory_splits_a_batch_and_refuses_what_never_fits(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, problems = make([(40, 24)] * 3, [4] * 3, torch.float32)
    schedule = Schedule(steps=2, lr=1e-3, step_size=3, gamma=0.9, loss="mse")
    order: list[str] = []

    def loader(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            order.append(f"load {index}")
            return problems[index].load()

        return load

    def observe(sample: Sample) -> bool:
        order.append(f"done {sample.index}")
        return True

    batch = [Problem(loader(i), p.shape, p.A, p.B) for i, p in enumerate(problems)]
    backend.adam(batch, schedule, [2], observe, lambda _: None)
    together, order[:] = list(order), []
    assert together == ["load 2", "load 1", "load 0", "done 2", "done 1", "done 0"]

    # A matrix takes 5,120 bytes and its state 6,144: room for one, not for a second beside the first one's state.
    monkeypatch.setattr(TritonBackend, "free_memory", lambda self: 15_000.0)
    backend.adam(batch, schedule, [2], observe, lambda _: None)
    assert order == ["load 2", "load 1", "done 2", "load 0", "done 1", "done 0"]

    monkeypatch.setattr(TritonBackend, "free_memory", lambda self: 10_000.0)
    with pytest.raises(
        BackendError, match=r"0\.00 GB free for a wave, but matrix 2 .* 40×24 at rank 4, needs 0\.00 GB"
    ):
        backend.adam(batch, schedule, [2], observe, lambda _: None)


@dataclass(frozen=True)
class Replay:
    """What a captured graph does: a block of steps, at the state the device has then."""

    wave: Wave

    def replay(self) -> None:
        self.wave.advance(triton_backend.GRAPH_STEPS)


def test_replayed_blocks_give_the_bits_of_plain_launches(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, problems = make([(20, 24)] * 2, [4, 4], torch.float32)
    schedule = Schedule(steps=9, lr=1e-3, step_size=4, gamma=0.9, loss="mse")
    captured: list[int] = []

    def final() -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}

        def observe(sample: Sample) -> bool:
            found[sample.index, sample.step] = sample.A
            return (sample.index, sample.step) != (1, 3)

        counted: list[int] = []
        backend.adam(problems, schedule, [0, 3, 9], observe, counted.append)
        assert sum(counted) == 9 + 3
        return found

    plain = final()

    def capture(wave: Wave) -> Replay:
        captured.append(len(wave.active))
        return Replay(wave)

    monkeypatch.setattr(triton_backend, "GRAPH_STEPS", 2)
    monkeypatch.setattr(triton_backend, "_captured", capture)
    replayed = final()
    # Once for both matrices, once more when one of them has left.
    assert captured == [2, 1]
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[key], replayed[key]) for key in plain)
