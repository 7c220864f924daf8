"""Waves to time on a GPU, their durations, and distances from float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inilora_kernels.kernels.backend import Problem, Schedule
from inilora_kernels.kernels.gpu.backend import GRAPH_STEPS, TritonBackend
from inilora_kernels.kernels.gpu.layout import lay_out
from inilora_kernels.kernels.gpu.tiles import Tiles, tiles
from inilora_kernels.kernels.gpu.wave import Wave, padded_view, rate_table, start_of

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


def problems_of(weights: Sequence[Tensor], rank: int) -> list[Problem]:
    """The matrices with seeded random starts."""
    generator = torch.Generator().manual_seed(0)
    return [
        Problem(
            lambda W=W: W,
            (W.shape[0], W.shape[1]),
            W.dtype,
            torch.randn(rank, W.shape[1], generator=generator) * 0.02,
            torch.randn(W.shape[0], rank, generator=generator) * 0.02,
        )
        for W in weights
    ]


def schedule_of(steps: int) -> Schedule:
    return Schedule(steps, 5e-4, 5_000, 0.9, "mse")


def wave_of(
    weights: Sequence[Tensor],
    rank: int,
    backend: TritonBackend,
    parts: int,
    *,
    resident: bool,
    chosen: Tiles | None = None,
) -> Wave:
    """A wave of these matrices on the backend's device; chosen: tiles other than those of its GPU."""
    problems, steps = problems_of(weights, rank), 100_000
    chosen = chosen or tiles(backend.gpu().architecture, weights[0].element_size(), rank)
    layout = lay_out([one.shape for one in problems], [rank] * len(problems), [parts] * len(problems), chosen)
    rates = rate_table(schedule_of(steps), steps).to(backend.device)
    wave = Wave(layout, weights[0].dtype, rates, schedule_of(steps), resident=resident)
    for place, W in zip(layout.places, weights, strict=True):
        padded_view(wave.weights, place)[:, : place.columns].copy_(W)
    norms = [float(W.float().norm()) if W.dtype == torch.float16 else 0.0 for W in weights]
    wave.begin(start_of(layout, problems, schedule_of(steps), norms).values)
    return wave


def replayed(wave: Wave, backend: TritonBackend, window: float) -> float | None:
    """Seconds of a step of a wave in a captured graph, from its start; None where none can be captured."""
    place = backend.place()
    block = GRAPH_STEPS[0] if place.captures else 1
    wave.begin(wave.state)
    graph = place.captured(lambda: wave.advance(block))
    return None if graph is None else duration(graph, backend, window) / block
