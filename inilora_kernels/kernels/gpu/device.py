"""What the backend needs from a device besides kernels: memory, copies during computation, and captured graphs.

`CudaDevice` is a GPU under CUDA or ROCm. `HostDevice` is the CPU under triton's interpreter: everything happens
immediately and in order. A test's device that records who waits for whom implements the same few methods.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

MEMORY_SHARE = 0.95  # of the free device memory that a wave may take
# Devices on which a capture has failed in this process: what a driver refuses once, it refuses again. What a library
# refuses within one says nothing of our own kernels.
_WITHOUT_CAPTURE: set[torch.device] = set()
_WITHOUT_LIBRARIES: set[torch.device] = set()


class Device(Protocol):
    """One device, its compute stream and its copy stream."""

    @property
    def device(self) -> torch.device:
        """The torch device of its buffers."""

    @property
    def captures(self) -> bool:
        """Whether `captured` is worth trying."""

    @property
    def compiles(self) -> bool:
        """Whether kernels are compiled when they are launched first, which may fail."""

    def free_memory(self) -> float:
        """Bytes that a wave may take."""

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory that the device can copy from while it computes."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy host memory to the device on the copy stream. Returns what `wait` takes; call from any thread."""

    def wait(self, copied: Any) -> None:
        """Make the host wait for one copy."""

    def computing_waits(self) -> None:
        """Make all further computation wait for the copies so far."""

    def copying_waits(self) -> None:
        """Make all further copies wait for the computation so far."""

    def captured(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """The launches as one graph to replay; None if they have to be made one by one."""

    def captured_with_libraries(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """`captured` of launches some of which libraries make."""

    def mark(self) -> Any:
        """A point on the compute stream for `wait` to wait for."""


@dataclass
class HostDevice:
    """The CPU, where triton's interpreter runs the kernels."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    captures: bool = False
    compiles: bool = False

    def free_memory(self) -> float:
        return math.inf

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)

    def wait(self, copied: Any) -> None:
        pass

    def computing_waits(self) -> None:
        pass

    def copying_waits(self) -> None:
        pass

    def captured(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        return None

    def captured_with_libraries(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        return self.captured(launch)

    def mark(self) -> Any:
        return None


class CudaDevice:
    """A GPU. All computation goes to a stream of its own, on which graphs are captured too.

    torch.cuda.graph is not used: it keeps one capture stream for the process, on the device that captured first; a
    capture that fails leaves torch on that stream (capture_end raises before the stream is restored); and up to torch
    2.8 it collects garbage each time. Here the stream is restored by its own context whatever happens inside.
    """

    compiles = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.computing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def captures(self) -> bool:
        return self.device not in _WITHOUT_CAPTURE

    def free_memory(self) -> float:
        """A share of the memory that the driver and torch's own cache have left."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return MEMORY_SHARE * (free + cached)

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        # A thread starts on device 0 and the default stream, whatever its parent uses.
        with torch.cuda.device(self.device), torch.cuda.stream(self.copying):
            target.copy_(source, non_blocking=True)
            return self._event(self.copying)

    def wait(self, copied: Any) -> None:
        copied.synchronize()

    def computing_waits(self) -> None:
        self.computing.wait_stream(self.copying)

    def copying_waits(self) -> None:
        self.copying.wait_stream(self.computing)

    def captured(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """Capture on the compute stream. Raises torch.OutOfMemoryError; warns once of another failure and its cause."""
        graph = self._graph(launch)
        if not isinstance(graph, Exception):
            return graph.replay
        _WITHOUT_CAPTURE.add(self.device)
        warnings.warn(
            f"{torch.cuda.get_device_name(self.device)}: capturing a CUDA graph failed "
            f"({type(graph).__name__}: {str(graph).splitlines()[0] if str(graph) else 'no message'}); every kernel "
            "is launched on its own instead: the same results, slower",
            stacklevel=2,
        )
        return None

    def captured_with_libraries(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """As `captured`, but in silence, and None where the graph's own memory is too much."""
        if not self.captures or self.device in _WITHOUT_LIBRARIES:
            return None
        try:
            graph = self._graph(launch)
        except torch.OutOfMemoryError:
            return None
        if not isinstance(graph, Exception):
            return graph.replay
        _WITHOUT_LIBRARIES.add(self.device)
        return None

    def _graph(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph | Exception:
        """The launches as a graph, or why there is none.

        capture_error_mode: "thread_local", as another thread reads and pins the next wave's weights in the meantime.
        """
        graph = torch.cuda.CUDAGraph()
        self.computing.synchronize()
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.computing):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    launch()
                finally:
                    # After a failure inside, this raises as well; the first error stays its context.
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: Exception = error.__context__ if isinstance(error.__context__, Exception) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            return cause
        return graph

    def mark(self) -> Any:
        return self._event(self.computing)

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event
