"""Many searches in step: the certificate of each against a full SVD in float64, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inilora_kernels.solvers import krylov_batch, krylov_spaces
from inilora_kernels.solvers.krylov_batch import passes_expected, principals, room, start_of

from .test_krylov import with_spectrum
from .torch_batch import TorchBatch

RANKS = (1, 3, 8)


def starts(weights: Sequence[Tensor]) -> list[Tensor]:
    return [start_of(W, 1) for W in weights]


SPECTRA: dict[str, Tensor] = {
    "decaying slowly": with_spectrum(620, 540, lambda i: i**-0.25),
    "decaying, wide": with_spectrum(540, 620, lambda i: i**-0.5),
    "decaying fast": with_spectrum(540, 540, lambda i: i**-1.5),
    "white noise": torch.randn(540, 540, generator=torch.Generator().manual_seed(0)),
    "low rank": with_spectrum(600, 560, lambda i: (i <= 8).double()),
    "forty equal": with_spectrum(540, 540, lambda i: torch.where(i <= 40, 1.0, 0.1 * i**-0.5)),
    "twenty equal at the end": with_spectrum(
        540, 540, lambda i: torch.where(i <= 6, 2.0, torch.where(i <= 26, 1.0, 0.3))
    ),
    "nearly equal": with_spectrum(540, 540, lambda i: torch.where(i <= 9, 1 + 1e-9 * i, 0.5 * i**-0.5)),
    "one huge": with_spectrum(540, 540, lambda i: torch.where(i == 1, 1e4, i**-0.5)),
    "all equal": torch.eye(540),
    "all zero": torch.zeros(540, 540),
    "tiny numbers": 1e-20 * with_spectrum(540, 540, lambda i: i**-0.5),
}
SETTLED = {"decaying slowly", "decaying, wide"}


@pytest.mark.parametrize("names", [list(SPECTRA)[:4], list(SPECTRA)[4:8], list(SPECTRA)[8:]], ids=str)
def test_the_certificate_holds_or_the_matrix_is_left(names: list[str]) -> None:
    weights = [SPECTRA[name] for name in names]
    batch = TorchBatch(weights, count=4, length=576)
    found = principals(batch, [RANKS] * len(weights), 1e-8, starts(weights), room(576, RANKS))
    for name, W, one in zip(names, weights, found, strict=True):
        assert (one is not None) or name not in SETTLED, name
        if one is None:
            continue
        squares = torch.linalg.svdvals(W.double()).square()
        rounding = 1e-14 * float(squares.sum())
        for rank in RANKS:
            best, least = float(squares[:rank].sum()), float(squares[rank:].sum())
            captured = float((W.double() @ one.V[:, :rank]).square().sum())
            assert best - captured <= one.shortfalls[rank] + rounding, (name, rank)
            assert one.optimum(rank) <= least + rounding, (name, rank)
            assert one.certified[rank]
            assert one.optimum(rank) >= least * (1 - 2e-8) - 1e-12 * float(squares.sum()), (name, rank)
        assert float((one.U.T @ one.U - torch.eye(8)).norm()) < 1e-10
        # The longer side's vectors are the images of the shorter side's.
        tall, V, U = (W, one.V, one.U) if W.shape[0] >= W.shape[1] else (W.T, one.U, one.V)
        assert float((tall.double() @ V - U * one.S).norm()) < 1e-10 * float(one.S[0])


@pytest.mark.parametrize("name", ["decaying slowly", "white noise"])
def test_a_rank_that_is_a_large_share_of_a_small_matrix_is_certified(name: str) -> None:
    """Most of the spectrum is in the space then, and its end makes the search short."""
    W, rank = SPECTRA[name], 64
    (found,) = principals(TorchBatch([W], count=1, length=576), [[rank]], 1e-8, starts([W]), room(540, [rank]))
    assert found is not None
    squares = torch.linalg.svdvals(W.double()).square()
    best, least = float(squares[:rank].sum()), float(squares[rank:].sum())
    captured = float((W.double() @ found.V).square().sum())
    assert -1e-14 * float(squares.sum()) <= best - captured <= found.shortfalls[rank] + 1e-14 * float(squares.sum())
    assert found.shortfalls[rank] <= 1e-8 * least
    assert found.vectors < 540


def test_values_that_rounding_cannot_part_are_given_up_at_the_first_look() -> None:
    W = SPECTRA["forty equal"]
    batch = TorchBatch([W], count=1, length=576)
    assert principals(batch, [[8]], 1e-8, starts([W]), room(540, [8])) == [None]
    assert batch.products == passes_expected(8, 576)


def test_the_bits_of_a_matrix_do_not_depend_on_its_neighbours() -> None:
    """With two threads, too: a matrix alone has both to itself where several have one each."""
    W = SPECTRA["decaying, wide"]
    # White noise takes the batch to its end, long after this one has left it.
    weights = [SPECTRA["white noise"], SPECTRA["decaying fast"], W]
    batch = TorchBatch(weights, count=4, length=576)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone, *_ = principals(TorchBatch([W], count=4, length=576), [[8]], 1e-8, starts([W]), 256)
        *_, among = principals(batch, [[8], [3], [8]], 1e-8, starts(weights), 256)
    finally:
        torch.set_num_threads(threads)
    assert alone is not None
    assert among is not None
    for one, other in ((alone.U, among.U), (alone.S, among.S), (alone.V, among.V)):
        assert torch.equal(one, other)
    assert alone.shortfalls == among.shortfalls
    assert alone.passes == among.passes


def test_finished_matrices_are_left_out_of_the_products() -> None:
    weights = [SPECTRA["decaying, wide"], SPECTRA["decaying slowly"]]
    batch = TorchBatch(weights, count=4, length=576)
    told: list[set[int]] = []
    keep = batch.keep
    batch.keep = lambda active: (told.append(set(active)), keep(active))[1]  # type: ignore[method-assign]
    principals(batch, [[1], [8]], 1e-8, starts(weights), 256)
    assert {0, 1} in told
    assert {1} in told
    assert told[-1] == set()


# What a host cannot say of a tensor on a GPU without waiting for it.
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "unique",
    "equal",
}


class Reads(TorchFunctionMode):
    """Notes every read of a tensor in `events`."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        masked = name in ("__getitem__", "__setitem__") and getattr(arguments[1], "dtype", None) == torch.bool
        if masked or name in READS:
            self.events.append(name)
        return function(*arguments, **(options or {}))


