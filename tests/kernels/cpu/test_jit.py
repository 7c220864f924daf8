"""Compiled functions where numba's cache cannot be written, or is damaged."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from inilora_kernels.kernels.cpu.jit import njit

@njit(cache=True, nogil=True)
def double(x):
    return 2 * x
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module where numba can keep nothing: a file stands in __pycache__'s place, and the home is no folder."""
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "double.py").write_text(MODULE)
    (tmp_path / "package" / "__pycache__").write_text("")
    return tmp_path / "package" / "double.py"


def found_in_cache(module: Path) -> int:
    """Import the module afresh, as another process would, and use it; whether its machine code was in the cache."""
    spec = importlib.util.spec_from_file_location("double", module)
    assert spec is not None
    assert spec.loader is not None
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    assert imported.double(21) == 42
    return sum(imported.double._cache_hits.values()) if imported.double._cache is not None else 0


def test_the_cache_is_ours(module: Path) -> None:
    assert [found_in_cache(module), found_in_cache(module)] == [0, 1]


def test_or_there_is_none(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INILORA_CACHE", "/proc/no-cache")
    assert [found_in_cache(module), found_in_cache(module)] == [0, 0]


def test_a_damaged_cache_costs_a_compilation(module: Path, own_cache: Path) -> None:
    assert not found_in_cache(module)
    files = [file for file in own_cache.rglob("*.nb*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(b"\0" * 100)
    assert not found_in_cache(module)


def test_a_cache_that_others_can_write_is_not_used(module: Path, own_cache: Path) -> None:
    assert not found_in_cache(module)
    (folder,) = own_cache.glob("numba-*")
    folder.chmod(0o777)
    assert not found_in_cache(module)


def test_what_is_called_from_another_file_is_not_kept_beyond_that_file(tmp_path: Path) -> None:
    """numba compiles it into the caller, whose own file is the same."""
    called, caller = tmp_path / "called.py", tmp_path / "caller.py"
    called.write_text("from inilora_kernels.kernels.cpu.jit import njit\n@njit()\ndef one(): return 1\n")
    caller.write_text(
        "from called import one\nfrom inilora_kernels.kernels.cpu.jit import njit\n"
        "@njit(cache=True)\ndef two(): return 2 * one()\nprint(two(), sum(two._cache_hits.values()))\n"
    )

    def run() -> str:
        return subprocess.run([sys.executable, str(caller)], capture_output=True, text=True, check=True).stdout

    assert [run(), run()] == ["2 0\n", "2 1\n"]
    called.write_text(called.read_text().replace("return 1", "return 10"))
    assert run() == "20 0\n"


BITS = """
import hashlib
import numpy as np
from inilora_kernels.kernels.cpu.tridiagonal import tridiagonal

T = np.random.default_rng(0).standard_normal((250, 250))
T, d, e, betas = T @ T.T, np.zeros(250), np.zeros(250), np.zeros(250)
tridiagonal(T, d, e, betas)
print(hashlib.sha256(T.tobytes() + d.tobytes()).hexdigest())
"""


def test_the_first_run_has_the_bits_of_later_ones(tmp_path: Path) -> None:
    """The first one compiles; sums of 250 products show in what order they were taken."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BITS]
    first, second = (subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert first.stdout == second.stdout


CALLS = """
import numpy as np
from inilora_kernels.kernels.cpu import eigen, moments

asked = []
dispatcher = moments._moments
ask = dispatcher._compile_for_args
dispatcher._compile_for_args = lambda *values: asked.append(values) or ask(*values)
bits = np.zeros(4, np.uint16)
for _ in range(3):
    dispatcher(bits, bits, 2, 2, 2, 0.0, 0.0)
print(len(asked))
"""


def test_numba_knows_at_once_which_machine_code_is_meant(tmp_path: Path) -> None:
    """Loaded twice, a function would be looked up at each call, which takes longer than a small matrix."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CALLS]
    for _ in range(2):
        found = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
        assert int(found.stdout) <= 1
