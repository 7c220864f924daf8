"""Every kind of stored weight, from its folder to a trained adapter and back, on the live quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from inilora_kernels import FactorSet, approximate_model, attach
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.errors import TargetError, WeightError
from inilora_kernels.lora_start import lora_model
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.live import open_live

from .models import logits, train
from .packed_layers import fp8_kernel, gptqmodel, load_fp8, load_packed
from .places import HEADER as PLACES_HEADER
from .places import PLACES, WHY
from .quantized_checkpoints import block_fp8, llama, packed_words
from .stored_kinds import HEADER, KINDS, STEPS, Kind, outcome

QUERY = "model.layers.0.self_attn.q_proj"

# A stand-in for a kernel, codes next to their scales, and a tensor of a class of its own; the others are slow tests.
QUICK = {
    "FP8 in blocks, FP8Linear",
    "compressed-tensors FP8, a scale for all",
    "torchao int8",
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind.title in QUICK else pytest.mark.slow, id=kind.title)
        for kind in (*KINDS, *PLACES)
    ],
)
def test_from_its_folder_to_a_trained_adapter_and_back(kind: Kind, tmp_path: Path) -> None:
    result = outcome(kind, tmp_path)
    assert set(result.refused) == kind.refused
    tried = () if "read" in kind.refused else STEPS[:-2] if "delta" in kind.refused else STEPS
    assert set(result.errors) == set(tried) - kind.refused
    starts = [result.errors[step] for step in ("start live", "delta") if step in result.errors]
    assert set(starts) <= {0.0}
    # A few roundings of the outputs to the dtype in which the model computes, or where R and A, B compute what W did:
    # Rx + sB(Ax) has the error of two products in place of one, at most (‖R‖ + ‖sBA‖)/‖W‖ ≤ √2 times the error of Wx,
    # since R is orthogonal to BA. R itself is rounded once, each of its entries, which is less than the sum over a row
    # is. So the outputs differ by at most the original's own noise (1), this form's (√2) and R's rounding (1). Merging
    # is the same with ΔW.
    allowed = dict.fromkeys(("residual", "residual live", "merge"), max(8 * kind.eps, (2 + 2**0.5) * result.noise))
    assert {step: e for step, e in result.errors.items() if e > allowed.get(step, 8 * kind.eps)} == {}


@pytest.mark.parametrize(("header", "kinds"), [(HEADER, KINDS), (PLACES_HEADER, PLACES)], ids=["kinds", "places"])
def test_the_page_has_every_kind(header: str, kinds: list[Kind]) -> None:
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = page.partition(header)[2].split("\n\n")[0].splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {kind.title}" for kind in kinds]
    for row, kind in zip(rows, kinds, strict=True):
        assert ("refused" in row) == bool(kind.refused), row
        if "read" not in kind.refused:
            assert row.split(" | ")[3] == ("refused" if "start live" in kind.refused else "exact"), row


def test_the_page_says_why_each_place_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    reasons = page.partition(WHY)[2].split("\n\n")[0]
    assert [kind.title for kind in PLACES if f"- {kind.title}: " in reasons] == [
        kind.title for kind in PLACES if kind.refused
    ]


def factors_of(model: Any) -> FactorSet:
    return approximate_model(model, rank=4, solver="krylov", cache=False, progress=False)


@pytest.mark.parametrize(("method", "layer"), [("gptq", GPTQLoraLinear), ("awq", AwqLoraLinear)])
def test_gptqmodel_by_pefts_dispatch(tmp_path: Path, method: str, layer: type) -> None:
    """In memory GPTQ's zero points are not less 1: the words are not what the folder's config says that they are."""
    packed_words(tmp_path, method)
    with gptqmodel():
        live = load_packed(tmp_path)
        assert torch.equal(open_checkpoint(tmp_path).read(f"{QUERY}.weight"), live.get_submodule(QUERY).matrix())
        with pytest.raises(WeightError, match="gptqmodel lays its words out anew"):
            factors_of(live)
        factors, before = factors_of(tmp_path), logits(live)
        with pytest.raises(WeightError, match=r"q_proj: the base weight is quantized"):
            lora_model(live, factors, "residual")
        started = lora_model(live, factors)
        assert type(started.get_submodule(f"base_model.model.{QUERY}")) is layer
        assert torch.equal(logits(started), before)
        trained = train(started)
        assert not torch.equal(trained, before)
        with pytest.raises((ValueError, NotImplementedError)):  # PEFT's own words
            started.merge_and_unload()
        assert torch.equal(logits(attach(load_packed(tmp_path), factors)), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptqmodel_itself(tmp_path: Path, method: str) -> None:
    """pip install --no-deps gptqmodel optimum logbar device-smi tokenicer pypcre defuser: it asks for a newer torch."""
    pytest.importorskip("gptqmodel")
    packed_words(tmp_path, method)
    settings: Any = {"bits": 4, "group_size": 32}
    config = (
        AwqConfig(**settings, backend="torch_awq")
        if method == "awq"
        else GPTQConfig(**settings, desc_act=False, sym=False, backend="gptq_torch")
    )

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", quantization_config=config)

    live = load()
    W = open_checkpoint(tmp_path).read(f"{QUERY}.weight")
    layer = live.get_submodule(QUERY)
    assert torch.equal(layer(torch.eye(W.shape[1], dtype=torch.float16)).T, W)
    with pytest.raises(WeightError, match="gptqmodel lays its words out anew"):
        factors_of(live)
    factors, before = factors_of(tmp_path), logits(live)
    started = lora_model(live, factors)
    assert torch.equal(logits(started), before)
    assert not torch.equal(train(started), before)
    with pytest.raises(WeightError, match=r"q_proj: the base weight is quantized"):
        lora_model(load(), factors, "residual")


def test_fp8_linear_is_never_merged_as_if_its_codes_were_the_weight(tmp_path: Path) -> None:
    """PEFT takes FP8Linear for a linear layer, whose weight it adds to."""
    block_fp8(tmp_path)
    with fp8_kernel():
        live = load_fp8(tmp_path)
        assert open_live(live).sha256(f"{QUERY}.weight") == open_checkpoint(tmp_path).sha256(f"{QUERY}.weight")
        started = lora_model(live, 4)
        trained = train(started)
        for merge in (started.merge_and_unload, lambda: started.merge_adapter(safe_merge=True)):
            with pytest.raises(WeightError, match="its scales are elsewhere"):
                merge()
        assert torch.equal(logits(started), trained)


def test_without_the_kernel_that_a_layer_needs_it_is_started_all_the_same(tmp_path: Path) -> None:
    """A model that is put together where its kernels are not, and trained where they are."""
    block_fp8(tmp_path)
    started = lora_model(load_fp8(tmp_path), factors_of(tmp_path))
    with fp8_kernel():
        assert torch.equal(logits(started), logits(load_fp8(tmp_path)))


def test_packed_until_the_first_run(tmp_path: Path) -> None:
    """PEFT's own answer is that 'Linear' object has no attribute 'weight'."""
    kind = next(kind for kind in KINDS if kind.title == "compressed-tensors int4")
    kind.write(tmp_path)
    live = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    factors = factors_of(live)
    with pytest.raises(WeightError, match=r"q_proj: its weight is packed until the model first runs; run the model"):
        lora_model(live, factors)
    packed = open_live(live).read(f"{QUERY}.weight")
    before = logits(live)
    assert torch.equal(open_live(live).read(f"{QUERY}.weight"), packed)
    assert torch.equal(logits(lora_model(live, factors)), before)


def test_the_same_factors_from_torchaos_folder_and_model(tmp_path: Path) -> None:
    next(kind for kind in KINDS if kind.title == "torchao int8").write(tmp_path)
    folder, live = open_checkpoint(tmp_path), open_live(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert live.sha256(f"{QUERY}.weight") == folder.sha256(f"{QUERY}.weight")
    assert torch.equal(live.read(f"{QUERY}.weight"), folder.read(f"{QUERY}.weight"))


def test_layers_without_gradients_are_refused_by_name() -> None:
    """torchao's products of quantized activations are outside autograd: nothing before them would train."""
    model = llama(torch.bfloat16)
    factors = factors_of(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    message = rf"{QUERY}: Linear with a weight of Int8Tensor passes no gradient"
    with pytest.raises(TargetError, match=message):
        attach(model, factors)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(TargetError, match=message):
        initialize_peft(adapted, factors)
    model = llama(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    attach(model, factors)
