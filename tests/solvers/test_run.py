"""From tasks to factors: each is finished once, in any order, with the start of its own random stream."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from inilora_kernels.display.progress import ProgressBar
from inilora_kernels.factors import Factors
from inilora_kernels.initializations import METHODS
from inilora_kernels.kernels import threads
from inilora_kernels.kernels.streaming import energy
from inilora_kernels.model.in_memory import target_in_memory
from inilora_kernels.options import Options
from inilora_kernels.solvers import run
from inilora_kernels.solvers.run import Solve, Task


def weight(d: int, k: int) -> Tensor:
    return torch.randn(d, k, generator=torch.Generator().manual_seed(d + k)) * 0.05


def task(name: str, W: Tensor, *ranks: int) -> Task:
    target = target_in_memory(name, W)
    return Task(target, target.sha256(), ranks, std=0.05, energy=energy(W))


def solve(method: str, solver: str, tasks: list[Task], **options: int) -> dict[tuple[str, int], Factors]:
    found: dict[tuple[str, int], Factors] = {}

    def finished(task: Task, rank: int, factors: Factors) -> None:
        assert (task.target.module, rank) not in found
        found[task.target.module, rank] = factors

    chosen: Solve = METHODS[method].solvers[solver].solve
    chosen(tasks, Options(method=method, solver=solver, backend="cpu", **options), finished, ProgressBar(False))
    return found


@pytest.mark.parametrize(("method", "solver"), [("inilora", "adam"), ("inilora", "krylov"), ("inilora", "exact")])
def test_every_rank_of_every_matrix_is_finished_once(method: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones side by side and a large one after them; ranks that not every matrix has."""
    monkeypatch.setattr(threads, "_ROOM", 4 * 4 * 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # on however many cores
    tasks = [task("small", weight(20, 30), 2, 4), task("other", weight(25, 20), 4), task("large", weight(60, 50), 2)]
    found = solve(method, solver, tasks, steps=20)
    assert set(found) == {("small", 2), ("small", 4), ("other", 4), ("large", 2)}
    for (name, rank), factors in found.items():
        W = next(one.target.read() for one in tasks if one.target.module == name).double()
        squares = torch.linalg.svdvals(W).square()
        assert factors.rank == rank
        assert factors.certificate.optimum == pytest.approx(float(squares[rank:].sum()), rel=2e-8)
        loss = float((W - factors.B.double() @ factors.A.double()).square().sum())
        assert factors.certificate.loss == pytest.approx(loss, rel=1e-9)


def test_a_matrix_is_hashed_after_its_search_by_the_same_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search does not wait for the sha256; nor do those of small matrices wait for the thread that asks for all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads_of: dict[int, int] = {}
    principal = run.principal

    def noting(W: Tensor, *arguments: Any, **options: Any) -> Any:
        found = principal(W, *arguments, **options)
        threads_of[len(W)] = threading.get_ident()
        return found

    monkeypatch.setattr(run, "principal", noting)

    def hashed_later(rows: int) -> Task:
        @functools.cache
        def sha256() -> str:
            assert threads_of[rows] == threading.get_ident()
            return str(rows)

        W = weight(rows, 600)
        return Task(target_in_memory(str(rows), W), sha256, (2,), std=0.05, energy=energy(W))

    found = solve("inilora", "krylov", [hashed_later(rows) for rows in (610, 620, 630, 640)])
    assert {name: factors.source_sha256 for (name, _), factors in found.items()} == {
        str(rows): str(rows) for rows in (610, 620, 630, 640)
    }


def test_the_random_stream_is_the_matrix_and_the_seeds_alone() -> None:
    def draw(shape: tuple[int, int], rank: int, std: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)

    W = weight(20, 30)
    first = task("here", W, 4).random_start(draw, 4, seed=0)
    for other, seed, same in (("elsewhere", 0, True), ("here", 1, False)):
        A, B = task(other, W, 4).random_start(draw, 4, seed)
        assert torch.equal(A, first[0]) == torch.equal(B, first[1]) == same
    changed = W.clone()
    changed[0, 0] += 1
    assert not torch.equal(task("here", changed, 4).random_start(draw, 4, 0)[0], first[0])
