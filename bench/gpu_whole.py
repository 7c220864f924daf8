"""What bench.gpu asks of whole runs: the public function over a file, and Table 5."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from inilora_kernels import estimate
from inilora_kernels.kernels.cpu.cost_model import this_machine
from inilora_kernels.kernels.gpu.backend import TritonBackend

from .harness import Row, seconds
from .six_models import WAYS, Model

RANK = 8


def public_function(backend: TritonBackend, weights: Sequence[Tensor], adam_steps: int) -> Iterator[Row]:
    """`approximate_model` with survey, hash, f*, solver and certificates: the first call, a second, the prediction."""
    # Imported here, since bench.gpu's other parts run without what this one needs.
    from inilora_kernels import approximate_model

    works = [estimate.Work((W.shape[0], W.shape[1]), W.element_size(), RANK) for W in weights]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        names = [f"layers.{place // 2}.self_attn.{'qv'[place % 2]}_proj.weight" for place in range(len(weights))]
        save_file(dict(zip(names, weights, strict=True)), file)
        for solver, steps in (("krylov", 0), ("adam", adam_steps)):
            excess: list[float] = []
            certified: list[bool] = []

            def run(
                solver: str = solver,
                steps: int = steps,
                excess: list[float] = excess,
                certified: list[bool] = certified,
            ) -> None:
                found = approximate_model(
                    file,
                    RANK,
                    solver=solver,
                    backend="triton",
                    device=str(backend.device),
                    cache=False,
                    progress=False,
                    **({"steps": steps} if steps else {}),
                )
                excess[:] = [one.certificate.excess for one in found.values()]
                certified[:] = [one.certificate.certified for one in found.values()]

            first, second = seconds(run, backend.device.type), seconds(run, backend.device.type)
            model = estimate.seconds(works, solver, steps, machine=this_machine(), card=backend.gpu())
            W = weights[0]
            yield {
                "whole run": f"{len(weights)}×{W.shape[0]}×{W.shape[1]} {W.dtype}, {solver}, {steps} steps",
                "first s": first,
                "s": second,
                "predicted s": model,
                "measured / predicted": second / model,
                "certified": sum(certified),
                "worst excess": max(excess),
            }


def table5_rows(models: Sequence[Model]) -> Iterator[Row]:
    """Each row by both ways, in processes of their own, as Measured in six_models.py."""
    for model in models:
        for way in WAYS:
            command = [sys.executable, "-m", "bench.gpu", "--row", model.name, way]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            told: Row = {"model": model.name, "way": way, "paper min": model.minutes}
            if done.returncode or not done.stdout:
                yield {**told, "error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
            else:
                yield {**told, **json.loads(done.stdout.splitlines()[-1])}
