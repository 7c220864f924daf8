"""Query and value of fused weights, told by what a live model does with those rows."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from inilora_kernels import approximate_model, attach, export_delta, lora_model
from inilora_kernels.errors import TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.fused import row_index
from inilora_kernels.model.live import open_live
from inilora_kernels.model.targets import find_targets

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CODEGEN = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20, "n_ctx": 20, "rotary_dim": 4}
BIGCODE = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 20, "pad_token_id": 0}
FALCON = {**SIZES, "bias": False}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("GPTNeoXForCausalLM", SIZES),
    ("GPTNeoXJapaneseForCausalLM", {**SIZES, "intermediate_multiple_size": 1}),
    ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 24, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": False, "multi_query": True}),
    ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": False, "multi_query": False, "alibi": True}),
    ("CodeGenForCausalLM", CODEGEN),
    ("GPTBigCodeForCausalLM", {**BIGCODE, "multi_query": True}),
    ("GPTBigCodeForCausalLM", {**BIGCODE, "multi_query": False}),
    ("PersimmonForCausalLM", {**SIZES, "hidden_size": 32, "qk_layernorm": False}),
    ("DebertaModel", SIZES),
    ("Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    ("MptForCausalLM", {"vocab_size": 40, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 20}),
]
IDS = [f"{place}-{name}" for place, (name, _) in enumerate(MODELS)]


def build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key.lower() and "ln_" not in key.lower():
                parameter.normal_(std=0.3)
            if key.endswith("q_bias"):  # DeBERTa adds it to the queries, outside the weight
                parameter.zero_()
    return model


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model(torch.tensor([[3, 5, 7, 11]])).__getitem__(0).clone()  # type: ignore[no-any-return]


@torch.no_grad()
def fill(layers: list[nn.Linear], rows: list[Tensor], value: float | None) -> None:
    """The same rows of each layer's weight and bias: a constant, or other random numbers."""
    for layer, index in zip(layers, rows, strict=True):
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                shape = parameter[index].shape
                parameter[index] = torch.randn(shape) if value is None else torch.full(shape, value)


