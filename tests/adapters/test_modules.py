"""Which module of a live model each matrix belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel

from inilora_kernels import lora_model
from inilora_kernels.adapters.attach import (
    adapters,
    attach,
    detach,
)
from inilora_kernels.errors import TargetError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize
from .models import save, small


def test_names_may_differ_by_a_prefix() -> None:
    model, factors = small()
    wrapped = nn.ModuleDict({"bert": model, "classifier": nn.Linear(8, 2)})
    attach(wrapped, factors)
    assert [name for name, _ in adapters(wrapped)] == ["bert.0", "bert.2"]
    prefixed = FactorSet({f"model.{name}": part for name, part in factors.items()}, {})
    attach(detach(wrapped)["bert"], prefixed)
    assert [name for name, _ in adapters(model)] == ["0", "2"]


def test_modules_that_transformers_has_renamed(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    model = ViTModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 8, 8)
    expected = model(pixels).last_hidden_state
    factors = factorize(tmp_path, rank=2)
    assert len(factors) == 2
    assert torch.equal(attach(model, factors)(pixels).last_hidden_state, expected)
    assert len(list(adapters(model))) == 2


@pytest.mark.skipif(not hasattr(transformers, "NomicBertConfig"), reason="a newer transformers has nomic-bert")
def test_factors_of_a_weight_that_is_split_on_loading_leave_the_others_in_use(tmp_path: Path) -> None:
    """All were refused, with a message about a layer that was there."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    base = save("NomicBertModel", tmp_path, hidden_size=16, num_hidden_layers=1, intermediate_size=16, **heads)
    factors = factorize(base, ("Wqkv", "out_proj", "fc2"), rank=2)
    model = transformers.NomicBertModel.from_pretrained(base)
    with pytest.warns(UserWarning, match=r"left out the factors of .*Wqkv, which it merges, splits or permutes"):
        attach(model, factors)
    assert len(list(adapters(model))) == len(factors) - 1
    with pytest.warns(UserWarning, match="splits or permutes"):
        assert lora_model(detach(model), factors).peft_config["default"].target_modules == {"o_proj", "down_proj"}


@pytest.mark.skipif(transformers.__version__ < "5", reason="before 5, the file has the model's own names")
def test_a_model_gets_all_adapters_of_its_own_checkpoint(tmp_path: Path) -> None:
    """ViTMAE's decoder is in no class that an auto class loads: 2 of 26 layers were found by equal names."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    base = save("ViTMAEForPreTraining", tmp_path, image_size=8, patch_size=4, **sizes, **decoder)
    factors = factorize(base, ("query", "value", "decoder_embed", "decoder_pred"), rank=2)
    model = transformers.ViTMAEForPreTraining.from_pretrained(base)
    assert len(factors) == len(list(adapters(attach(model, factors)))) == 6


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.get_base_model()], ids=["PeftModel", "base"])
def test_a_model_with_pefts_layers_is_refused(minilm: Path, minilm_factors: FactorSet, of) -> None:
    """PEFT's save_pretrained and merge_and_unload would leave out, or stumble over, what is attached inside of it."""
    peft_model = get_peft_model(AutoModel.from_pretrained(minilm), LoraConfig(r=8, target_modules=["key"]))
    with pytest.raises(TargetError, match=r"(key )?is PEFT's, which would not save .* initialize_peft"):
        attach(of(peft_model), minilm_factors)
    assert not list(adapters(peft_model))
    attach(peft_model.merge_and_unload(), minilm_factors)
