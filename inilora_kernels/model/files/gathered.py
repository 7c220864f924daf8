"""Tensors that several processes hold together, as FSDP2 and ZeRO-3 shard them, gathered for a run that they share.

Gathering takes all processes at once, and a run shares its matrices among them: each reads others. So each tensor is
gathered before the run, one at a time and in one order for all, into a file on every machine. Its processes read that
file. It has no name any more once they have opened it, so that it is gone with the last of them, however they end.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any

import torch.distributed

from ...errors import CheckpointError
from .live import LiveTensor
from .tensor import ContiguousTensor, StoredTensor, tensor_bytes

dist: Any = torch.distributed


@dataclass(frozen=True)
class GatheredTensor(ContiguousTensor):
    """A tensor in a file without a name, which `opened` keeps there; see `StoredTensor`."""

    opened: FileIO


def gather(tensors: Mapping[str, LiveTensor]) -> dict[str, StoredTensor]:
    """Gather these tensors, on all processes at once, into a file on each machine. Memory holds one of them at a time.

    Every process of the job has to call this with tensors of the same names, and gets the same back. Raises
    CheckpointError on all of them if one has others, or no machine's folder for temporary files takes the file.
    """
    names = list(tensors)
    _require_same_names(names)
    path = _agreed(f"{tempfile.gettempdir()}/inilora-{os.urandom(8).hex()}")
    writes = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    problem = ""
    stream: BufferedRandom | None = None
    try:
        stream = open(path, "xb+") if writes else None  # noqa: SIM115
    except OSError as error:
        problem = f"{path}: {error.strerror or error}"
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        values = tensor.read()  # on every process, or the others wait forever
        offsets[name], end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        if stream is not None and not problem:
            try:
                stream.write(tensor_bytes(values))
            except OSError as error:
                problem = f"{path}: {error.strerror or error}"
    if stream is not None:
        stream.close()
    _require_no_problem(problem)
    opened = None
    try:
        opened = FileIO(path)
    except OSError as error:
        problem = f"{path}: {error.strerror or error}; processes of one machine need one folder for temporary files"
    dist.barrier()
    if writes:
        Path(path).unlink(missing_ok=True)
    _require_no_problem(problem)
    assert opened is not None
    place = Path(f"/proc/self/fd/{opened.fileno()}")
    return {
        name: GatheredTensor(name, place, tensor.dtype, tensor.shape, offsets[name], opened)
        for name, tensor in tensors.items()
    }


def _require_same_names(names: list[str]) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, names)
    odd = next((rank for rank, others in enumerate(every) if others != every[0]), None)
    if odd is not None:
        strange = sorted(set(every[0]) ^ set(every[odd]))[:1] or ["their order"]
        raise CheckpointError(
            f"rank {odd} has other sharded weights than rank 0 ({strange[0]}); give every process the whole model, not "
            f"a stage of a pipeline, or give the folder that the model was loaded from"
        )


def _agreed(path: str) -> str:
    """Rank 0's choice."""
    chosen = [path]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _require_no_problem(problem: str) -> None:
    """Raise on all processes what one of them has met."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, problem)
    found = next((one for one in every if one), None)
    if found:
        raise CheckpointError(
            f"the sharded weights cannot be gathered: {found}; set TMPDIR to a folder with room for them"
        )