class Noting(TorchBatch):
    """Notes every product in `events`."""

    events: list[str]

    def __call__(self, X: Tensor) -> Tensor:
        self.events.append("product")
        return super().__call__(X)


def test_the_host_waits_for_the_device_only_where_a_look_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over whole searches: from look to look, the host reads nothing."""
    weights = [SPECTRA["decaying, wide"], SPECTRA["decaying slowly"]]
    batch = Noting(weights, count=4, length=576)
    batch.events = events = []
    here = krylov_batch.KrylovSpaces.here
    monkeypatch.setattr(krylov_batch.KrylovSpaces, "here", lambda self: (events.append("look"), here(self))[1])
    with Reads(events):
        found = principals(batch, [[8], [8]], 1e-8, starts(weights), 256)
    assert all(one is not None for one in found)
    passes = " ".join(events).split("product")[1:]
    quiet = [one for one in passes if "look" not in one]
    assert [one.strip() for one in quiet] == [""] * len(quiet)
    # The first look at rank 8 comes after nine passes, then there are a few more.
    assert "look" in passes[8]
    assert not any("look" in one for one in passes[:8])
    assert len(quiet) >= 8


def test_a_read_within_a_pass_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Noting([SPECTRA["decaying slowly"]], count=4, length=576)
    batch.events = events = []
    gram = krylov_spaces._gram

    def asking(X: Tensor) -> Tensor:
        assert not bool(X.isnan().any())
        return gram(X)

    monkeypatch.setattr(krylov_spaces, "_gram", asking)
    with Reads(events):
        principals(batch, [[8]], 1e-8, starts([SPECTRA["decaying slowly"]]), 256)
    assert "product __bool__" in " ".join(events)


def test_a_start_is_the_matrixs_own() -> None:
    W = SPECTRA["decaying slowly"]
    own, other = start_of(W, 1), start_of(-W, 1)
    assert own.shape == (16, min(W.shape))
    assert torch.equal(own, start_of(W.clone(), 2))
    assert not torch.equal(own, other)
    first, second = principals(TorchBatch([W, W], count=4, length=576), [[8]] * 2, 1e-8, [own, other], 256)
    assert first is not None
    assert second is not None
    # The same triplets, from other spaces.
    torch.testing.assert_close(first.S, second.S, rtol=1e-9, atol=0.0)
    assert not torch.equal(first.V, second.V)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """The switches as they were, in the order that torch takes them back in."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def allow(way: str) -> None:
    if way == "medium":
        torch.set_float32_matmul_precision("medium")
    elif way == "older switch":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def switches() -> list[object]:
    found: list[object] = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    try:
        found += [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()]
    except RuntimeError:
        found.append("only by the newer switch")
    return found


@pytest.mark.parametrize("way", ["medium", "older switch", "newer switch"])
def test_the_users_tf32_is_off_within_and_as_it_was_afterwards(way: str) -> None:
    allow(way)
    before = switches()
    seen: list[str] = []

    class Watched(TorchBatch):
        def __call__(self, X: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            # Reading the older one raises where the two contradict each other, as torch's own products may.
            assert not torch.backends.cuda.matmul.allow_tf32
            return super().__call__(X)

    principals(Watched([SPECTRA["decaying fast"]], count=1), [[3]], 1e-8, starts([SPECTRA["decaying fast"]]), 256)
    assert set(seen) == {"ieee"}
    assert switches() == before
