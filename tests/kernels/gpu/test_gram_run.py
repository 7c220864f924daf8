"""The direct solver's batches, interpreted: read during the work, multiplied by the kernel, and certified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from inilora_kernels import approximate
from inilora_kernels.errors import BackendError
from inilora_kernels.kernels.backend import GramBatch, Stored
from inilora_kernels.kernels.gpu import gram_batch, gram_layout
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.device import HostDevice
from inilora_kernels.kernels.gpu.tiles import GramTile
from inilora_kernels.solvers import run
from inilora_kernels.solvers.krylov_spaces import KrylovSpaces

from ...solvers.test_krylov import with_spectrum
from .cases import CPU
from .interpreter import interpreted


@pytest.fixture
def backend() -> Iterator[TritonBackend]:
    with interpreted():
        yield TritonBackend(device=CPU)


def stored(W: Tensor, vectors: int = 32, load: Callable[[], Tensor] | None = None) -> Stored:
    return Stored(load or (lambda: W), (W.shape[0], W.shape[1]), W.dtype, 4, vectors)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def visited(backend: TritonBackend, matrices: Sequence[Stored]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    backend.gram_batches(matrices, lambda members, batch: found.append(tuple(members)))
    return found


def test_batches_hold_what_was_stored(backend: TritonBackend) -> None:
    weights = [normal(70, 90), normal(96, 70), normal(80, 80).bfloat16(), normal(70, 90).double(), normal(80, 75)]
    seen: dict[int, Tensor] = {}

    def visit(members: Sequence[int], batch: GramBatch) -> None:
        for place, index in enumerate(members):
            seen[index] = batch.stored(place).clone()
            tall = batch.tall(place).double()
            assert float(batch.energies[place]) == pytest.approx(float(tall.square().sum()), rel=1e-12)

    backend.gram_batches([stored(W, 0 if index == 4 else 32) for index, W in enumerate(weights)], visit)
    # float64 weights and matrices without vectors are left.
    assert sorted(seen) == [0, 1, 2]
    assert all(torch.equal(seen[index], weights[index]) for index in seen)


def test_what_does_not_fit_the_memory_is_left_before_anything_is_read(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Tensor:
        raise AssertionError("read")

    monkeypatch.setattr(HostDevice, "free_memory", lambda self: 1e5)
    assert visited(backend, [stored(normal(70, 90), load=never)]) == []


def test_the_next_batch_is_read_while_one_is_worked_on(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gram_layout, gram_batch):
        monkeypatch.setattr(module, "BATCH", 1)
    arrived = [threading.Event() for _ in range(3)]
    weights = [normal(70, 90) + index for index in range(3)]

    def loader(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            arrived[index].set()
            return weights[index]

        return load

    def visit(members: Sequence[int], batch: GramBatch) -> None:
        following = members[0] + 1
        # Were it read afterwards, this would wait in vain.
        assert following == 3 or arrived[following].wait(20)
        assert torch.equal(batch.stored(0), weights[members[0]])

    backend.gram_batches([stored(W, load=loader(index)) for index, W in enumerate(weights)], visit)
    assert all(event.is_set() for event in arrived)


def test_a_pass_is_one_graph_where_the_device_captures(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    replays: list[int] = []

    class Graphs(HostDevice):
        def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
            captures.append(1)

            def replay() -> None:
                replays.append(1)
                launch()

            return replay

    monkeypatch.setattr(TritonBackend, "place", lambda self: Graphs(captures=True))

    def visit(members: Sequence[int], batch: GramBatch) -> None:
        start = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
        start[:, :, 70:] = 0.0
        with_graphs = KrylovSpaces(batch, start, [32, 64], batch.captured)
        one_by_one = KrylovSpaces(batch, start, [32, 64])
        for spaces in (with_graphs, one_by_one):
            for _ in range(4):
                spaces.expand()
        assert torch.equal(with_graphs.T, one_by_one.T)
        Q, W = with_graphs.Q[0, :, :70].double(), batch.tall(0).double()
        assert torch.allclose(Q @ W.T @ W @ Q.T, with_graphs.T[0], atol=1e-3)

    backend.gram_batches([stored(normal(90, 70))], visit)
    # The first pass in each room is not one: libraries set themselves up in it.
    assert (len(captures), len(replays)) == (2, 2)


def test_what_was_announced_must_be_what_is_read(backend: TritonBackend) -> None:
    W = normal(70, 90)
    with pytest.raises(BackendError, match=r"announced as torch.float32 \(70, 90\) was read as torch.float16"):
        visited(backend, [stored(W, load=W.half)])


def test_a_kernel_that_does_not_compile_is_an_error_of_ours(
    backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: object) -> None:
        raise RuntimeError("no gcc\nlong")

    monkeypatch.setattr(gram_batch.GramBatch, "launch", failing)
    with pytest.raises(BackendError, match=r"could not compile and launch the kernels: RuntimeError: no gcc; it needs"):
        visited(backend, [stored(normal(70, 90))])


@pytest.mark.parametrize("solver", ["krylov", "adam"])
def test_a_whole_run_is_certified_by_the_batch(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """f* of an Adam run too: nothing of it is computed one matrix at a time, or on the CPU before the start."""

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("one by one")

    monkeypatch.setattr(run, "principal", never)
    monkeypatch.setattr(run, "optima", never)
    # Few programs, as each costs the interpreter milliseconds.
    monkeypatch.setattr(gram_layout, "gram_tile", lambda architecture, itemsize: GramTile(256, 256, 4, 1, "ieee"))
    weights = [with_spectrum(540, 560, lambda i: i**-0.5), with_spectrum(560, 530, lambda i: i**-0.4)]
    extra = {"steps": 1} if solver == "adam" else {}
    with interpreted():
        found = approximate(weights, rank=4, solver=solver, backend="triton", device="cpu", **extra)
    for W, one in zip(weights, found, strict=True):
        least = float(torch.linalg.svdvals(W.double())[4:].square().sum())
        assert least * (1 - 2e-8) <= one.certificate.optimum <= least * (1 + 1e-13)
        assert one.certificate.certified
        if solver == "krylov":
            assert one.certificate.excess < 1e-8
