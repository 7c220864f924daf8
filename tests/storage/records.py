"""A factor file's header, read and changed: without checksums, as files of version 0.1.0 are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

M = "layer.0.query"
A, B, STEP = f"{M}.lora_A.weight", f"{M}.lora_B.weight", f"{M}.lora_A.step_5.weight"


def changed(file: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(file), **tensors}, file, {"inilora_kernels": json.dumps(header)})


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    header = dict(json.loads(metadata["inilora_kernels"]))
    del header["checksum"]
    for record in header["modules"].values():
        del record["sha256"]
    return header
