"""Durations on a GPU, and distances from float64."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from inilora_kernels.kernels.gpu.backend import TritonBackend

from .harness import seconds


def distance(found: Tensor, true: Tensor, scale: Tensor) -> float:
    return float((found.cpu().double() - true).norm() / scale.norm())


def duration(launch: Callable[[], None], backend: TritonBackend, window: float) -> float:
    """Seconds a call of `launch`, over as many calls as fill the window, after a window of warming up."""
    once = max(seconds(launch, backend.device.type), 1e-9)
    count = max(1, int(window / once))

    def many() -> None:
        for _ in range(count):
            launch()

    seconds(many, backend.device.type)
    return min(seconds(many, backend.device.type) for _ in range(2)) / count
