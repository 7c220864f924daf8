"""The fault campaign: spoiled inputs of every reader, kills at every fault point, a full disk, and races.

Each input must end in an error of ours or in a finite result; nothing else may be new or changed on disk.
`python -m pytest tests/faults -m slow -s` prints the counts that docs/reliability.md gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inilora_kernels import FactorSet, approximate_model, convert, export_delta, export_merged, export_residual
from inilora_kernels.errors import InitializationError
from inilora_kernels.storage import cache_upkeep

from .corpus import spoiled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def originals(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its factors, its exports, and a trained adapter of each form."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(llama, folder / "model")
    factors = approximate_model(folder / "model", 2, solver="krylov", cache=False, progress=False)
    factors.save(folder / "factors.safetensors")
    export_delta(folder / "model", factors, folder / "delta")
    export_residual(folder / "model", factors, folder / "residual")
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def actions(folder: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every reader and writer, by name; all of them write to `out`."""
    model, factors = folder / "model", folder / "factors.safetensors"

    def approximated(**options: Any) -> None:
        approximate_model(model, 2, cache=False, progress=False, **options).save(out)

    return {
        "approximate": lambda: approximated(solver="krylov"),
        "approximate by adam": lambda: approximated(steps=3),
        "inspect": lambda: FactorSet.load(factors),
        "residual": lambda: export_residual(model, FactorSet.load(factors), out),
        "delta": lambda: export_delta(model, FactorSet.load(factors), out),
        "convert": lambda: convert(folder / "delta/adapter", FactorSet.load(factors), out, model),
        "merge": lambda: export_merged(folder / "delta/adapter", FactorSet.load(factors), out, model),
        "convert a residual": lambda: convert(folder / "residual/adapter", FactorSet.load(factors), out),
    }


READERS = {
    "model/model.safetensors": ("approximate", "approximate by adam", "residual", "merge"),
    "model/config.json": ("approximate", "residual", "delta", "merge"),
    "factors.safetensors": ("inspect", "residual", "delta", "convert", "merge"),
    "delta/adapter/adapter_config.json": ("convert", "merge"),
    "delta/adapter/adapter_model.safetensors": ("convert", "merge"),
    "residual/base/inilora_residual.json": ("convert a residual",),
}


def judged(action: Callable[[], Any], out: Path) -> str:
    """ "refused", "finite", or what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except InitializationError as error:
        return "refused" if len(str(error)) > 20 and "\n" not in str(error) else f"unclear: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:80]}"
    files = [out] if out.is_file() else list(out.rglob("*.safetensors"))
    for file in files:
        if not all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point()):
            return f"not finite: {file.name}"
    return "finite"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", READERS)
def test_spoiled_inputs(originals: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, out = tmp_path / "inputs", tmp_path / "out"
    shutil.copytree(originals, folder)
    # The residual's adapter names its base by its full path.
    config = folder / "residual/adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(originals), str(folder)))
    whole, before = (folder / name).read_bytes(), set(tmp_path.iterdir())
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for how, content in spoiled(folder / name, random.Random(name), 25):
        (folder / name).write_bytes(content)
        inputs = snapshot(folder)
        for reader in READERS[name]:
            verdict = judged(actions(folder, out)[reader], out)
            counts[verdict.split(" ")[0].strip(":")] += 1
            if verdict not in ("refused", "finite"):
                wrong.append(f"{reader}, {how}: {verdict}")
            if verdict != "finite" and (out.exists() or set(tmp_path.iterdir()) - before - {tmp_path / "cache"}):
                wrong.append(f"{reader}, {how}: left something")
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
        if snapshot(folder) != inputs:
            wrong.append(f"{how}: the inputs changed")
        (folder / name).write_bytes(whole)
    print(f"\n{name}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def killing(place: str, count: int, number: signal.Signals) -> Iterator[None]:
    """A signal at the count-th call of os.fsync, os.replace or Path.rename."""
    owner: Any = Path if place == "rename" else os
    real, calls = getattr(owner, place), [0]

    def call(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), number)
        return real(*arguments, **more)

    setattr(owner, place, call)
    try:
        yield
    finally:
        setattr(owner, place, real)


KILLS = [
    (name, place, count, number)
    for name, places in {
        "approximate": {"fsync": 2, "replace": 1},
        "approximate by adam": {"fsync": 2, "replace": 1},
        "residual": {"fsync": 5, "rename": 1},
        "delta": {"fsync": 4, "rename": 1},
        "convert": {"fsync": 3, "rename": 1},
        "merge": {"fsync": 4, "rename": 1},
    }.items()
    for place, most in places.items()
    for count in range(1, most + 1)
    for number in (signal.SIGKILL, signal.SIGTERM)
]


@pytest.mark.parametrize(("name", "place", "count", "number"), KILLS)
def test_kills(originals: Path, tmp_path: Path, name: str, place: str, count: int, number: signal.Signals) -> None:
    """Killed in the middle of writing, then run again: the output is complete, and nothing else is left."""
    torch.set_num_threads(1)
    out, inputs = tmp_path / "out", snapshot(originals)
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException), killing(place, count, number):
            actions(originals, out)[name]()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -number)
    if status and number == signal.SIGTERM:
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    if not out.exists():
        assert judged(actions(originals, out)[name], out) == "finite"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]
    assert snapshot(originals) == inputs


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
@pytest.mark.parametrize("name", ["approximate", "residual", "delta", "convert", "merge"])
@pytest.mark.parametrize("free", [0, 4096, 16384])
def test_a_full_disk(originals: Path, tmp_path: Path, name: str, free: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("may not mount")
    try:
        (disk / "full").write_bytes(bytes((1 << 20) - free))
        verdict = judged(actions(originals, disk / "out")[name], disk / "out")
        assert verdict in ("refused", "finite")
        assert {path.name for path in disk.iterdir()} <= {"full"} | ({"out"} if verdict == "finite" else set())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_races_on_one_cache_and_one_output(originals: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = FactorSet.load(originals / "factors.safetensors").to_bytes()
    processes = []
    for _ in range(4):
        process = os.fork()
        if not process:
            with contextlib.suppress(BaseException):
                factors = approximate_model(originals / "model", 2, solver="krylov", cache=True, progress=False)
                factors.save(tmp_path / "factors.safetensors")
                with contextlib.suppress(InitializationError):
                    export_residual(originals / "model", factors, tmp_path / "out")
                os._exit(0)
            os._exit(1)
        processes.append(process)
    assert {os.waitpid(process, 0)[1] for process in processes} == {0}
    assert (tmp_path / "factors.safetensors").read_bytes() == alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "factors.safetensors", "out"]
    assert snapshot(tmp_path / "out" / "base").keys() == snapshot(originals / "residual" / "base").keys()
    assert not cache_upkeep.damaged_entries()
