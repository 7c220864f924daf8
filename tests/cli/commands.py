"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def inilora(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inilora_kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
