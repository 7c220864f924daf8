"""Factors in PEFT's PiSSA's place: one call, the same products, the same residual base, the same output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModel

from inilora_kernels import approximate_model
from inilora_kernels.adapters.peft import initialize_peft

OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}


@pytest.mark.parametrize("solver", ["krylov", "exact"])
def test_the_result_is_that_of_pefts_pissa(minilm: Path, solver: str) -> None:
    expected = get_peft_model(AutoModel.from_pretrained(minilm), LoraConfig(**OPTIONS, init_lora_weights="pissa"))
    model = get_peft_model(AutoModel.from_pretrained(minilm), LoraConfig(**OPTIONS))
    factors = approximate_model(minilm, method="pissa", solver=solver, cache=False, progress=False)
    initialize_peft(model, factors, form="residual")
    theirs, ours = _layers(expected), _layers(model)
    assert len(ours) == 12
    weights = load_file(minilm / "model.safetensors")
    for name, layer in ours.items():
        base = layer.get_base_layer().weight.detach()
        product, wanted = (found[name].get_delta_weight("default").detach() for found in (ours, theirs))
        U, S, Vh = torch.linalg.svd(weights[f"{name.removeprefix('base_model.model.')}.weight"].double())
        truth = U[:, :8] * S[:8] @ Vh[:8]
        # The promise: the full SVD's product, to 1e-5 of its norm.
        assert float((product - truth).norm() / truth.norm()) <= 1e-5
        # PEFT computes its SVD in float32, whose vectors are off by about 2⁻²⁴·σ_1 over the gap behind σ_8. So its own
        # product, and base, agree to 1e-5 of σ_1 an entry.
        most = 1e-5 * float(S[0])
        torch.testing.assert_close(product, wanted, rtol=0.0, atol=most)
        torch.testing.assert_close(base, theirs[name].get_base_layer().weight.detach(), rtol=0.0, atol=most)
    ids = torch.arange(1000, 1024).view(2, 12)
    with torch.no_grad():
        difference = model.eval()(ids).last_hidden_state - expected.eval()(ids).last_hidden_state
    # The output's entries are near 1; a few hundred of the products' differences pass through six layers.
    assert float(difference.abs().max()) <= 1e-4


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
