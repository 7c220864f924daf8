"""The CUDA device without a GPU: torch.cuda's own calls recorded, failures planted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from inilora_kernels.kernels.gpu import device as gpu_device
from inilora_kernels.kernels.gpu.device import CudaDevice

LOG: list[str] = []


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.name = f"stream {len([line for line in LOG if line.startswith('made')])} of {device}"
        LOG.append(f"made {self.name}")

    def synchronize(self) -> None:
        LOG.append(f"synchronize {self.name}")

    def wait_stream(self, other: Stream) -> None:
        LOG.append(f"{self.name} waits for {other.name}")


class Graph:
    """Capture as torch's: an error inside invalidates it, and then `capture_end` raises too."""

    broken = False

    def capture_begin(self, capture_error_mode: str) -> None:
        LOG.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        LOG.append("end")
        if Graph.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        LOG.append("replay")


@contextmanager
def entered(what: object) -> Iterator[None]:
    name = getattr(what, "name", what)
    LOG.append(f"enter {name}")
    try:
        yield
    finally:
        LOG.append(f"leave {name}")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    LOG.clear()
    Graph.broken = False
    monkeypatch.setattr(gpu_device, "_WITHOUT_CAPTURE", set())
    monkeypatch.setattr(gpu_device, "_WITHOUT_LIBRARIES", set())
    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "device": entered,
        "stream": entered,
        "get_device_name": lambda device: f"GPU {device.index}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CudaDevice(torch.device("cuda", 1))


def test_a_capture_runs_on_the_devices_own_stream_and_device(device: CudaDevice) -> None:
    """torch.cuda.graph would capture on the device that captured first."""
    LOG.clear()
    replay = device.captured(lambda: LOG.append("launch"))
    assert LOG == [
        "synchronize stream 0 of cuda:1",
        "enter cuda:1",
        "enter stream 0 of cuda:1",
        # Another thread reads weights and pins memory meanwhile, which a global capture would forbid.
        "begin thread_local",
        "launch",
        "end",
        "leave stream 0 of cuda:1",
        "leave cuda:1",
    ]
    assert replay is not None
    replay()
    assert LOG[-1] == "replay"


def failing() -> None:
    Graph.broken = True
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_restores_the_stream_says_why_and_is_not_tried_again(device: CudaDevice) -> None:
    with pytest.warns(UserWarning, match=r"GPU 1: capturing a CUDA graph failed \(RuntimeError: operation not"):
        assert device.captured(failing) is None
    assert LOG[-2:] == ["leave stream 0 of cuda:1", "leave cuda:1"]
    # Nor by the next batch of the run, which makes its streams anew; another GPU may capture.
    assert not device.captures
    assert not CudaDevice(torch.device("cuda", 1)).captures
    assert CudaDevice(torch.device("cuda", 0)).captures


def test_what_a_library_refuses_in_a_capture_costs_our_kernels_no_graph(device: CudaDevice) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.captured_with_libraries(failing) is None
        assert LOG[-2:] == ["leave stream 0 of cuda:1", "leave cuda:1"]
        Graph.broken = False
        LOG.clear()
        assert device.captured_with_libraries(lambda: LOG.append("launch")) is None
        assert LOG == []
        assert device.captured(lambda: LOG.append("launch")) is not None
    other = CudaDevice(torch.device("cuda", 0)).captured_with_libraries(lambda: LOG.append("launch"))
    assert other is not None
    other()
    assert LOG[-1] == "replay"


def test_out_of_memory_in_a_capture_is_not_swallowed(device: CudaDevice) -> None:
    def exhausted() -> None:
        Graph.broken = True
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        device.captured(exhausted)
    assert device.captures
    assert LOG[-2:] == ["leave stream 0 of cuda:1", "leave cuda:1"]


def test_copies_and_computing_wait_for_each_other_on_their_streams(device: CudaDevice) -> None:
    LOG.clear()
    device.computing_waits()
    device.copying_waits()
    assert LOG == [
        "stream 0 of cuda:1 waits for stream 1 of cuda:1",
        "stream 1 of cuda:1 waits for stream 0 of cuda:1",
    ]
