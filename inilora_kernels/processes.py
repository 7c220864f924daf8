"""A run's matrices shared among processes: torchrun's, or those of a trainer's job.

There is no scheduler here. torch starts, restarts and numbers the processes. Its key-value store, through which they
found each other, carries what they tell one another: the survey, which finished matrices are in whose cache, and the
results. Who computes what follows from the shapes alone.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from .errors import BackendError, InitializationError, ProcessError
from .factors import Factors
from .storage import factor_file

dist: Any = torch.distributed

# How often all processes of a job together look into the store, per second.
_LOOKS = 2000
_LONGEST_MEETING = 30 * 60
# A process that has waited this many seconds for the others to begin says so.
_PATIENCE = 15.0
# Bytes of results that travel together: one parcel is packed while another is unpacked. And bytes put into the store at
# once: TCPStore closes the connection above 8 MiB, and is quickest at one.
_PARCEL, _PIECE = 1 << 19, 1 << 20
AnyKey = TypeVar("AnyKey", str, int)


@dataclass(frozen=True, eq=False)
class Job:
    """This process's place among those that share a run.

    rank, size: its number, and how many there are.
    store: torch's, with the keys of this run alone; None for one process.
    everywhere: every process wants the result, not only the one of rank 0.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    everywhere: bool = False

    def together(self, name: str, mine: Mapping[AnyKey, Any]) -> dict[AnyKey, Any]:
        """The entries of all processes, JSON values, in one dict; of several under one key, the lowest rank's."""
        if self.store is None:
            return dict(mine)
        self.give(f"{name}/{self.rank}", json.dumps(list(mine.items())).encode())
        merged: dict[AnyKey, Any] = {}
        for rank in range(self.size):
            for key, value in json.loads(self.take(f"{name}/{rank}")):
                merged.setdefault(key, value)
        return merged

    def gather(self, mine: Mapping[str, Factors], owners: Mapping[str, int]) -> dict[str, Factors]:
        """All results, for each process that wants them; a process that does not gets its own.

        owners: the rank that leaves each result for the others; there the result is among `mine`.
        """
        results = dict(mine)
        if self.store is None:
            return results
        own = {name: factors for name, factors in mine.items() if owners[name] == self.rank}
        parcels = _parcels(own) if self.rank or self.everywhere else []
        self.give(f"parcels/{self.rank}", str(len(parcels)).encode())
        for place, parcel in enumerate(parcels):
            self.give(f"result/{self.rank}/{place}", factor_file.encode(parcel, {}))
        if self.rank and not self.everywhere:
            return results
        keys = []
        for rank in range(self.size):
            for place in range(int(self.take(f"parcels/{rank}"))):
                keys.append(f"result/{rank}/{place}")
                if rank != self.rank:
                    results.update(factor_file.decode(self.take(keys[-1]), f"result of rank {rank}")[0])
        if self.everywhere:
            self._await_all()
        if self.rank == 0:
            for key in keys:
                self._drop(key)
        return results

    def give(self, key: str, content: bytes) -> None:
        """Leave something for the others, in pieces small enough for the store."""
        count = max(1, math.ceil(len(content) / _PIECE))
        with _connected():
            for place in range(count):
                self.store.set(f"{key}/{place}", content[place * _PIECE : (place + 1) * _PIECE])
            # Last, since a process that finds it takes the pieces.
            self.store.set(key, str(count))

    def take(self, key: str) -> bytes:
        """What another process has left, or will leave, under a key. Raises ProcessError if one of them has failed."""
        for pause in _pauses(self.size):
            self.check()
            with _connected():
                if self.store.check([key]):
                    return b"".join(self.store.get(f"{key}/{place}") for place in range(int(self.store.get(key))))
            time.sleep(pause)
        raise AssertionError("the pauses never end")

    def _drop(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):  # not every kind of store can
            for place in range(int(self.store.get(key))):
                self.store.delete_key(f"{key}/{place}")

    def _await_all(self) -> None:
        """Rank 0 waits until every process has come here."""
        with _connected():
            here = self.store.add("done", 1)
        if self.rank == 0:
            for pause in _pauses(self.size):
                if here == self.size:
                    return
                self.check()
                time.sleep(pause)
                with _connected():
                    here = self.store.add("done", 0)

    def check(self) -> None:
        """Raise ProcessError if another process has failed."""
        if self.store is None:
            return
        with _connected():
            failed = self.store.check(["failure"])
            reason = self.store.get("failure").decode() if failed else ""
        if failed:
            raise ProcessError(f"another process of this run failed: {reason}")

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others of an error in this block; raises ProcessError instead if another process failed first."""
        try:
            yield
        except ProcessError:
            raise
        except BaseException as error:
            if self.store is None:
                raise
            with contextlib.suppress(Exception):
                first = self.store.add("failures", 1) == 1
                if first:
                    self.store.set("failure", f"rank {self.rank}: {error or type(error).__name__}")
                elif isinstance(error, InitializationError):
                    raise ProcessError("another process of this run failed before") from error
            raise


def _parcels(results: Mapping[str, Factors]) -> list[dict[str, Factors]]:
    """The results in parcels of about _PARCEL bytes: a parcel costs a few messages, whatever its size."""
    parcels: list[dict[str, Factors]] = []
    room = 0
    for name, factors in results.items():
        if room <= 0:
            parcels.append({})
            room = _PARCEL
        parcels[-1][name] = factors
        room -= factors.A.nbytes + factors.B.nbytes
    return parcels


_joined: ContextVar[Job | None] = ContextVar("joined", default=None)


@contextlib.contextmanager
def torchruns_job() -> Iterator[Job]:
    """Join the processes that torchrun, or anything that sets its variables, has started; rank 0 gets the results.

    Each gets the GPU of its LOCAL_RANK, or its share of the cores. Raises BackendError if they cannot find each other.
    """
    if not _is_started_together():
        yield Job()
        return
    try:
        store, rank, size = next(iter(dist.rendezvous("env://")))
    except (RuntimeError, ValueError, OSError) as error:
        raise BackendError(
            f"the processes cannot find each other ({str(error).splitlines()[0]}); start them with torchrun"
        ) from error
    local_rank, local_size = _launchers("LOCAL_RANK", rank, least=0), _launchers("LOCAL_WORLD_SIZE", size, least=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_size))
    job = Job(rank, size, meet(dist.PrefixStore("inilora", store), rank, size))
    token = _joined.set(job)
    try:
        with job.reporting():
            yield job
    finally:
        _joined.reset(token)


@contextlib.contextmanager
def shared_run() -> Iterator[Job]:
    """The job that the next run belongs to: torchrun's, a trainer's with torch.distributed initialized, or none.

    In a trainer's job every process has to make the same call, and all get the result.
    """
    joined = _joined.get()
    if joined is None and not (_is_initialized() and dist.get_world_size() > 1):
        yield Job()
        return
    if joined is not None:
        yield joined
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    store = meet(dist.PrefixStore("inilora", dist.distributed_c10d._get_default_store()), rank, size)
    job = Job(rank, size, store, everywhere=True)
    with job.reporting():
        yield job


def meet(store: Any, rank: int, size: int) -> Any:
    """The part of a store that only these processes share, in this call alone. Raises ProcessError after 30 minutes.

    The store of a job that torchrun restarts still holds what the killed processes left. So rank 0 calls with a new
    name, everyone answers with a number of their own, and the name counts once rank 0 has confirmed those numbers.
    """
    mine = secrets.token_hex(8)
    began = time.monotonic()
    warned = False
    if rank == 0:
        store.set("call", mine)
    for pause in _pauses(size):
        with _connected():
            if rank == 0:
                answers = [_read(store, f"answer/{other}").split() for other in range(1, size)]
                if all(answer[:1] == [mine] for answer in answers):
                    store.set(f"met/{mine}", " ".join(answer[1] for answer in answers))
                    return dist.PrefixStore(mine, store)
            elif call := _read(store, "call"):
                store.set(f"answer/{rank}", f"{call} {mine}")
                if mine in _read(store, f"met/{call}").split():
                    return dist.PrefixStore(call, store)
        waited = time.monotonic() - began
        if waited > _LONGEST_MEETING:
            raise ProcessError(
                f"rank {rank} of {size} waited {_LONGEST_MEETING // 60} minutes for the others; every process of the "
                f"job has to make the same call"
            )
        if waited > _PATIENCE and not warned:
            warned = True
            warnings.warn(
                f"rank {rank} of {size} waits for the other processes; each of them has to make the same call, not "
                f"rank 0 alone",
                stacklevel=4,
            )
        time.sleep(pause)
    raise AssertionError("the pauses never end")


def _read(store: Any, key: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else ""


def _is_initialized() -> bool:
    return bool(dist.is_available() and dist.is_initialized())


def _is_started_together() -> bool:
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" in os.environ
    return several and bool(dist.is_available()) and not _is_initialized()


def _launchers(name: str, otherwise: int, least: int) -> int:
    """A number that torchrun has put into the environment. Raises BackendError for what it never puts there."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < least:
        raise BackendError(f"{name}={text}: not a number that torchrun sets; start the processes with torchrun")
    return int(text)


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """The places of `costs` dealt to `size` processes: the largest first, each to the one with the least so far.

    No deal is longer than 4/3 of the best one (Graham 1969, SIAM J. Appl. Math. 17).

    >>> shares([1.0, 5.0, 4.0, 2.0], 2)
    [[1, 0], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return dealt


def _pauses(size: int) -> Iterator[float]:
    """Seconds to wait before each look: a quarter of the wait so far, few a second in all."""
    pause, longest = 2e-4, min(max(0.01, size / _LOOKS), 1.0)
    while True:
        yield pause
        pause = min(1.25 * pause, longest)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"the connection to the other processes of this run is lost ({str(error).splitlines()[0]}); one of them "
            f"has ended"
        ) from error
