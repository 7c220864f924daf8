"""What an installed wheel can do without the repository around it; `make dist` runs this in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

import inilora_kernels


def try_package() -> None:
    package = Path(inilora_kernels.__file__).parent
    assert "site-packages" in package.parts, package
    assert (package / "py.typed").is_file()
    assert "](docs/" not in str(metadata("inilora-kernels").get_payload())


def try_commands(folder: Path) -> None:
    model, factors = folder / "model.safetensors", folder / "factors.safetensors"
    save_file({f"layers.0.{kind}_proj.weight": torch.randn(48, 32) for kind in "qkv"}, model)
    command = [sys.executable, "-m", "inilora_kernels"]
    subprocess.run([*command, "approximate", model, "-o", factors, "--steps", "100"], check=True)
    subprocess.run([*command, "inspect", factors], check=True)
    # peft is not among the dependencies: what needs it says so.
    told = subprocess.run(
        [*command, "export", factors, "--base", folder, "-o", folder / "out"], capture_output=True, text=True
    )
    assert told.returncode == 2, told
    assert "pip install 'inilora-kernels[peft]'" in told.stderr, told


if __name__ == "__main__":
    try_package()
    with tempfile.TemporaryDirectory() as name:
        try_commands(Path(name))
    print("the wheel works")
