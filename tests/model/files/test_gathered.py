"""Models that two gloo processes hold together: the same factors as the folder's, by every process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from inilora_kernels import FactorSet, approximate_model

from ..live_factors import GIVEN, same

SHARDED = """
    import os, sys, tempfile
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM
    from inilora_kernels import approximate_model
    from inilora_kernels.errors import CheckpointError
    from inilora_kernels.model.files import gathered
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, out, what = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(folder)
    if what == "ZeRO-3":
        PARTITION
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    given = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    rank = dist.get_rank()
    if what in ("factors", "ZeRO-3"):
        read = []
        whole = gathered.LiveTensor.read
        gathered.LiveTensor.read = lambda self, *rows: read.append(self.name) or whole(self, *rows)
        approximate_model(model, **given).save(f"{out}-{rank}")
        assert all("q_proj" in name or "v_proj" in name for name in read), read
        assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("inilora-")]
        if what == "ZeRO-3":
            assert all(not parameter.numel() for parameter in model.parameters())
            sys.exit()
        loss = model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss
        loss.backward()  # the model is what it was
    else:
        if what == "no room" and rank == 0:
            tempfile.tempdir = "/dev/null/none"
        if what == "another model" and rank == 1:
            model = model.model
        try:
            approximate_model(model, **given)
        except CheckpointError as error:
            open(f"{out}-{rank}", "w").write(str(error))
    dist.barrier()
    dist.destroy_process_group()
"""

# What deepspeed does, which is not installed: a parameter is empty, with its own part in `ds_tensor`, and
# `deepspeed.zero.GatheredParameters` gives it its values while the context is open, on all processes at once.
PARTITION = """
class GatheredParameters:
    def __init__(self, params, modifier_rank=None, fwd_module=None, enabled=True):
        self.params = params
    def __enter__(self):
        for one in self.params:
            assert one.ds_status == "NOT_AVAILABLE"
            parts = [torch.empty_like(one.ds_tensor) for _ in range(2)]
            dist.all_gather(parts, one.ds_tensor)
            one.data, one.ds_status = torch.cat(parts)[: one.ds_numel].view(one.ds_shape), "AVAILABLE"
    def __exit__(self, *_):
        for one in self.params:
            one.data, one.ds_status = torch.empty(0, dtype=one.dtype), "NOT_AVAILABLE"
import types
sys.modules["deepspeed"] = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=GatheredParameters))
for number, one in enumerate(model.parameters()):
    one.ds_id, one.ds_shape, one.ds_numel, one.ds_status = number, one.shape, one.numel(), "NOT_AVAILABLE"
    part = -(-one.ds_numel // 2)
    whole = torch.zeros(2 * part, dtype=one.dtype)
    whole[: one.ds_numel] = one.data.flatten()
    one.ds_tensor = whole[part * dist.get_rank() : part * (dist.get_rank() + 1)].clone()
    one.data = torch.empty(0, dtype=one.dtype)
"""


def run(folder: Path, tmp_path: Path, what: str) -> list[Path]:
    script, out = tmp_path / "script.py", tmp_path / "out"
    partition = textwrap.indent(PARTITION.strip(), 8 * " ").strip()
    script.write_text(textwrap.dedent(SHARDED.replace("PARTITION", partition)))
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
            folder,
            out,
            what,
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": str(tmp_path / "temporary"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tmp_path / f"out-{rank}" for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["factors", "ZeRO-3"])
def test_the_same_factors_as_from_its_folder(llama: Path, tmp_path: Path, what: str) -> None:
    """FSDP2, and a stand-in for deepspeed's ZeRO-3."""
    expected = approximate_model(llama, **GIVEN)
    for file in run(llama, tmp_path, what):
        assert same(FactorSet.load(file), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no room", "set TMPDIR to a folder with room"),
        ("another model", "rank 1 has other sharded weights than rank 0"),
    ],
)
def test_what_one_process_meets_all_raise(llama: Path, tmp_path: Path, what: str, reason: str) -> None:
    """And none waits for the others forever."""
    for file in run(llama, tmp_path, what):
        assert reason in file.read_text()
