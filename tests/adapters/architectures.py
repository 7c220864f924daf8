"""The way over disk and back, on small random models of many architectures; `python -m tests.adapters.architectures`
draws docs/compatibility.md from its results.

A new architecture is one line of ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

from inilora_kernels import (
    InitializationError,
    approximate_model,
    convert,
    export_delta,
    export_merged,
    export_residual,
    load_delta,
)

from .drawing import runs

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
QWEN2_MOE = {**TEXT, "num_key_value_heads": 4, "shared_expert_intermediate_size": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {
    "text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 10},
    "vision_config": VISION,
    "projection_dim": 16,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**TEXT, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
QWEN35 = {
    "text_config": {
        **GROUPED,
        "num_hidden_layers": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
    },
}
MLLAMA = {
    "text_config": {
        **GROUPED,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    },
}
LLAMA4 = {
    "text_config": {**GROUPED, "num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    "vision_config": {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
}
GEMMA3 = {
    "text_config": {**GROUPED, "query_pre_attn_scalar": 8},
    "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
}
JAMBA = {
    **TEXT,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 8,
}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
FALCON_H1 = {**GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}


@dataclass(frozen=True)
class Architecture:
    """One line of the table.

    name: the class that writes the checkpoint; options: its config's.
    targets: target_modules; None for query and value.
    task: the task_type with which the model is loaded; None for the class itself.
    """

    name: str
    options: dict[str, Any]
    targets: Any = None
    task: str | None = None

    @property
    def title(self) -> str:
        loaded = f" as {self.task}" if self.task else ""
        return f"{self.name}{loaded}{', ' + str(self.targets) if self.targets else ''}"


ALL = "all-linear"
ARCHITECTURES = [
    Architecture("LlamaForCausalLM", GROUPED, ALL),
    Architecture("LlamaModel", GROUPED),
    Architecture("MistralForCausalLM", GROUPED, ALL),
    Architecture("Ministral3ForCausalLM", GROUPED),
    Architecture("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 2}, ALL),
    Architecture("Qwen3ForCausalLM", GROUPED, ALL),
    Architecture("GemmaForCausalLM", GROUPED),
    Architecture("Gemma2ForCausalLM", GROUPED, ALL),
    Architecture("Gemma3ForCausalLM", {**GROUPED, "query_pre_attn_scalar": 8}, ALL),
    Architecture("Olmo2ForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    Architecture("SmolLM3ForCausalLM", GROUPED),
    Architecture("GraniteForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    Architecture("CohereForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    Architecture("Starcoder2ForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    Architecture("StableLmForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    Architecture("PhiForCausalLM", TEXT),
    Architecture("Phi3ForCausalLM", GROUPED),
    Architecture("Glm4ForCausalLM", GROUPED),
    Architecture("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, ALL),
    Architecture("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    Architecture("GPTNeoXForCausalLM", TEXT, ["query_key_value", "dense"]),
    Architecture("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ALL),
    Architecture("FalconForCausalLM", {**TEXT, "multi_query": True, "new_decoder_architecture": False}, ALL),
    Architecture("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}),
    Architecture("Qwen2MoeForCausalLM", {**QWEN2_MOE, **EXPERTS, "num_experts": 4}),
    Architecture("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "num_experts": 4}),
    Architecture("OlmoeForCausalLM", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Glm4MoeForCausalLM", {**GROUPED, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    Architecture("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1}, ["q_b_proj", "o_proj"]),
    Architecture("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1}, ALL),
    Architecture("Llama4ForCausalLM", LLAMA4["text_config"], ALL),
    Architecture("GptOssForCausalLM", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    Architecture("MambaForCausalLM", MAMBA, ["in_proj"]),
    Architecture("MambaForCausalLM", MAMBA, ["in_proj", "x_proj"]),
    Architecture("MambaForCausalLM", MAMBA, ALL),
    Architecture("JambaForCausalLM", JAMBA),
    Architecture("FalconH1ForCausalLM", FALCON_H1, ALL),
    Architecture("BertModel", TEXT, ALL),
    Architecture("BertForMaskedLM", TEXT),
    Architecture("BertForSequenceClassification", TEXT, None, "SEQ_CLS"),
    Architecture("RobertaModel", TEXT, ALL),
    Architecture("XLMRobertaModel", TEXT),
    Architecture("MPNetModel", TEXT, ALL),
    Architecture("ElectraModel", TEXT),
    Architecture("DebertaV2Model", TEXT),
    Architecture("ModernBertModel", TEXT),
    Architecture("DistilBertModel", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, ALL),
    Architecture("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, ALL, "SEQ_2_SEQ_LM"),
    Architecture("BartForConditionalGeneration", BART, ALL, "SEQ_2_SEQ_LM"),
    Architecture("ViTModel", VISION, ALL),
    Architecture("ViTForImageClassification", VISION),
    Architecture("Dinov2Model", VISION),
    Architecture("CLIPModel", CLIP, ALL),
    Architecture("SiglipModel", CLIP, ALL),
    Architecture("Qwen3_5ForConditionalGeneration", QWEN35, None, "CAUSAL_LM"),
    Architecture("Gemma3ForConditionalGeneration", GEMMA3, None, "CAUSAL_LM"),
    Architecture("Llama4ForConditionalGeneration", LLAMA4, None, "CAUSAL_LM"),
    Architecture("MllamaForConditionalGeneration", MLLAMA, None, "CAUSAL_LM"),
    Architecture("LlavaForConditionalGeneration", LLAVA, None),
]


@dataclass
class RoundTrip:
    """What became of one architecture.

    refused: what the library said where it did not go on; errors: the largest difference of outputs, by step, relative
    to the output's size.
    """

    matrices: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def round_trip(architecture: Architecture, folder: Path) -> RoundTrip:
    """Approximate, export in both forms, load, train two steps, convert and merge; the outputs after each step."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture.name)
    model = model_class(model_class.config_class(**architecture.options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # some start at zero, which hides mistakes
            if name.endswith("weight") and parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "model")
    result = RoundTrip()
    factors = approximate_model(
        folder / "model", rank=2, method="pissa", target_modules=architecture.targets, cache=False, progress=False
    )
    result.matrices = len(factors)
    load = _loader(architecture)
    expected = _output(load(folder / "model"))
    size = float(expected.abs().max())
    for form, export in (("residual", export_residual), ("delta", export_delta)):
        at = folder / form
        try:
            export(folder / "model", factors, at, task_type=architecture.task)
        except InitializationError as error:
            result.refused[form] = str(error)
            continue
        if form == "residual":
            started: Any = PeftModel.from_pretrained(load(at / "base"), at / "adapter", is_trainable=True)
        else:
            started = load_delta(load(folder / "model"), at)
        result.errors[f"{form} start"] = float((_output(started) - expected).abs().max()) / size
        trained = _train(started)
        if float((trained - expected).abs().max()) < 1e-4 * size:
            result.errors[f"{form} training"] = float("inf")
        started.save_pretrained(at / "trained")
        convert(at / "trained", factors, at / "lora", folder / "model")
        lora = PeftModel.from_pretrained(load(folder / "model"), at / "lora").eval()
        result.errors[f"{form} convert"] = float((_output(lora) - trained).abs().max()) / size
        export_merged(at / "trained", factors, at / "merged", folder / "model")
        result.errors[f"{form} merge"] = float((_output(load(at / "merged")) - trained).abs().max()) / size
    return result


def _loader(architecture: Architecture) -> Callable[[Path], Any]:
    kinds = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        None: getattr(transformers, architecture.name),
    }
    return lambda folder: kinds[architecture.task].from_pretrained(folder).float().eval()


_PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


def _inputs(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return _PIXELS
    ids = torch.arange(1, 11)[None]
    both = _PIXELS if model.config.model_type in ("clip", "siglip") else {}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}), **both}


@torch.no_grad()
def _output(model: Any) -> Tensor:
    first: Tensor = model.eval()(**_inputs(model))[0]
    return first


def _train(model: Any) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(**_inputs(model))[0] - 1).square().mean().backward()
        optimizer.step()
    return _output(model)


def row(title: str, result: RoundTrip) -> str:
    """A row of the table."""
    cells = []
    for form in ("residual", "delta"):
        steps = [result.errors.get(f"{form} {step}") for step in ("start", "convert", "merge")]
        refused = result.refused.get(form)
        cells.append("refused" if refused else " / ".join(f"{step:.0e}" for step in steps if step is not None))
    return f"| {title} | {result.matrices} | {' | '.join(cells)} |"


def page(results: dict[str, RoundTrip]) -> str:
    """docs/compatibility.md up to its stored weights."""
    lines = [row(title, result) for title, result in results.items()]
    refusals = [
        f"- {title}: {reason.partition(': ')[2]}"
        for title, result in results.items()
        for reason in dict.fromkeys(result.refused.values())
    ]
    return _PAGE.format(table="\n".join(lines), refusals="\n".join(refusals), version=transformers.__version__)


_PAGE = """# Compatibility

Small random models of these architectures (transformers {version}) went through every step: factors, export, loading
with transformers and PEFT, two training steps, `convert` and `merge`. The numbers are the largest difference of
outputs, relative to the largest output, in float32: at the start from the original / after `convert` from the trained
model / after `merge` from the trained model. "refused" means before anything is written, for the reason below.
`python -m tests.adapters.architectures` draws the table from its own runs; a slow test runs the same. A new
architecture is one line in tests/adapters/architectures.py.

| architecture, targets | matrices | residual | delta |
|---|--:|---|---|
{table}

## Refused

{refusals}
"""


def main() -> None:
    """Write the page, or print the table of some of the architectures."""
    results: dict[str, RoundTrip] = {}
    for architecture, result in runs(ARCHITECTURES, round_trip):
        results[architecture.title] = result
        print(row(architecture.title, result), *result.refused.values(), sep="\n", flush=True)
    if len(results) == len(ARCHITECTURES):
        write(results)


def write(results: dict[str, RoundTrip], file: Path = Path("docs/compatibility.md")) -> None:
    """Put these results in place of the page's."""
    _, heading, after = file.read_text(encoding="utf-8").partition("\n## Stored weights")
    assert heading, f"{file} has lost the heading after the refusals"
    file.write_text(page(results) + heading + after, encoding="utf-8")


if __name__ == "__main__":
    main()
