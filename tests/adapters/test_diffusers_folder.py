"""diffusers: factors into a pipeline by its own loaders, what its scripts save back into a plain LoRA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from inilora_kernels import FactorSet, approximate_model, convert, export_delta, export_merged, export_residual
from inilora_kernels.errors import CheckpointError, FactorFileError, OptionError, TargetError
from inilora_kernels.lora_start import lora_model

from .pipelines import (
    flux_output,
    load_pipeline,
    ltx_output,
    output,
    save_flux,
    save_ltx,
    save_pipeline,
    save_stable_diffusion_3,
    save_wan,
    stable_diffusion_3_output,
    unet_output,
    wan_output,
)

diffusers: Any = pytest.importorskip("diffusers")

# How a single model of a pipeline loads such a file.
ALONE: dict[str, Any] = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def factors(pipeline: Path) -> FactorSet:
    return factorized(pipeline)


def factorized(folder: Path, **options: Any) -> FactorSet:
    return approximate_model(folder, rank=2, solver="krylov", cache=False, progress=False, **options)


def train(parameters: dict[str, Any], compute: Any) -> None:
    """The adapter named default, two steps."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(".default." in name)
    optimizer = torch.optim.AdamW([one for one in parameters.values() if one.requires_grad], lr=1e-2)
    for _ in range(2):
        compute().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def started_by_its_loaders(pipe: Any, delta: Path, compute: Any) -> Tensor:
    """Load the adapter of a delta folder, which changes nothing. Returns the original's output."""
    expected: Tensor = compute(pipe).detach()
    pipe.load_lora_weights(delta / "adapter", adapter_name="default")
    assert torch.equal(compute(pipe), expected)
    return expected


@pytest.mark.parametrize("script", ["today", "older"])
def test_a_pipeline_by_its_own_loaders_and_back(
    pipeline: Path, factors: FactorSet, tmp_path: Path, script: str
) -> None:
    """older: the scripts' convert_state_dict_to_diffusers, other names and no alpha."""
    assert {name.partition(".")[0] for name in factors} == {"unet", "text_encoder"}
    export_delta(pipeline, factors, tmp_path / "delta")
    pipe = load_pipeline(pipeline)
    expected = started_by_its_loaders(pipe, tmp_path / "delta", output)
    train(dict(pipe.unet.named_parameters()) | dict(pipe.text_encoder.named_parameters()), lambda: output(pipe))
    trained = output(pipe).detach()
    assert not close(trained, expected)

    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part), adapter_name="default")
        for part in ("unet", "text_encoder")
    }
    more = {}
    if script == "today":
        more = diffusers.training_utils._collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    else:
        layers = {name: diffusers.utils.convert_state_dict_to_diffusers(one) for name, one in layers.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "trained", **layers, **more)

    convert(tmp_path / "trained", factors, tmp_path / "plain", base=pipeline)
    fresh = load_pipeline(pipeline)
    fresh.load_lora_weights(tmp_path / "plain")
    assert close(output(fresh), trained)
    assert not (tmp_path / "plain/adapter_config.json").exists()
    with pytest.raises(CheckpointError, match="give that folder as the base"):
        export_merged(tmp_path / "trained", factors, tmp_path / "merged", base=pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "compute", "models", "left_out"),
    [
        (save_flux, flux_output, ["transformer", "text_encoder"], "text_encoder_2"),
        (
            save_stable_diffusion_3,
            stable_diffusion_3_output,
            ["transformer", "text_encoder", "text_encoder_2"],
            "text_encoder_3",
        ),
        (save_wan, wan_output, ["transformer"], "transformer_2"),
        (save_ltx, ltx_output, ["transformer"], "text_encoder"),
    ],
)
def test_pipelines_that_load_no_adapters_for_all_their_models(
    tmp_path: Path, save: Any, compute: Any, models: list[str], left_out: str
) -> None:
    """diffusers' loaders pass over the tensors of their T5, and of Wan's second denoiser, without a word."""
    base = save(tmp_path / "base")
    factors = factorized(base)
    assert {name.partition(".")[0] for name in factors} >= {*models, left_out}
    assert any("attn.add_q_proj" in name for name in factors) == ("text_encoder" in models)
    with pytest.warns(
        UserWarning, match=rf"left out .* and \d+ more: .*Pipeline loads adapters for {', '.join(models)} alone"
    ):
        export_delta(base, factors, tmp_path / "delta")
    alone = FactorSet({name: part for name, part in factors.items() if name.startswith(left_out)}, factors.options)
    with pytest.raises(TargetError, match="give that model's own folder as the base"):
        export_delta(base, alone, tmp_path / "none")

    def load() -> Any:
        index = json.loads((base / "model_index.json").read_text())
        none = {name: None for name, kind in index.items() if kind == [None, None]}
        return diffusers.DiffusionPipeline.from_pretrained(base, **none)

    pipe = load()
    expected = started_by_its_loaders(pipe, tmp_path / "delta", compute)
    parts = {name: getattr(pipe, name) for name in models}
    train(
        {f"{part}.{name}": one for part, model in parts.items() for name, one in model.named_parameters()},
        lambda: compute(pipe),
    )
    trained = compute(pipe).detach()
    assert not close(trained, expected)
    layers = {
        f"{name}_lora_layers": get_peft_model_state_dict(part, adapter_name="default") for name, part in parts.items()
    }
    pipe.save_lora_weights(tmp_path / "trained", **layers, **diffusers.training_utils._collate_lora_metadata(parts))
    convert(tmp_path / "trained", factors, tmp_path / "plain", base=base)
    fresh = load()
    fresh.load_lora_weights(tmp_path / "plain")
    assert close(compute(fresh), trained)


