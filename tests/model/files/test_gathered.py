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
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    given = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    rank = dist.get_rank()
    if what == "factors":
        read = []
        whole = gathered.LiveTensor.read
        gathered.LiveTensor.read = lambda self, *rows: read.append(self.name) or whole(self, *rows)
        approximate_model(model, **given).save(f"{out}-{rank}")
        assert all("q_proj" in name or "v_proj" in name for name in read), read
        assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("inilora-")]
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


def run(folder: Path, tmp_path: Path, what: str) -> list[Path]:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(textwrap.dedent(SHARDED))
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
def test_the_same_factors_as_from_its_folder(llama: Path, tmp_path: Path) -> None:
    """FSDP2. ZeRO-3 goes the same way: tests/trainers/test_deepspeed.py."""
    expected = approximate_model(llama, **GIVEN)
    for file in run(llama, tmp_path, "factors"):
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
