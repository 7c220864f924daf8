"""Experts: the same matrices whether the checkpoint stores one by one or the model holds all in one parameter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from inilora_kernels import approximate_model, export_merged, lora_model
from inilora_kernels.errors import CheckpointError, TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.experts import may_hold_experts
from inilora_kernels.model.live import open_live
from inilora_kernels.model.targets import find_targets, tensors_of

from ..mixtures import CONFIGS, EXPERTS, PARAMETERS
from ..mixtures import saved as save
from .gguf_model import TYPES, mixture, write_mixture
from .live_factors import same
from .models import DECODER, build, write

QWEN3_VL = {
    **DECODER,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
QWEN3_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in CONFIGS}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_expert_is_a_matrix_of_the_live_parameter(saved: dict[str, Path], kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[kind])
    parameters = dict(model.named_parameters())
    targets = find_targets(open_checkpoint(saved[kind]), None, None, PARAMETERS)
    layers = 1 if kind == "deepseek_v3" else 2
    assert len(targets) == layers * len(PARAMETERS) * EXPERTS
    for target in targets:
        name, _, number = target.module.rpartition(":")
        W = parameters[name][int(number)].detach()
        transposed = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
        assert torch.equal(target.read(), W.T if transposed else W)
        assert target.read().is_contiguous()
    live = find_targets(open_live(model), None, None, PARAMETERS)
    assert [(one.module, one.sha256()) for one in live] == [(one.module, one.sha256()) for one in targets]
    assert len({one.sha256() for one in targets}) == len(targets)


def test_the_parts_of_a_weight_norm_are_no_experts() -> None:
    """wav2vec2's convolution of positions: all-linear named it as something that target_parameters factorizes."""
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)).parametrizations.weight
    assert not may_hold_experts(module, module.original1)


def test_a_position_embedding_of_three_dimensions_is_no_experts() -> None:
    """Kimi's has a row and a column: lora_model took its rows for 32 experts."""
    module = nn.Module()
    module.position_embeddings, module.down_proj = (nn.Parameter(torch.zeros(4, 4, 8)) for _ in range(2))
    assert [may_hold_experts(module, parameter) for parameter in module.parameters()] == [False, True]


