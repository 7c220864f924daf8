"""Where a measurement was taken: what a row needs beside it to mean anything."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
