"""Every part of bench.gpu with the interpreter on tiny matrices, its file after each row, and the report of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, gpu_report
from bench.harness import Row
from bench.six_models import MODELS, WAYS
from inilora_kernels.kernels.gpu import gram_layout
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.tiles import GramTile
from tests.kernels.gpu.cases import CPU, PRODUCT_ERROR
from tests.kernels.gpu.interpreter import interpreted


@pytest.fixture
def backend() -> Iterator[TritonBackend]:
    with interpreted():
        yield TritonBackend(CPU)


class Done:
    """A process that has printed the checksum of a run of its own."""

    returncode = 0
    output = ""

    def communicate(self, timeout: float) -> tuple[str, str]:
        return Done.output, ""


def test_every_part_runs_and_is_written(
    backend: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (A, _), *_ = gpu.final(
        backend, gpu.problems_of([gpu.synthetic((40, 24), torch.bfloat16, 0)], 8), gpu.TOY.repeated_steps
    ).values()
    Done.output = f"{float(A.double().sum())}\n"
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: Done() if "--checksum" in command else real(command, **options),
    )
    # Few programs, as each costs the interpreter milliseconds.
    monkeypatch.setattr(gram_layout, "gram_tile", lambda architecture, itemsize: GramTile(256, 256, 4, 1, "ieee"))
    # However slow the machine: nothing is left out.
    monkeypatch.setattr(gpu, "PARTS", {name: (question, 10**6) for name, (question, _) in gpu.PARTS.items()})
    for name in gpu.PARTS:
        gpu.run_part(name, backend, gpu.TOY, "gpu-toy", tmp_path)
    content = json.loads((tmp_path / "gpu-toy.json").read_text(encoding="utf-8"))
    assert list(content) == list(gpu.PARTS)
    for part in content.values():
        assert not [row for row in part["rows"] if "error" in row]
    for row in content["correctness"]["rows"]:
        assert row["products"] < PRODUCT_ERROR[getattr(torch, row["dtype"].removeprefix("torch."))]
        assert row["loss"] < 1e-12
    assert all(row["same bits"] for part in ("repeats", "processes") for row in content[part]["rows"])
    assert all(row["predicted µs"] > 0 and row["launches µs"] > 0 for row in content["steps"]["rows"])
    direct = content["direct"]["rows"]
    assert max(max(row["XWᵀ"], row["XWᵀW"]) for row in direct if "products" in row) < 1e-6
    assert max(row["of what is granted"] for row in direct if "products" in row) < 1
    assert all(row["predicted µs"] > 0 for row in direct if "a pass" in row)
    assert [row["certified"] for row in direct if "certified" in row] == [1]
    names = {row["tile"].partition(",")[0] for row in content["tiles"]["rows"]}
    assert names == {"256×64", "128×128", "128×64", "64×64"}
    krylov, adam = content["whole"]["rows"]
    assert krylov["certified"] == adam["certified"] == 2
    assert krylov["worst excess"] < 1e-8 < adam["worst excess"]

    gpu_report.main([str(tmp_path / "gpu-toy.json")])
    assert "| measured / predicted |" in (tmp_path / "gpu-toy-report.md").read_text(encoding="utf-8")
    assert (tmp_path / "gpu-toy.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_kernel_shows(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gradient_products", lambda W, A, B: (B.T @ W * 1.001, W @ A.T))
    row = next(gpu.correctness(backend, gpu.TOY))
    assert row["products"] > 10 * PRODUCT_ERROR[torch.bfloat16]


def test_a_part_that_fails_keeps_its_rows_and_says_why(
    backend: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(backend: TritonBackend, sizes: gpu.Sizes) -> Iterator[Row]:
        yield {"seconds": 1.0}
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.PARTS, "steps", (broken, 60))
    gpu.run_part("steps", backend, gpu.TOY, "gpu-toy", tmp_path)
    rows = json.loads((tmp_path / "gpu-toy.json").read_text(encoding="utf-8"))["steps"]["rows"]
    assert rows == [{"seconds": 1.0}, {"error": "RuntimeError: no kernel image"}]


def test_a_part_out_of_time_says_so(backend: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "steps", (lambda backend, sizes: iter([{"a": 1}, {"a": 2}]), 0))
    assert gpu.run_part("steps", backend, gpu.TOY, "gpu-toy", tmp_path) == [
        {"a": 1},
        {"left out": "what came after 0 s"},
    ]


def test_a_hanging_part_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(command: list[str], *, check: bool, timeout: float) -> None:
        started.append(command[4])
        if command[4] == "steps":
            raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    gpu.run_apart(["correctness", "steps", "table5"], "gpu-toy", tmp_path, [])
    assert started == ["correctness", "steps", "table5"]
    assert "steps: stopped after 90 s" in capsys.readouterr().err
    gpu.run_apart(["steps"], "gpu-toy", tmp_path, [], 300)
    assert "steps: stopped after 300 s" in capsys.readouterr().err


def test_a_killed_worker_of_table_5_is_a_row(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, -9, stdout="", stderr="")
    )
    sizes = gpu.Sizes(**{**vars(gpu.TOY), "table5": MODELS[:1]})
    assert [row["error"] for row in gpu.table5(backend, sizes)] == ["killed", "killed"]


def test_a_row_of_table_5_is_what_its_process_measured(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='a warning\n{"steps": 200, "extrapolated": true}\n')

    monkeypatch.setattr(subprocess, "run", run)
    rows = list(gpu.table5(backend, gpu.Sizes(**{**vars(gpu.TOY), "table5": MODELS[:1]})))
    assert [row["steps"] for row in rows] == [200, 200]
    assert all(row["extrapolated"] for row in rows)
    assert [command[-3:] for command in commands] == [["--row", "RoBERTa Base", way] for way in WAYS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])


def test_it_needs_little_besides_torch_and_triton() -> None:
    """A bare CUDA image lacks pydantic, platformdirs and git; a part's file is written all the same."""
    missing = "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'platformdirs', 'numba', 'typer', 'peft']))"
    code = f"{missing}; import bench.gpu; from bench.harness import machine; print(machine())"
    environment = {**os.environ, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "'commit': ''" in done.stdout


def test_the_parts_fit_ten_minutes() -> None:
    assert sum(limit for _, limit in gpu.PARTS.values()) <= 600 - 30
