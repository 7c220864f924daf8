"""Large models: a matrix at a time in memory, and each file's header read once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from inilora_kernels import FactorSet
from inilora_kernels.cli.main import application
from inilora_kernels.model import checkpoint

# Of a layer of LLaMA 3.1 405B, all of it: 6.4 GB.
LAYER = {
    "self_attn.q_proj": (16384, 16384),
    "self_attn.k_proj": (1024, 16384),
    "self_attn.v_proj": (1024, 16384),
    "self_attn.o_proj": (16384, 16384),
    "mlp.gate_proj": (53248, 16384),
    "mlp.up_proj": (53248, 16384),
    "mlp.down_proj": (16384, 53248),
}
LAYERS = 16
MEASURED = """
    import resource, sys
    from inilora_kernels import approximate_model
    factors = approximate_model(sys.argv[1], rank=8, solver="krylov", cache=False, progress=False)
    factors.save(sys.argv[2])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture
def hundred_gigabytes(tmp_path: Path) -> Path:
    """A checkpoint of 102 GB in 16 sparse shards; the first layer's query and value are there, the rest are holes."""
    folder, weight_map = tmp_path / "model", {}
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        shard, header, end = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors", {}, 0
        for kind, shape in LAYER.items():
            name, begin, end = f"model.layers.{layer}.{kind}.weight", end, end + 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = shard
        content = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            data = file.tell()
            file.truncate(data + end)
            for kind in ("self_attn.q_proj", "self_attn.v_proj") if layer == 0 else ():
                (rows, columns), place = LAYER[kind], header[f"model.layers.0.{kind}.weight"]["data_offsets"]
                file.seek(data + place[0])
                scale = 0.02 / (1 + torch.arange(columns)).sqrt()
                for _ in range(0, rows, 1024):
                    block = torch.randn(1024, columns, generator=generator) * scale
                    file.write(block.bfloat16().view(torch.uint8).numpy().data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
def test_a_checkpoint_of_100_gigabytes_within_4(hundred_gigabytes: Path, tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in hundred_gigabytes.iterdir()) > 100e9
    script = "\n".join(line.strip() for line in MEASURED.splitlines())
    command = [sys.executable, "-c", script, hundred_gigabytes, tmp_path / "factors.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4e9
    factors = FactorSet.load(tmp_path / "factors.safetensors")
    assert len(factors) == 2 * LAYERS
    for kind in ("q", "v"):
        certificate = factors[f"model.layers.0.self_attn.{kind}_proj"].certificate
        assert certificate.certified
        assert certificate.excess < 1e-8
        assert factors[f"model.layers.1.self_attn.{kind}_proj"].certificate.loss == 0.0


def test_the_command_line_reads_each_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tmp_path / "model", []
    model.mkdir()
    weight_map = {}
    for layer in range(3):
        name, shard = f"layers.{layer}.q_proj.weight", f"model-{layer}.safetensors"
        save_file({name: torch.eye(20)}, model / shard)
        weight_map[name] = shard
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    open_safetensors = checkpoint.open_safetensors

    def counted(file: Path) -> object:
        read.append(file.name)
        return open_safetensors(file)

    monkeypatch.setattr(checkpoint, "open_safetensors", counted)
    command = ["approximate", str(model), "-o", str(tmp_path / "out"), "-t", "all-linear", "--solver", "krylov"]
    CliRunner().invoke(application, command, catch_exceptions=False, standalone_mode=False)
    assert (tmp_path / "out").exists()
    assert sorted(read) == sorted(weight_map.values())
