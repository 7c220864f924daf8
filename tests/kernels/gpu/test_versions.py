"""The same proofs from the machine code under the lowest triton that is declared, and one in between.

`make triton-versions` installs each into a folder of its own; without them these tests are skipped. torch need not
match: nothing is launched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from inilora_kernels.kernels.gpu.backend import LEAST_TRITON

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("TRITON_VERSIONS", ROOT / ".triton-versions"))
VERSIONS = (".".join(map(str, (*LEAST_TRITON, 0))), "3.6.0")


def test_the_package_declares_the_least_version_that_the_backend_takes() -> None:
    declared = f"triton>={'.'.join(map(str, LEAST_TRITON))}; platform_system"
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8").count(declared) == 2


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_compiled_ahead(version: str) -> None:
    if not (FOLDER / version).is_dir():
        pytest.skip(f"make triton-versions installs triton {version}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER / version), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    tests = Path(__file__).parent / "test_compile.py"
    done = subprocess.run(
        [*command, str(tests)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