def test_the_stacks_of_a_gguf_file(tmp_path: Path) -> None:
    """llama.cpp stacks gate, up and down by themselves; transformers joins the first two."""
    path = write_mixture(tmp_path / "model.gguf", mixture(), TYPES.Q8_0)
    live = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    targets = find_targets(open_checkpoint(path), None, None, PARAMETERS)
    assert len(targets) == len(PARAMETERS) * 3
    for target in targets:
        name, _, number = target.module.rpartition(":")
        assert torch.equal(target.read(), live.get_parameter(name)[int(number)])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_same_factors_from_folder_and_model(saved: dict[str, Path], kind: str) -> None:
    options: dict[str, Any] = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    options |= {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    folder = approximate_model(saved[kind], **options)
    assert same(approximate_model(AutoModelForCausalLM.from_pretrained(saved[kind]), **options), folder)
    assert [name for name in folder if name.endswith("q_proj")] == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert sum(name.endswith(("down_proj:0", "down_proj:2")) for name in folder) == 4


def test_experts_of_mxfp4_as_gpt_oss_ships_them(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["gpt_oss"] / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        # 48 inputs are no whole number of groups of 32, so these have 64.
        d, k = tensors.pop(name).shape[2], 32 if name.endswith("gate_up_proj") else 64
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (EXPERTS, d, k // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 130, (EXPERTS, d, k // 32), dtype=torch.uint8)
        expected[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((saved["gpt_oss"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}})
    )
    targets = find_targets(open_checkpoint(tmp_path), None, None, ["experts.gate_up_proj"])
    assert len(targets) == 2 * EXPERTS
    for target in targets:
        name, _, number = target.module.rpartition(":")
        assert target.dequantization == "mxfp4"
        assert torch.equal(target.read(), expected[name][int(number)].T)
    with pytest.raises(CheckpointError, match=r"config.json and weights do not belong together"):
        find_targets(open_checkpoint(tmp_path), None, None, ["experts.down_proj"])


def test_of_blocks_of_float8_as_deepseek_ships_them(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["deepseek_v3"] / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.tensor([[2.0]])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved["deepseek_v3"] / "config.json").read_text())
    targets = find_targets(open_checkpoint(tmp_path), None, None, ["mlp.experts.gate_up_proj"])
    assert len(targets) == EXPERTS
    prefix = targets[1].module.removesuffix("gate_up_proj:1")
    halves = [tensors[f"{prefix}1.{part}_proj.weight"].float() * 2 for part in ("gate", "up")]
    assert torch.equal(targets[1].read().float(), torch.cat(halves))
    assert targets[1].dequantization.startswith("fp8")


def test_all_linear_names_the_experts_that_it_leaves_out(saved: dict[str, Path]) -> None:
    for kind in ("mixtral", "llama4"):
        with pytest.warns(UserWarning, match=r"left out .*experts.*target_parameters=.*gate_up_proj"):
            alone = find_targets(open_checkpoint(saved[kind]), "all-linear")
        assert not any(":" in target.module for target in alone)
        both = find_targets(open_checkpoint(saved[kind]), "all-linear", None, PARAMETERS)
        assert len(both) == len(alone) + 2 * len(PARAMETERS) * EXPERTS


def test_no_such_parameter(saved: dict[str, Path], llama: Path) -> None:
    with pytest.raises(TargetError, match=r"selects no parameter of experts; here there are experts.down_proj"):
        find_targets(open_checkpoint(saved["mixtral"]), None, None, ["experts.w1"])
    with pytest.raises(TargetError, match="no fused experts"):
        find_targets(open_checkpoint(llama), None, None, ["mlp.experts.down_proj"])
    with pytest.raises(TargetError, match="give a list"):
        find_targets(open_checkpoint(llama), None, None, "mlp.experts.down_proj")


def test_a_missing_expert(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["qwen3_moe"] / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved["qwen3_moe"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj: expert 2 is stored as"):
        find_targets(open_checkpoint(tmp_path), None, None, PARAMETERS)


def test_only_the_shards_of_the_experts_are_downloaded(saved: dict[str, Path]) -> None:
    for kind in ("mixtral", "gpt_oss"):
        names = list(open_checkpoint(saved[kind]).tensors)
        config = json.loads((saved[kind] / "config.json").read_text())
        chosen = tensors_of(None, ["experts.down_proj"])(names, config)
        assert chosen
        assert all("experts" in name for name in chosen)
        assert len(chosen) == (2 * EXPERTS if kind == "mixtral" else 2)


def test_tensors_without_a_config(tmp_path: Path) -> None:
    save_file({"experts.up": torch.randn(2, 6, 4), "conv.weight": torch.randn(2, 3, 4)}, tmp_path / "model.safetensors")
    targets = find_targets(open_checkpoint(tmp_path), None, None, ["experts.up"])
    assert [(one.module, one.shape) for one in targets] == [("experts.up:0", (6, 4)), ("experts.up:1", (6, 4))]


@pytest.mark.skipif(transformers.__version__ < "5.2", reason="a newer transformers turns these stacks")
def test_stacks_that_older_files_hold_the_other_way_round(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's, which transformers turns where the shape asks for it: all-linear did not mention them."""
    model = build("Qwen3VLMoeForConditionalGeneration", text_config=QWEN3_VL, vision_config=QWEN3_VISION)
    model.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    (tmp_path / "old").mkdir()
    turned = {name: one.mT.contiguous() if name.endswith(tuple(PARAMETERS)) else one for name, one in tensors.items()}
    write(tmp_path / "old", turned, json.loads((tmp_path / "new/config.json").read_text()))
    hashes = []
    for checkpoint in (open_live(model), open_checkpoint(tmp_path / "new"), open_checkpoint(tmp_path / "old")):
        targets = find_targets(checkpoint, None, None, PARAMETERS)
        assert len(targets) == len(PARAMETERS) * EXPERTS
        hashes.append({target.module: target.sha256() for target in targets})
        with pytest.warns(UserWarning, match=r"left out .*experts.*target_parameters="):
            find_targets(checkpoint, "all-linear")
    assert hashes[0] == hashes[1] == hashes[2]
    factors = approximate_model(
        tmp_path / "old", rank=2, solver="krylov", target_parameters=PARAMETERS, cache=False, progress=False
    )
    base = model.eval()
    started, ids = lora_model(base, factors, task_type=None), torch.arange(8)[None]
    with torch.no_grad():
        for name, parameter in started.named_parameters():
            parameter.add_(0.1 if ".lora_" in name else 0.0)
        expected = started(ids).logits
    started.save_pretrained(tmp_path / "trained")
    export_merged(tmp_path / "trained", factors, tmp_path / "merged", tmp_path / "old")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
