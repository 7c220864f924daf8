"""The Triton backend, interpreted: milestones, waves, memory, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("triton")

from inilora_kernels import approximate, approximate_model
from inilora_kernels.errors import BackendError
from inilora_kernels.kernels.backend import Batch, Problem, Sample, Schedule
from inilora_kernels.kernels.gpu import backend as triton_backend
from inilora_kernels.kernels.gpu import waves
from inilora_kernels.kernels.gpu.backend import TritonBackend, require_triton
from inilora_kernels.kernels.gpu.device import HostDevice
from inilora_kernels.kernels.gpu.wave import Wave
from inilora_kernels.kernels.loading import load_backend
from inilora_kernels.kernels.reference import AdamState, adam_step, residual_loss
from inilora_kernels.solvers import run

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

    problems = [Problem(loader(i), p.shape, weights[i].dtype, p.A, p.B) for i, p in enumerate(starts)]
    schedule = Schedule(steps=6, lr=1e-3, step_size=3, gamma=0.9, loss="mse")
    samples: list[Sample] = []
    counted: list[int] = []

    def observe(sample: Sample) -> bool:
        samples.append(sample)
        return not (sample.index == 1 and sample.step == 2)

    backend.adam(Batch(problems, schedule, [0, 2, 6], observe, counted.append))
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
        # Before the end the residual is float32's: 600 roundings of up to 6 · 2⁻²⁴, mixed in sign.
        error = 1e-12 if sample.step == 6 else 6 * 2.0**-24
        assert math.isclose(sample.loss, residual_loss(W, sample.A, sample.B), rel_tol=error)


def test_a_matrix_has_the_same_bits_in_any_batch(backend: TritonBackend) -> None:
    _, problems = make([(40, 24), (24, 40), (40, 24)], [4, 4, 4], torch.float32)
    schedule = Schedule(steps=3, lr=1e-3, step_size=3, gamma=0.9, loss="mse")

    def final(members: list[Problem]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def observe(sample: Sample) -> bool:
            found[sample.index] = sample.A
            return True

        backend.adam(Batch(members, schedule, [3], observe))
        return found

    together = final(problems)
    for index, problem in enumerate(problems):
        assert torch.equal(final([problem])[0], together[index])


def test_ranks_beyond_the_kernels_are_refused(backend: TritonBackend) -> None:
    _, problems = make([(140, 140)], [129], torch.float32)
    with pytest.raises(BackendError, match=r"ranks up to 128; a 140×140 matrix has rank 129"):
        backend.adam(Batch(problems, Schedule(1, 1e-3, 1, 0.9, "mse"), [1]))


@pytest.mark.parametrize(
    ("rank", "memory", "message"),
    [
        (129, 1e12, r"^layers.0.value: .*ranks up to 128; a 300×140 matrix has rank 129"),
        (8, 1.2e5, r"^layers.0.value: .*0\.00012 GB free, but a 300×140 matrix at rank 8 needs 0\.000\d+ GB"),
    ],
)
def test_what_the_gpu_cannot_take_is_refused_before_anything_is_read(
    rank: int, memory: float, message: str, backend: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the survey and f* of every matrix, which take minutes for a large model."""
    save_file(
        {"layers.0.query.weight": torch.ones(140, 140), "layers.0.value.weight": torch.ones(300, 140)},
        tmp_path / "model.safetensors",
    )
    monkeypatch.setattr(HostDevice, "free_memory", lambda self: memory)
    main_job = import_module("inilora_kernels.approximate")
    monkeypatch.setattr(main_job, "survey", lambda *arguments: pytest.fail("the weights were read"))
    pattern = {"value": rank}
    with pytest.raises(BackendError, match=message):
        approximate_model(tmp_path, 4, rank_pattern=pattern, backend="triton", device="cpu", steps=3, cache=False)


