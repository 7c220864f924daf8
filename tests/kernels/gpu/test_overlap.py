"""The backend on a simulated device: clocks for computing and copying, and the rules by which one waits for the other.

Nothing is timed: a copy of n bytes takes n units on the copy stream, s steps take s·PER_STEP on the other, and the
order of calls gives the schedule that a GPU would have to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from inilora_kernels.kernels.backend import Batch, Schedule
from inilora_kernels.kernels.gpu import backend as triton_backend
from inilora_kernels.kernels.gpu import waves
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.device import HostDevice
from inilora_kernels.kernels.gpu.wave import Wave

from .cases import CPU, make
from .interpreter import interpreted

WAVES, STEPS, PER_STEP = 4, 9, 2_000
COPY = 40 * 32 * 4


class Simulated(HostDevice):
    """computed, copied: when each stream is done with what it was given."""

    def __init__(self) -> None:
        super().__init__(captures=True)
        self.computed = self.copied = 0
        self.busy: list[tuple[str, int, int]] = []
        self.weights_read: list[torch.Tensor] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        start, size = self.copied, source.numel() * source.element_size()
        self.copied += size
        self.busy.append(("copy", start, self.copied))
        target.copy_(source)
        return self.copied

    def computing_waits(self) -> None:
        self.computed = max(self.computed, self.copied)

    def copying_waits(self) -> None:
        self.copied = max(self.copied, self.computed)

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def mark(self) -> Any:
        return self.computed


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    place = Simulated()
    monkeypatch.setattr(TritonBackend, "place", lambda self: place)
    monkeypatch.setattr(waves, "WAVE_MATRICES", 1)
    monkeypatch.setattr(triton_backend, "GRAPH_STEPS", (3, 1))

    def advance(self: Wave, steps: int) -> None:
        start = place.computed
        place.computed += steps * PER_STEP
        place.busy.append(("steps", start, place.computed))

    def captured(self: Simulated, launch: Callable[[], None]) -> Callable[[], None]:
        return launch

    monkeypatch.setattr(Wave, "advance", advance)
    monkeypatch.setattr(Simulated, "captured", captured)
    return place


def run(device: Simulated) -> int:
    _, problems = make([(40, 24)] * WAVES, [4] * WAVES, torch.float32)
    with interpreted():
        TritonBackend(CPU).adam(Batch(problems, Schedule(STEPS, 1e-3, 4, 0.9, "mse"), [STEPS]))
    return max(device.computed, device.copied)


def test_all_uploads_but_the_first_are_hidden_behind_the_steps(device: Simulated) -> None:
    # One step of warm-up before the captures, which the first upload hides.
    assert run(device) <= COPY + PER_STEP + WAVES * STEPS * PER_STEP
    copies = [span for span in device.busy if span[0] == "copy"]
    assert len(copies) == WAVES
    steps = [span for span in device.busy if span[0] == "steps"]
    for _, start, end in copies[1:]:
        assert any(start < last and first < end for _, first, last in steps), "a copy ran while nothing was computed"


def test_without_memory_for_the_next_weights_nothing_overlaps(
    device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulated, "free_memory", lambda self: 13_000.0)
    assert run(device) == WAVES * (COPY + STEPS * PER_STEP) + PER_STEP
