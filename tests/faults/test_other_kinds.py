"""The fault campaign, on the kinds of weight files that torch, DCP and gguf read."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
import torch.distributed.checkpoint as dcp

from inilora_kernels.errors import InitializationError
from inilora_kernels.model.checkpoint import open_checkpoint

from ..model.gguf_model import TYPES, model, write
from .corpus import spoiled_bytes

pytestmark = pytest.mark.slow

KINDS = {
    "model.gguf": "model.gguf",
    "model.bin": "model.bin",
    "parts": "parts/__0_0.distcp",
    "metadata": "parts/.metadata",
}


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_weights_of_other_kinds(tmp_path: Path, kind: str) -> None:
    """GGUF, torch's files and DCP folders: refused, or the values that gguf's or torch's own reader finds there."""
    live = model()
    write(tmp_path / "model.gguf", live, TYPES.F32)
    torch.save(live.state_dict(), tmp_path / "model.bin")
    dcp.save(live.state_dict(), checkpoint_id=tmp_path / "parts", no_dist=True)
    file = tmp_path / KINDS[kind]
    opened = file.parent if file.parent != tmp_path else file
    whole, counts = file.read_bytes(), Counter[str]()
    spoiled_files = [one for seed in range(4) for one in spoiled_bytes(whole, random.Random(f"{kind} {seed}"))]
    for how, content in spoiled_files:
        file.write_bytes(content)
        try:
            checkpoint = open_checkpoint(opened)
            found = {name: checkpoint.read(name) for name in checkpoint.weights if "v_proj" in name}
        except InitializationError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        try:
            expected = values_by_its_own_reader(opened, list(found))
        except Exception as error:
            # A stricter reader than ours may refuse what ours reads rightly: then the values are the unspoiled ones.
            counts[f"{type(error).__name__} by its own reader"] += 1
            expected = {name: live.state_dict()[name] for name in found}
        assert all(torch.equal(found[name], expected[name]) for name in found), how
    print(f"\n{kind}: {dict(counts)}")


def values_by_its_own_reader(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    if path.suffix == ".gguf":
        stored = {one.name: one.data for one in gguf.GGUFReader(path).tensors}
        return {name: torch.from_numpy(stored[f"blk.{name.split('.')[2]}.attn_v.weight"].copy()) for name in names}
    if path.suffix == ".bin":
        return dict(torch.load(path, weights_only=True))
    empty = {name: torch.empty(model().state_dict()[name].shape) for name in names}
    dcp.load(empty, checkpoint_id=path, no_dist=True)
    return empty
