"""The CPU backend: which thread works on which matrix, and when the caller is told.

Each small matrix goes to one thread and stays in that core's cache for thousands of steps. All threads work together on
large ones, and on the few small ones that would leave a thread idle, unless they are tiny. See step.py for what a step
is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import ceil, fsum

import numpy as np
import torch
from torch import Tensor

from ..backend import Batch, Problem, Sample, Schedule, Stored, Visit
from ..rounding import round_up
from .products import B_BLOCK_ROWS
from .simd import LOADS_FLOAT16, PANEL, SMALL_GROUP, kernel_view
from .step import A_CHUNK_PANELS, Array, Member, Side, Steps, gram_of_A, gram_of_B, run_steps, strip_residual

STRIP_ROWS = 192
MOST_SLOTS = 16
# Up to this size one thread keeps W to itself; beyond it, the cache that W runs from is shared.
SMALL_MATRIX_BYTES = 8 * 2**20
# Below this many FLOPs a step, some 10 µs of one thread, a team would wait at its two barriers longer than it computes.
TEAM_STEP_FLOPS = 1e6
# A kernel call takes about this many FLOPs, so that progress and Ctrl-C come through.
FLOPS_A_CALL = 1.5e10


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """W in tiles (strips, panels, strip rows, PANEL), zero-padded, in the checkpoint's dtype."""

    tiles: Tensor
    shape: tuple[int, int]