def test_a_rank_that_follows_from_the_energy_is_refused_before_the_certificates(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_bounds", lambda *arguments: pytest.fail("f* was computed"))
    with pytest.raises(BackendError, match=r"ranks up to 128; a 140×140 matrix has rank 1[34]\d"):
        approximate(torch.eye(140), rank="energy:0.99", backend="triton", device="cpu", steps=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so() -> None:
    with pytest.raises(BackendError, match="found no GPU"):
        load_backend("triton")
    with pytest.raises(BackendError, match="not on device 'cpu'"):
        load_backend("triton", "cpu")


def test_a_gpu_that_is_not_there_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BackendError, match=r"device='cuda:7': this process sees 2 GPUs.*take device=\"cuda:1\""):
        load_backend("auto", "cuda:7")


def test_memory_splits_a_batch_and_refuses_what_never_fits_before_loading(
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

    loading = [Problem(loader(i), p.shape, p.dtype, p.A, p.B) for i, p in enumerate(problems)]
    batch = Batch(loading, schedule, [2], observe)
    backend.adam(batch)
    together, order[:] = list(order), []
    assert together == ["load 2", "load 1", "load 0", "done 2", "done 1", "done 0"]

    # A matrix takes 5,120 bytes, its state 6,144 and its work 768: room for one, not for the next one's weights.
    monkeypatch.setattr(HostDevice, "free_memory", lambda self: 13_000.0)
    backend.adam(batch)
    assert order == ["load 2", "done 2", "load 1", "done 1", "load 0", "done 0"]

    order.clear()
    monkeypatch.setattr(HostDevice, "free_memory", lambda self: 10_000.0)
    with pytest.raises(BackendError, match=r"1e-05 GB free, but a 40×24 matrix at rank 4 needs 1\.16e-05 GB"):
        backend.adam(batch)
    assert order == []


class Graphs(HostDevice):
    """The host as a device that captures: a replay does what was captured, at the state the device has then."""

    def __init__(self) -> None:
        super().__init__(captures=True)
        self.graphs = self.replays = 0

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.graphs += 1

        def replay() -> None:
            self.replays += 1
            launch()

        return replay


def test_replays_give_the_bits_of_plain_launches_and_one_capture_serves_all_waves(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a matrix has left, as with a tolerance, and for the waves that follow."""
    _, problems = make([(20, 24)] * 4, [4] * 4, torch.float32)
    schedule = Schedule(steps=9, lr=1e-3, step_size=4, gamma=0.9, loss="mse")
    monkeypatch.setattr(waves, "WAVE_MATRICES", 2)
    place = Graphs()

    def final() -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}

        def observe(sample: Sample) -> bool:
            found[sample.index, sample.step] = sample.A
            return (sample.index, sample.step) != (3, 3)

        counted: list[int] = []
        backend.adam(Batch(problems, schedule, [0, 3, 9], observe, counted.append))
        assert sum(counted) == 3 * 9 + 3
        return found

    plain = final()
    monkeypatch.setattr(triton_backend, "GRAPH_STEPS", (2, 1))
    monkeypatch.setattr(TritonBackend, "place", lambda self: place)
    replayed = final()
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[key], replayed[key]) for key in plain)
    assert place.graphs == 2
    # 0 → 3 in two replays and 3 → 9 in three, for each of two waves: not a step is launched on its own.
    assert place.replays == 2 * (2 + 3)


@pytest.mark.parametrize("steps", [1, 300])
def test_a_machine_that_cannot_compile_is_told_what_triton_needs(
    steps: int, backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a run too short for graphs."""

    def uncompilable(self: Wave, steps: int) -> None:
        raise FileNotFoundError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(Wave, "advance", uncompilable)
    monkeypatch.setattr(TritonBackend, "place", lambda self: HostDevice(compiles=True))
    _, problems = make([(20, 24)], [4], torch.float32)
    with pytest.raises(BackendError, match=r"could not compile .*Failed to find C compiler.*needs a C compiler"):
        backend.adam(Batch(problems, Schedule(steps, 1e-3, 4, 0.9, "mse"), [steps]))


def test_matrices_of_many_shapes_share_a_wave(backend: TritonBackend) -> None:
    shapes = [(20, 24), (33, 16), (8, 40)]
    weights, problems = make(shapes, [4] * 3, torch.bfloat16)
    schedule = Schedule(steps=2, lr=1e-3, step_size=4, gamma=0.9, loss="mse")
    order: list[str] = []

    def loader(W: Tensor) -> Callable[[], Tensor]:
        return lambda: order.append("load") or W

    def observe(sample: Sample) -> bool:
        order.append("done")
        return True

    loading = [Problem(loader(W), p.shape, p.dtype, p.A, p.B) for W, p in zip(weights, problems, strict=True)]
    backend.adam(Batch(loading, schedule, [2], observe))
    assert order == ["load"] * 3 + ["done"] * 3


def test_a_weight_on_an_odd_address_is_taken(backend: TritonBackend) -> None:
    """Two-byte aligned: as a view into a file may be."""
    (base,), _ = make([(1, 40 * 24 + 1)], [1], torch.bfloat16)
    W = base[0, 1:].view(40, 24)
    assert W.data_ptr() % 4 == 2
    _, (start,) = make([(40, 24)], [4], torch.bfloat16)
    found: list[Sample] = []
    one = Problem(lambda: W, (40, 24), W.dtype, start.A, start.B)
    backend.adam(Batch([one], Schedule(1, 1e-3, 3, 0.9, "mse"), [0], lambda s: bool(found.append(s))))
    assert found[0].loss == pytest.approx(residual_loss(W.double(), start.A.double(), start.B.double()), rel=1e-12)


def test_what_was_announced_must_be_what_is_read(backend: TritonBackend) -> None:
    (W,), (problem,) = make([(40, 24)], [4], torch.bfloat16)
    announced = Problem(lambda: W.float(), problem.shape, torch.bfloat16, problem.A, problem.B)
    with pytest.raises(BackendError, match=r"announced as torch.bfloat16 .* was read as torch.float32"):
        backend.adam(Batch([announced], Schedule(1, 1e-3, 1, 0.9, "mse"), [1]))


def test_a_triton_too_old_is_refused() -> None:
    for version in ("3.4.0", "3.2.0+git", "2.3.1"):
        with pytest.raises(BackendError, match=rf"needs triton 3.5 or newer.*triton {re.escape(version)} is installed"):
            require_triton(version)
    for version in ("3.5.0", "3.9.0", "4.0"):
        require_triton(version)
