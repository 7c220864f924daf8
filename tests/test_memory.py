"""Memory as torch lays it out, whoever it comes from."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inilora_kernels.memory import empty, free_memory, returned, reused


@pytest.mark.parametrize("make", [empty, returned])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (1300, 1001), (3000, 1001)])
def test_tensors_small_and_large(
    shape: tuple[int, int], dtype: torch.dtype, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
) -> None:
    """The last ones are larger than what numpy asks for huge pages for, or have pages of their own, in most dtypes."""
    tensor = make(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    tensor.fill_(1)
    assert int(tensor.sum(dtype=torch.int64)) == math.prod(shape)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_while_a_run_lasts_and_only_when_it_is_free() -> None:
    shape, other = (3000, 1001), (1500, 2003)  # both are some megabytes, rounded up to the same
    with reused(matrices=2):
        first = empty(shape, torch.float64)
        view, place = first[7:].T, _place(first)
        first.fill_(3.0)
        del first
        # A view holds its memory.
        second = empty(shape, torch.float64)
        assert _place(second) != place
        assert float(view.min()) == 3.0
        del view
        assert _place(empty(other, torch.float64)) == place
        assert _place(second) != place
    # What outlives the run is its own, and what is free then is given back to the system.
    second.fill_(1.0)
    assert _place(empty(other, torch.float64)) != _place(second)


RESIDENT = """
import resource
from pathlib import Path
import torch
from inilora_kernels.memory import empty, reused

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (40 << 20)

before, seen = resident(), []
with reused(matrices=5):
    blocks = [empty((40 << 20,), torch.uint8).fill_(1) for _ in range(5)]
    seen.append(resident() - before)
    blocks.clear()
    seen.append(resident() - before)
seen.append(resident() - before)
print(*map(round, seen))
"""


RETURNED = """
import resource
from pathlib import Path
import torch
from inilora_kernels.memory import returned

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (8 << 20)

# A freed tensor of 16 MiB: from here on malloc has no pages of their own for smaller ones.
large = torch.ones(4 << 20)
del large
before, seen = resident(), []
tensors = [returned((8 << 20,), torch.uint8).fill_(1) for _ in range(5)]
seen.append(resident() - before)
# The last one stays: the heap would keep all that lies before it.
del tensors[:-1]
seen.append(resident() - before)
print(*map(round, seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux shows it")
def test_memory_goes_back_whatever_lives_behind_it() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    assert done.stdout == "5 1\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux shows it")
def test_no_more_is_kept_than_twice_the_largest_block() -> None:
    """In a process of its own, whose memory nothing else changes; in blocks of 40 MiB."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert done.stdout == "5 2 0\n"


def test_some_memory_is_free() -> None:
    assert free_memory() > 0
