"""The command line as a user runs it: in a process of its own, or in the test's, which is two seconds quicker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Inilora = Callable[..., Ended]


def in_a_process(*arguments: str | Path) -> Ended:
    command = [sys.executable, "-m", "inilora_kernels", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)