@pytest.mark.parametrize(("name", "options"), MODELS, ids=IDS)
def test_rows_are_what_the_model_takes_them_for(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Without values nothing else of the weight matters; without queries the keys do not, and the values do."""
    model = build(name, options)
    model.save_pretrained(tmp_path)
    targets = find_targets(open_checkpoint(tmp_path))
    assert [target.kind for target in targets] == ["query", "value"] * 2
    layers: list[nn.Linear] = [
        model.get_submodule(target.module.partition(":")[0])
        if target.module.partition(":")[0] in dict(model.named_modules())
        else model.base_model.get_submodule(target.module.partition(":")[0].split(".", 1)[1])
        for target in targets[::2]
    ]
    every = [torch.arange(len(layer.weight)) for layer in layers]

    def rows(kind: str) -> list[Tensor]:
        found = [target.rows for target in targets if target.kind == kind]
        return [index[row_index(own, len(index))] for own, index in zip(found, every, strict=True)]

    queries, values = rows("query"), rows("value")
    not_values = [index[~torch.isin(index, own)] for index, own in zip(every, values, strict=True)]
    keys = [index[~torch.isin(index, own)] for index, own in zip(not_values, queries, strict=True)]
    for target, layer, own in zip(targets[::2], layers, queries, strict=True):
        assert torch.equal(target.read(), layer.weight.detach()[own])
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    fill(layers, values, 0.0)
    without_values = output(model)
    fill(layers, not_values, None)
    torch.testing.assert_close(output(model), without_values)

    model.load_state_dict(original)
    fill(layers, queries, 0.0)
    without_queries = output(model)
    fill(layers, keys, None)
    torch.testing.assert_close(output(model), without_queries)
    fill(layers, values, None)
    assert not torch.allclose(output(model), without_queries)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_adapter_starts_from_both_parts(tmp_path: Path, place: int) -> None:
    name, options = MODELS[place]
    model = build(name, options)
    model.save_pretrained(tmp_path / "model")
    factors = approximate_model(tmp_path / "model", rank=2, solver="krylov", cache=False, progress=False)
    factors.save(tmp_path / "factors.safetensors")
    before = output(model)
    attach(model, type(factors).load(tmp_path / "factors.safetensors"))
    torch.testing.assert_close(output(model), before)


def test_timm_keeps_thirds(tmp_path: Path) -> None:
    torch.save({f"blocks.{i}.attn.qkv.weight": torch.randn(72, 24) for i in range(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 10}')
    assert [target.rows for target in find_targets(open_checkpoint(tmp_path))] == [(0, 24), (48, 72)] * 2


def test_models_of_their_own_code(tmp_path: Path) -> None:
    """Baichuan's and InternLM2's classes are not transformers'; config.json says enough."""
    for model_type, last, rows in (
        ("baichuan", "W_pack", [(0, 24), (48, 72)]),
        ("internlm2", "wqkv", [(0, 12, 24), (18, 24, 24)]),
    ):
        folder = tmp_path / model_type
        folder.mkdir()
        d = 72 if model_type == "baichuan" else 48
        torch.save({f"model.layers.0.self_attn.{last}.weight": torch.randn(d, 24)}, folder / "pytorch_model.bin")
        heads = '"num_attention_heads": 4' + (', "num_key_value_heads": 2' if model_type == "internlm2" else "")
        (folder / "config.json").write_text(f'{{"model_type": "{model_type}", {heads}}}')
        assert [target.rows for target in find_targets(open_checkpoint(folder))] == rows


class Tower(nn.Module):
    """A residual block as open_clip's and CLIP's own code have it: torch's MultiheadAttention, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 4)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))


def test_torchs_multihead_attention(tmp_path: Path) -> None:
    """open_clip's in_proj_weight: a parameter of its own, whose thirds are the projections that torch takes."""
    torch.manual_seed(0)
    tower = Tower()
    model = nn.ModuleDict({"visual": tower})
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    expected = tower.attn.in_proj_weight.detach().chunk(3)
    for targets in (find_targets(open_checkpoint(tmp_path)), find_targets(open_live(model))):
        assert [(one.module, one.rows) for one in targets] == [
            ("visual.attn.in_proj:query", (0, 24)),
            ("visual.attn.in_proj:value", (48, 72)),
        ]
        assert torch.equal(targets[0].read(), expected[0])
        assert torch.equal(targets[1].read(), expected[2])
    with pytest.warns(UserWarning, match="no adapter can start from its factors"):
        factors = approximate_model(tmp_path, rank=2, solver="krylov", cache=False, progress=False)
    refused = pytest.raises(TargetError, match="reads that parameter and calls no layer")
    with refused:
        attach(model, factors)
    with refused:
        lora_model(model, factors)
    with refused:
        export_delta(tmp_path, factors, tmp_path / "out")


def test_siglips_pooling_head_takes_no_adapter(tmp_path: Path) -> None:
    build("SiglipVisionModel", {**SIZES, "image_size": 8, "patch_size": 4}).save_pretrained(tmp_path)
    targets = find_targets(open_checkpoint(tmp_path))
    assert {target.module.rpartition(".")[2] for target in targets} == {"q_proj", "v_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear = find_targets(open_checkpoint(tmp_path), "all-linear")
    assert not any("in_proj" in target.module for target in linear)


MLA = {
    **SIZES,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


@pytest.mark.parametrize(("q_lora_rank", "query"), [(None, "q_proj"), (8, "q_b_proj")])
def test_latent_attention(tmp_path: Path, q_lora_rank: int | None, query: str) -> None:
    build("DeepseekV3ForCausalLM", {**MLA, "q_lora_rank": q_lora_rank}).save_pretrained(tmp_path)
    targets = find_targets(open_checkpoint(tmp_path))
    assert [(target.module.rpartition(".")[2], target.kind) for target in targets] == [
        ("kv_b_proj", "value"),
        (query, "query"),
    ] * 2