def test_one_model_of_it(pipeline: Path, tmp_path: Path) -> None:
    base = pipeline / "unet"
    factors = factorized(base)
    export_delta(base, factors, tmp_path / "delta")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base)
    expected = unet_output(unet).detach()
    unet.load_lora_adapter(tmp_path / "delta/adapter", **ALONE, adapter_name="default")
    assert torch.equal(unet_output(unet), expected)
    train(dict(unet.named_parameters()), lambda: unet_output(unet))
    trained = unet_output(unet).detach()
    unet.save_lora_adapter(tmp_path / "trained", adapter_name="default")
    convert(tmp_path / "trained", factors, tmp_path / "plain", base=base)
    fresh = diffusers.UNet2DConditionModel.from_pretrained(base)
    fresh.load_lora_adapter(tmp_path / "plain", **ALONE)
    assert close(unet_output(fresh), trained)
    export_merged(tmp_path / "trained", factors, tmp_path / "merged", base=base)
    assert close(unet_output(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")), trained)
    # A file by itself, as civitai has them.
    convert(tmp_path / "trained/pytorch_lora_weights.safetensors", factors, tmp_path / "again", base=base)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_a_live_model_of_it(pipeline: Path, form: Any) -> None:
    """Its Attention has a method that joins the weights of query, key and value: it was taken for a forward pass."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")
    expected = unet_output(unet).detach()
    started = lora_model(unet, factorized(pipeline / "unet"), form)
    if form == "delta":
        assert torch.equal(unet_output(started), expected)
    assert close(unet_output(started), expected)
    train(dict(started.named_parameters()), lambda: unet_output(started))
    assert not close(unet_output(started), expected)
    fused = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")
    fused.fuse_qkv_projections()
    with pytest.raises(TargetError, match="call unfuse_qkv_projections first"):
        lora_model(fused, factorized(pipeline / "unet"), form)


def test_the_residual_of_one_model(pipeline: Path, tmp_path: Path) -> None:
    export_residual(pipeline / "unet", factorized(pipeline / "unet"), tmp_path / "out")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/base")
    expected = unet_output(diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet"))
    assert not close(unet_output(unet), expected)
    unet.load_lora_adapter(tmp_path / "out/adapter", **ALONE)
    assert close(unet_output(unet), expected)


def test_ranks_that_differ_are_in_the_metadata(pipeline: Path, tmp_path: Path) -> None:
    factors = factorized(pipeline, rank_pattern={"to_v": 3, "layers.1.self_attn.q_proj": 4})
    export_delta(pipeline, factors, tmp_path / "delta")
    pipe = load_pipeline(pipeline)
    expected = output(pipe).detach()
    pipe.load_lora_weights(tmp_path / "delta/adapter", adapter_name="default")
    assert torch.equal(output(pipe), expected)


def test_an_alpha_of_ones_own_is_taken_from_where_it_is(pipeline: Path, factors: FactorSet, tmp_path: Path) -> None:
    """In the metadata of today's files, next to A and B in older ones."""
    export_delta(pipeline, factors, tmp_path / "delta")
    tensors = load_file(tmp_path / "delta/adapter/pytorch_lora_weights.safetensors")
    halved = {name: tensor / 2 for name, tensor in tensors.items()}
    alphas = {name.replace(".lora_A.weight", ".alpha"): torch.tensor(16.0) for name in tensors if "lora_A" in name}
    (tmp_path / "trained").mkdir()
    save_file(halved | alphas, tmp_path / "trained/pytorch_lora_weights.safetensors")
    convert(tmp_path / "trained", factors, tmp_path / "plain", base=pipeline)
    for name, pair in load_file(tmp_path / "plain/pytorch_lora_weights.safetensors").items():
        if "lora_A" in name:  # s = 4 of halves is the start itself: nothing was learned
            assert torch.equal(pair[:2], torch.zeros_like(pair[:2]))


def test_what_cannot_be_right_is_refused(pipeline: Path, factors: FactorSet, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="save no alpha"):
        export_delta(pipeline, factors, tmp_path / "out", lora_alpha=4)
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]), "conv")
    unet.save_lora_adapter(tmp_path / "conv", adapter_name="conv")
    with pytest.raises(FactorFileError, match="only linear layers"):
        convert(tmp_path / "conv", factors, tmp_path / "out", base=pipeline)
    save_file({"lora_unet_down.lokr_w1": torch.ones(2)}, tmp_path / "conv/pytorch_lora_weights.safetensors")
    with pytest.raises(FactorFileError, match="not a plain LoRA in diffusers' own names"):
        convert(tmp_path / "conv", factors, tmp_path / "out", base=pipeline)
    base = pipeline / "unet"
    export_delta(base, factorized(base), tmp_path / "delta")
    file = tmp_path / "delta/adapter/pytorch_lora_weights.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(FactorFileError, match="different adapters"):
        convert(tmp_path / "delta/adapter", factorized(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
