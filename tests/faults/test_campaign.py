"""The fault campaign: spoiled inputs of every reader, kills at every fault point, a full disk, and races.

Each input must end in an error of ours, in the result that the unspoiled input gives, or in the right result for what
the file now says, see `judges.py`; nothing else may be new or changed on disk.
`python -m pytest tests/faults -m slow -n0 -s` prints the counts that docs/reliability.md gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from inilora_kernels import FactorSet, approximate_model, convert, export_delta, export_merged, export_residual
from inilora_kernels.adapters.diffusers_folder import read_diffusers
from inilora_kernels.adapters.folder import read_adapter
from inilora_kernels.cli.main import main
from inilora_kernels.errors import InitializationError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets
from inilora_kernels.storage import cache_upkeep
from inilora_kernels.storage.authors_folder import save_inilora_pt

from .corpus import spoiled
from .judges import explained, finite, values

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
    generator = torch.Generator().manual_seed(0)
    for form in ("delta", "residual"):
        file = folder / form / "adapter/adapter_model.safetensors"
        trained = {
            name: one + 0.01 * torch.randn(one.shape, generator=generator) for name, one in load_file(file).items()
        }
        save_file(trained, file, metadata={"format": "pt"})
    return folder


def copied(originals: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    shutil.copytree(originals, folder)
    # The residual's adapter names its base by its full path.
    config = folder / "residual/adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(originals), str(folder)))
    return folder


def remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)


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
        "authors' files": lambda: save_inilora_pt(FactorSet.load(factors), out),
        "start": lambda: approximated(solver="krylov", start=FactorSet.load(factors)),
    }


READERS = {
    "model/model.safetensors": ("approximate", "approximate by adam", "residual", "merge"),
    "model/config.json": ("approximate", "residual", "delta", "merge"),
    "factors.safetensors": ("inspect", "residual", "delta", "convert", "merge", "authors' files", "start"),
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
    return "finite" if finite(out) else "not finite"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", READERS)
def test_spoiled_inputs(originals: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, out = copied(originals, tmp_path), tmp_path / "out"
    whole, before = (folder / name).read_bytes(), set(tmp_path.iterdir())
    expected = {}
    for reader in READERS[name]:
        assert judged(actions(folder, out)[reader], out) == "finite"
        expected[reader] = values(out)
        remove(out)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for how, content in spoiled(folder / name, random.Random(name), 25):
        (folder / name).write_bytes(content)
        inputs = snapshot(folder)
        for reader in READERS[name]:
            verdict = judged(actions(folder, out)[reader], out)
            if verdict == "finite":
                same = values(out) == expected[reader]
                verdict = "same" if same else explained(reader, folder, out, originals)
            counts[verdict.split(" ")[0].strip(":")] += 1
            if verdict not in ("refused", "same", "explained"):
                wrong.append(f"{reader}, {how}: {verdict}")
            if verdict not in ("same", "explained") and (
                out.exists() or set(tmp_path.iterdir()) - before - {tmp_path / "cache"}
            ):
                wrong.append(f"{reader}, {how}: left something")
            remove(out)
        if snapshot(folder) != inputs:
            wrong.append(f"{how}: the inputs changed")
        (folder / name).write_bytes(whole)
    print(f"\n{name}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)


COMMANDS = {
    "approximate": "approximate {0}/model -o {1} --rank 2 --solver krylov",
    "plan": "plan {0}/model --rank 2",
    "inspect": "inspect {0}/factors.safetensors",
    "start": "approximate {0}/model -o {1} --rank 2 --solver krylov --start {0}/factors.safetensors",
    "residual": "export {0}/factors.safetensors --base {0}/model -o {1}",
    "delta": "export {0}/factors.safetensors --base {0}/model -o {1} --form delta",
    "authors' files": "export {0}/factors.safetensors -o {1} --format inilora-pt",
    "convert": "convert {0}/delta/adapter --init {0}/factors.safetensors --base {0}/model -o {1}",
    "merge": "merge {0}/delta/adapter --init {0}/factors.safetensors --base {0}/model -o {1}",
}
READ_BY = {
    "model/model.safetensors": ("approximate", "plan", "residual", "merge"),
    "model/config.json": ("approximate", "plan", "residual", "delta"),
    "factors.safetensors": ("inspect", "start", "residual", "delta", "authors' files", "convert", "merge"),
    "delta/adapter/adapter_config.json": ("convert", "merge"),
    "delta/adapter/adapter_model.safetensors": ("convert", "merge"),
}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", READ_BY)
def test_the_command_line_on_spoiled_inputs(
    originals: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0, or 2 with one line about it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    folder, out = copied(originals, tmp_path), tmp_path / "out"
    whole = (folder / name).read_bytes()
    every = list(spoiled(folder / name, random.Random(f"{name} once more"), 12))
    counts: Counter[int] = Counter()
    for how, content in random.Random(name).sample(every, 24):
        (folder / name).write_bytes(content)
        for command in READ_BY[name]:
            arguments = [word.format(folder, out) for word in COMMANDS[command].split()]
            if "approximate" in arguments:
                arguments += ["--no-cache", "--no-progress"]
            monkeypatch.setattr(sys, "argv", ["inilora", *arguments])
            status: Any = 0
            try:
                main()
            except SystemExit as end:
                status = end.code or 0
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("inilora: ")]
            problems = [line for line in said if not line.startswith("inilora: warning")]
            assert (status, len(problems)) in ((0, 0), (2, 1)), f"{command}, {how}: {status} {problems}"
            assert not status or not out.exists()
            counts[status] += 1
            remove(out)
        (folder / name).write_bytes(whole)
    with capsys.disabled():
        print(f"\ncommand line, {name}: {dict(counts)}")


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def read_all(folder: Path, name: str) -> Any:
    """What the library makes of a file, as something to compare."""
    if name.startswith("model"):
        checkpoint = open_checkpoint(folder / "model")
        return [(one.module, one.read().tolist()) for one in find_targets(checkpoint, ["q_proj", "v_proj"])]
    if name == "factors.safetensors":
        return FactorSet.load(folder / name).to_bytes()
    read_diffusers(folder / "delta/adapter")
    adapter = read_adapter(folder / "delta/adapter")
    return [(name, A.tolist(), B.tolist()) for name, (A, B) in adapter.factors.items()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["factors.safetensors", "model/model.safetensors", "delta/adapter/adapter_config.json"]
)
def test_any_bytes(originals: Path, tmp_path: Path, name: str) -> None:
    """Bytes and fields that hypothesis chooses: refused, or, of a file with checksums, what was written."""
    folder = copied(originals, tmp_path)
    whole = (folder / name).read_bytes()
    before = read_all(folder, name)
    counts: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def spoil(data: st.DataObject) -> None:
        if name.endswith(".json"):
            content = json.loads(whole)
            key = data.draw(st.sampled_from(sorted(content)) | st.text(max_size=8))
            content[key] = data.draw(JSON)
            spoiled_content = json.dumps(content).encode()
        else:
            start = data.draw(st.integers(0, len(whole)))
            stop = data.draw(st.integers(start, min(len(whole), start + 12)))
            spoiled_content = whole[:start] + data.draw(st.binary(max_size=12)) + whole[stop:]
        (folder / name).write_bytes(spoiled_content)
        try:
            found = read_all(folder, name)
        except InitializationError:
            counts["refused"] += 1
            return
        counts["read"] += 1
        if name != "model/model.safetensors":
            assert found == before

    spoil()
    print(f"\nhypothesis, {name}: {dict(counts)}")


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("place", ["fsync", "replace", "rename"])
@pytest.mark.parametrize(
    "name",
    [
        *("approximate", "approximate by adam", "start", "residual", "delta", "authors' files"),
        *("convert", "convert a residual", "merge"),
    ],
)
def test_kills(originals: Path, tmp_path: Path, name: str, place: str, number: signal.Signals) -> None:
    """Killed at each fsync, replace or rename in turn, then run again: a complete output, and nothing else is left."""
    torch.set_num_threads(1)
    out, inputs = tmp_path / "out", snapshot(originals)
    kills = 0
    while True:
        process = os.fork()
        if not process:
            try:
                with contextlib.suppress(Exception), killing(place, kills + 1, number):
                    actions(originals, out)[name]()
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, -number)
        if status and number != signal.SIGKILL:
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        if not out.exists():
            assert judged(actions(originals, out)[name], out) == "finite"
        assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]
        assert snapshot(originals) == inputs
        remove(out)
        if not status:
            break
        kills += 1
    print(f"\n{number.name}: {kills}")


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
