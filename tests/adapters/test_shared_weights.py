"""Linear layers that share one weight, as Zamba's attention blocks: factorized once, an adapter for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Zamba2Config, Zamba2ForCausalLM, ZambaConfig, ZambaForCausalLM

from inilora_kernels import FactorSet, approximate_model, attach, convert, export_delta, export_merged, export_residual
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import InitializationError, TargetError
from inilora_kernels.lora_start import lora_model
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.live import open_live
from inilora_kernels.model.targets import find_targets

from .architectures import TEXT
from .models import logits, train

ZAMBA = {
    **TEXT,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
}
ZAMBA2 = {
    **TEXT,
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid"] * 3,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "chunk_size": 8,
    "num_mem_blocks": 2,
    "use_shared_attention_adapter": True,
    "adapter_rank": 4,
}
# The second block's weights are the first one's.
MODELS: dict[str, Any] = {
    "zamba": (ZambaForCausalLM, ZambaConfig, ZAMBA, "model.layers.{}.shared_transf.self_attn.{}_proj", (2, 4)),
    "zamba2": (
        Zamba2ForCausalLM,
        Zamba2Config,
        ZAMBA2,
        "model.layers.{}.shared_transformer.self_attn.{}_proj",
        (1, 5),
    ),
}


def factors_of(model: Any) -> FactorSet:
    return approximate_model(model, rank=2, solver="krylov", cache=False, progress=False)


@pytest.fixture(params=[pytest.param("zamba"), pytest.param("zamba2", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_one_start_for_all_its_layers(kind: str, tmp_path: Path) -> None:
    model_class, config, options, name, (first, second) = MODELS[kind]
    torch.manual_seed(0)
    base = tmp_path / "base"
    model_class(config(**options)).save_pretrained(base)

    def load() -> Any:
        return model_class.from_pretrained(base)

    factors = factors_of(base)
    assert name.format(first, "q") in factors
    assert name.format(second, "q") not in factors
    assert [one.module for one in find_targets(open_live(load()))] == list(factors)
    every = find_targets(open_checkpoint(base), "all-linear")
    assert len({one.sha256() for one in every}) == len(every)
    expected = logits(load())
    assert torch.equal(logits(attach(load(), factors)), expected)
    started = lora_model(load(), factors)
    assert torch.equal(logits(started), expected)
    for layer in (first, second):
        assert started.get_submodule(f"base_model.model.{name.format(layer, 'v')}.lora_A.default").out_features == 2
    trained = train(started)
    started.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "plain")), trained)

    for form in (lora_model, attach):
        with pytest.raises(TargetError, match="its weight is also"):
            form(load(), factors, "residual")
    with pytest.raises(InitializationError, match="its weight is also that of"):
        export_residual(base, factors, tmp_path / "residual")
    export_delta(base, factors, tmp_path / "delta")
    loaded = load_delta(load(), tmp_path / "delta")
    assert torch.equal(logits(loaded), expected)
    trained = train(loaded)
    loaded.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora", base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "lora")), trained)
    with pytest.raises(TargetError, match="the weight of several layers"):
        export_merged(tmp_path / "trained", factors, tmp_path / "merged", base)
