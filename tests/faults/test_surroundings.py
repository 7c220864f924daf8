"""The fault campaign, on what surrounds a run: environment variables, limits, clocks, and folders without rights.

Each run must write the same bytes as in ordinary surroundings, or end with one line that says what to change.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# {0}: an empty folder, with `file` and a pipe, `pipe`, in it.
VARIABLES = """
    NUMBA_NUM_THREADS=0
    NUMBA_NUM_THREADS=-3
    NUMBA_NUM_THREADS=abc
    NUMBA_NUM_THREADS=999999
    NUMBA_DISABLE_JIT=1
    NUMBA_CPU_FEATURES=nonsense
    NUMBA_CACHE_DIR=/proc/none
    NUMBA_CACHE_DIR={0}/file
    NUMBA_CACHE_LOCATOR_CLASSES=nonsense
    NUMBA_OPT=9
    NUMBA_THREADING_LAYER=nonsense
    NUMBA_BOUNDSCHECK=1
    OMP_NUM_THREADS=abc
    OMP_NUM_THREADS=0
    OMP_NUM_THREADS=1000
    MKL_NUM_THREADS=-1
    PYTHONOPTIMIZE=2
    PYTHONWARNINGS=error
    PYTHONUTF8=0 LC_ALL=C PYTHONCOERCECLOCALE=0
    LC_ALL=xx_YY.nonsense
    TMPDIR=/none
    TMPDIR=/proc
    HF_HOME=/proc/none
    HF_HOME={0}/file
    HF_ENDPOINT=nonsense
    HF_HUB_DOWNLOAD_TIMEOUT=abc
    INILORA_CACHE={0}/file
    INILORA_CACHE={0}/pipe
    INILORA_CACHE=/dev/null
    INILORA_CACHE=/proc/none
    INILORA_CACHE=~nobody-of-this-name/x
    HOME=/none XDG_CACHE_HOME=relative INILORA_CACHE=
    XDG_CACHE_HOME={0}/file INILORA_CACHE=
    WORLD_SIZE=abc MASTER_ADDR=localhost MASTER_PORT=0 RANK=0
    WORLD_SIZE=2 MASTER_ADDR=localhost
    WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=abc RANK=0
    WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=0 RANK=abc
    LOCAL_RANK=abc
    WORLD_SIZE=1 RANK=3 MASTER_ADDR=nowhere
    COLUMNS=0
    COLUMNS=1
    COLUMNS=abc LINES=x
    COLUMNS=-5
    TERM=nonsense FORCE_COLOR=1
    MPLBACKEND=nonsense
    MPLCONFIGDIR=/proc/none
    TZ=nonsense
"""


def limited(kind: int, most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (most, most))


LIMITS = {
    "64 open files": limited(resource.RLIMIT_NOFILE, 64),
    "files of at most 1,000 bytes": limited(resource.RLIMIT_FSIZE, 1000),
    "no core": limited(resource.RLIMIT_CORE, 0),
    "a umask that takes all rights": lambda: os.umask(0o777) and None,
    "no standard output": lambda: os.close(1),
    "no standard error": lambda: os.close(2),
    "no standard input": lambda: os.close(0),
}


def run(folder: Path, *arguments: str | Path, prepare: Callable[[], None] | None = None, **variables: str) -> str:
    """ "same", "refused", or what is wrong; `out` is what an undisturbed run has written."""
    out = folder / "out"
    command = [sys.executable, "-m", "inilora_kernels", *map(str, arguments), "-o", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--rank", "2", "--solver", "krylov", "--no-progress"],
        env={**environment, **variables},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=prepare,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("inilora: ")]
    problems = [line for line in said if not line.startswith("inilora: warning")]
    left = {path.name for path in folder.iterdir()} - {"file", "pipe", "cache"}
    if done.returncode == 0 and left == {"out"}:
        return "same"
    if done.returncode == 2 and len(problems) == 1 and not left and "Traceback" not in done.stderr:
        return "refused"
    return f"status {done.returncode}, left {left}: {done.stderr[-1500:]}"


def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file").write_text("text")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variables", [line.strip() for line in VARIABLES.strip().splitlines()])
def test_variables(llama: Path, tmp_path: Path, undisturbed: bytes, variables: str) -> None:
    folder = prepared(tmp_path)
    pairs = dict(one.format(folder).split("=", 1) for one in variables.split())
    verdict = run(folder, "approximate", llama, **pairs)
    COUNTS[verdict] += 1
    assert verdict in ("same", "refused")
    if verdict == "same":
        assert (folder / "out").read_bytes() == undisturbed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(llama: Path, tmp_path: Path, undisturbed: bytes, limit: str) -> None:
    folder = prepared(tmp_path)
    verdict = run(folder, "approximate", llama, prepare=LIMITS[limit])
    COUNTS[verdict] += 1
    assert verdict in ("same", "refused")
    if verdict == "same":
        (folder / "out").chmod(0o600)
        assert (folder / "out").read_bytes() == undisturbed


COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, "approximate", llama, INILORA_CACHE=str(folder / "cache")) == "same"
    return (folder / "out").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    print(f"\nsurroundings: {dict(COUNTS)}")
