"""Which modules target_modules selects: what the real peft selects in the live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from inilora_kernels.errors import TargetError
from inilora_kernels.model.architecture import loaded_names
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .models import CLIP, DECODER, ENCODER, GPT2, LLAVA, T5, VISION, build, found


def test_layer_two_comes_before_layer_ten(tmp_path: Path) -> None:
    targets = found(build("BertModel", **{**ENCODER, "num_hidden_layers": 11}), tmp_path)
    assert [int(target.module.split(".")[2]) for target in targets] == [i for i in range(11) for _ in range(2)]


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
    "spoil",
    [
        lambda config: config.unlink(),
        lambda config: config.write_text('{"model_type": "of-its-own", "auto_map": {"AutoConfig": "code.Config"}}'),
        lambda config: config.write_text('{"model_type": "bert", "hidden_act": "none that there is"}'),
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


def test_a_colon_in_a_name_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """It stands between a fused weight and its part in the names of factors: a KeyError."""
    names = ("l.0.a:b.q_proj", "l.0.:key:x.q_proj", "l.0.plain.q_proj")
    save_file({f"{name}.weight": torch.randn(8, 8) for name in names}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="a:b.q_proj.*a colon in its name"):
        targets = find_targets(open_checkpoint(tmp_path), ["q_proj"])
    assert [target.module for target in targets] == ["l.0.plain.q_proj"]
