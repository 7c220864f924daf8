"""TRL's trainers that compare the policy with a reference: at the first step both are the original model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertLMHeadModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from inilora_kernels import FactorSet, export_residual, lora_model

WAYS = ("delta", "residual", "residual folder")
PROMPTS, GOOD, BAD = ["the film was"] * 4, [" a joy"] * 4, [" far too long"] * 4


@pytest.fixture(scope="module")
def decoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM, made to look back only; its language head is new."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(minilm, is_decoder=True)
    BertLMHeadModel.from_pretrained(minilm, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm, eos_token="[SEP]").save_pretrained(folder)
    return folder


def start(way: str, base: Path, factors: FactorSet, folder: Path) -> PeftModel:
    if way == "residual folder":
        export_residual(base, factors, folder / "export", task_type="CAUSAL_LM")
        return AutoPeftModelForCausalLM.from_pretrained(folder / "export/adapter", is_trainable=True)
    return lora_model(AutoModelForCausalLM.from_pretrained(base), factors, way, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def first_step(trainer: Any, config: Any, model: PeftModel, base: Path, columns: dict[str, Any], **options: Any) -> Any:
    """What the trainer logs of its first step."""
    built = trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(base),
        **options,
    )
    built.train()
    return built.state.log_history[0]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    common = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": []}
    return {"output_dir": str(folder), **common, "use_cpu": True, "bf16": False, **options}


@pytest.mark.parametrize("way", WAYS)
def test_dpo(decoder: Path, minilm_factors: FactorSet, tmp_path: Path, way: str) -> None:
    """trl 3196: the trainer copies the adapter into a frozen "ref"; as a plain LoRA the copy computed W + BA."""
    columns = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    model = start(way, decoder, minilm_factors, tmp_path)
    first = first_step(DPOTrainer, DPOConfig(**settings(tmp_path, beta=1.0)), model, decoder, columns)
    # Of sums over a dozen float32 log-probabilities of size 10.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_kto(decoder: Path, minilm_factors: FactorSet, tmp_path: Path, way: str) -> None:
    """Each example's loss is 1 − σ(β(reward − KL)): a half where the policy is its reference."""
    columns = {"prompt": PROMPTS, "completion": [*GOOD[:2], *BAD[:2]], "label": [True, True, False, False]}
    model = start(way, decoder, minilm_factors, tmp_path)
    first = first_step(KTOTrainer, KTOConfig(**settings(tmp_path, beta=1.0)), model, decoder, columns)
    assert first["loss"] == pytest.approx(0.5, abs=1e-3)
    assert first["kl"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_grpo_and_rloo(
    decoder: Path, minilm_factors: FactorSet, tmp_path: Path, trainer: Any, config: Any, way: str
) -> None:
    """The divergence from the reference is 0 at the first step."""
    arguments = config(**settings(tmp_path, beta=1.0, num_generations=2, max_completion_length=4, disable_dropout=True))

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    model = start(way, decoder, minilm_factors, tmp_path)
    first = first_step(trainer, arguments, model, decoder, {"prompt": PROMPTS}, reward_funcs=reward)
    assert first["kl"] == pytest.approx(0.0, abs=1e-3)