def pack(W: Tensor) -> PackedMatrix:
    """Pack W (d×k, float32, float16 or bfloat16; float64 is rounded to float32), a strip at a time."""
    if W.dtype == torch.float64 or (W.dtype == torch.float16 and not LOADS_FLOAT16):
        W = W.float()
    d, k = W.shape
    n_strips = ceil(d / STRIP_ROWS)
    strip_rows = round_up(ceil(d / n_strips), B_BLOCK_ROWS)
    n_panels = ceil(k / PANEL)
    tiles = torch.zeros(n_strips, n_panels, strip_rows, PANEL, dtype=W.dtype)
    whole = k // PANEL * PANEL
    for strip in range(n_strips):
        rows = W[strip * strip_rows : (strip + 1) * strip_rows]
        n_rows = rows.shape[0]
        if n_rows == 0:
            break
        panels = rows[:, :whole].reshape(n_rows, whole // PANEL, PANEL).transpose(0, 1)
        tiles[strip, : whole // PANEL, :n_rows] = panels
        if whole < k:
            tiles[strip, -1, :n_rows, : k - whole] = rows[:, whole:]
    return PackedMatrix(tiles, (d, k))


def step_flops(shape: tuple[int, int], rank: int) -> float:
    """Of a step's two products with W, nearly all that it computes."""
    return 4.0 * shape[0] * shape[1] * rank


def _side(value: Array, products: tuple[int, ...], shares: int, rank: int) -> Side:
    """A factor before its first step: its moments and its work space are zero."""
    zeros = np.zeros
    return Side(
        value,
        mean=zeros(value.shape, np.float32),
        square=zeros(value.shape, np.float32),
        products=zeros(products, np.float32),
        shares=zeros((shares, rank, rank), np.float32),
    )


class Run:
    """One matrix's run: the packed W, the factors with their moments, and the kernel's work space."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.W = pack(problem.load())
        self.schedule = schedule
        self.rank = problem.rank
        self.step = 0
        d, k = problem.shape
        n_strips, n_panels, strip_rows, _ = self.W.tiles.shape
        rank = round_up(self.rank, SMALL_GROUP)
        self.slot_strips = ceil(n_strips / MOST_SLOTS)
        A = torch.zeros(n_panels * PANEL, rank, dtype=torch.float32)
        A[:k, : self.rank] = problem.A.T
        B = torch.zeros(n_strips * strip_rows, rank, dtype=torch.float32)
        B[:d, : self.rank] = problem.B
        panels = np.ascontiguousarray(A.view(n_panels, PANEL, rank).transpose(1, 2).numpy())
        slots, chunks = ceil(n_strips / self.slot_strips), ceil(n_panels / A_CHUNK_PANELS)
        self.A = _side(panels, (slots, *panels.shape), chunks, rank)
        self.B = _side(B.numpy(), tuple(B.shape), n_strips, rank)
        self.barrier = np.zeros(32, np.int64)
        for chunk in range(chunks):
            first = chunk * A_CHUNK_PANELS
            gram_of_A(self.A.value, first, min(first + A_CHUNK_PANELS, n_panels), self.A.shares[chunk])
        for strip in range(n_strips):
            gram_of_B(self.B.value, strip * strip_rows, (strip + 1) * strip_rows, self.B.shares[strip])

    @property
    def steps_a_call(self) -> int:
        return max(1, int(FLOPS_A_CALL / step_flops(self.W.shape, self.rank)))

    def advance(self, steps: int, member: int, team: int) -> None:
        """Run the kernel as one member of a team; the caller advances `self.step` once all have returned."""
        schedule, rank = self.schedule, self.A.value.shape[1]
        rates = np.array([schedule.learning_rate(self.step + i) for i in range(steps)])
        run_steps(
            kernel_view(self.W.tiles),
            self.A,
            self.B,
            self.slot_strips,
            Steps(self.step, rates, schedule.eps_for(self.W.shape), schedule.beta1, schedule.beta2),
            Member(
                member,
                team,
                self.barrier,
                grams=np.empty((2, rank, rank), np.float32),
                work=np.empty(rank * max(PANEL, B_BLOCK_ROWS), np.float32),
            ),
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        d, k = self.W.shape
        panels = self.A.value
        A = torch.from_numpy(panels).transpose(0, 1).reshape(panels.shape[1], -1)
        return A[: self.rank, :k].clone(), torch.from_numpy(self.B.value)[:d, : self.rank].clone()

    def strip_loss(self, strip: int) -> float:
        strip_rows = self.W.tiles.shape[2]
        rows = slice(strip * strip_rows, (strip + 1) * strip_rows)
        return float(strip_residual(self.W.tiles[strip].float().numpy(), self.A.value, self.B.value[rows]))

    def sample(self, index: int, losses: Iterable[float]) -> Sample:
        A, B = self.factors()
        return Sample(index, self.step, fsum(losses), A, B)


class _Stopped(Exception):
    """The caller is gone, and a worker gives up its matrix."""


@dataclass(frozen=True)
class CpuBackend:
    """Adam by fused numba kernels on `threads` threads."""

    threads: int
    name: str = "cpu"
    device: torch.device = torch.device("cpu")
    direct_dtype: torch.dtype = torch.float32

    def gram_batches(self, matrices: Sequence[Stored], visit: Visit) -> None:
        """See `Backend.gram_batches`: none."""

    def require_adam(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
        """See `Backend.require_adam`: takes any."""

    def adam(self, batch: Batch) -> None:
        small = [i for i, p in enumerate(batch.problems) if 4 * p.shape[0] * p.shape[1] <= SMALL_MATRIX_BYTES]
        tiny = {i for i in small if step_flops(batch.problems[i].shape, batch.problems[i].rank) < TEAM_STEP_FLOPS}
        shared = [i for i in small if i not in tiny]
        alone = tiny | set(shared[: len(shared) // self.threads * self.threads])
        with ThreadPoolExecutor(self.threads) as pool:
            for index in range(len(batch.problems)):
                if index not in alone:
                    self._run_together(pool, batch, index)
            if alone:
                self._run_alone(pool, batch, sorted(alone))

    def _run_together(self, pool: ThreadPoolExecutor, batch: Batch, index: int) -> None:
        """All threads on one matrix."""
        run = Run(batch.problems[index], batch.schedule)
        for milestone in batch.milestones:
            while run.step < milestone:
                steps = min(run.steps_a_call, milestone - run.step)
                members = [pool.submit(run.advance, steps, member, self.threads) for member in range(self.threads)]
                wait(members)
                for member in members:
                    member.result()
                run.step += steps
                batch.advanced(steps)
            losses = pool.map(run.strip_loss, range(run.W.tiles.shape[0]))
            if not batch.observe(run.sample(index, losses)):
                return

    def _run_alone(self, pool: ThreadPoolExecutor, batch: Batch, indices: list[int]) -> None:
        """One matrix per thread. The workers post their results; this thread makes the callbacks."""
        news: queue.Queue[int | tuple[Sample, Future[bool]]] = queue.Queue()
        stop = threading.Event()

        def work(index: int) -> None:
            run = Run(batch.problems[index], batch.schedule)
            for milestone in batch.milestones:
                while run.step < milestone:
                    if stop.is_set():
                        raise _Stopped
                    steps = min(run.steps_a_call, milestone - run.step)
                    run.advance(steps, 0, 1)
                    run.step += steps
                    news.put(steps)
                verdict: Future[bool] = Future()
                news.put((run.sample(index, map(run.strip_loss, range(run.W.tiles.shape[0]))), verdict))
                if not verdict.result():
                    return

        workers = [pool.submit(work, index) for index in indices]
        for worker in workers:
            worker.add_done_callback(lambda _: news.put(0))
        try:
            left = len(workers)
            while left:
                message = news.get()
                if isinstance(message, tuple):
                    sample, verdict = message
                    goes_on = False
                    try:
                        goes_on = batch.observe(sample)
                    finally:
                        verdict.set_result(goes_on)
                elif message:
                    batch.advanced(message)
                else:
                    left -= 1
                    for worker in workers:
                        if worker.done():
                            worker.result()
        finally:
            stop.set()
            for worker in workers:
                worker.cancel()
            while not all(worker.done() for worker in workers):
                try:
                    message = news.get(timeout=0.05)
                except queue.Empty:
                    continue
                if isinstance(message, tuple):
                    message[1].set_result(False)
