"""The commands around training: export before it, convert and merge after it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from inilora_kernels import FactorSet, load_delta, save_inilora_pt

from ..factorized import factorize, inilora_alpha
from .commands import Inilora


@pytest.fixture(scope="module")
def file(minilm_factors: FactorSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factors") / "factors.safetensors"
    minilm_factors.save(path)
    return path


@pytest.fixture(scope="module")
def trained(minilm: Path, minilm_factors: FactorSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta export, whose adapter has moved away from its start."""
    from inilora_kernels import export_delta

    folder = tmp_path_factory.mktemp("trained")
    export_delta(minilm, minilm_factors, folder / "start")
    model = load_delta(AutoModel.from_pretrained(minilm), folder / "start")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1000, 1012)[None])[0]


def test_export_residual(inilora: Inilora, minilm: Path, file: Path, tmp_path: Path) -> None:
    status, _, error = inilora("export", file, "--base", minilm, "-o", tmp_path / "out", "--lora-alpha", 16, "--rslora")
    assert status == 0
    assert "wrote" in error
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert (output(model) - output(AutoModel.from_pretrained(minilm))).abs().max() < 2e-5
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.use_rslora) == (16, True)


def test_export_delta(inilora: Inilora, minilm: Path, file: Path, tmp_path: Path) -> None:
    options = ["--form", "delta", "--task-type", "FEATURE_EXTRACTION", "--lora-dropout", "0.1"]
    status, *_ = inilora("export", file, "--base", minilm, "-o", tmp_path / "out", *options)
    assert status == 0
    model = load_delta(AutoModel.from_pretrained(minilm), tmp_path / "out")
    assert torch.equal(output(model), output(AutoModel.from_pretrained(minilm)))
    config = model.peft_config["default"]
    assert (config.task_type, config.lora_dropout) == ("FEATURE_EXTRACTION", 0.1)


def test_a_warning_is_one_line(inilora: Inilora, minilm: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModel.from_pretrained(minilm).to(torch.bfloat16).save_pretrained(base)
    factorize(base, ("layer.0.attention.self.query",), start=inilora_alpha).save(tmp_path / "alpha.safetensors")
    status, _, error = inilora("export", tmp_path / "alpha.safetensors", "--base", base, "-o", tmp_path / "out")
    assert status == 0
    warned = [line for line in error.splitlines() if line.startswith("inilora: warning: ")]
    assert len(warned) == 1
    assert 'use form="delta"' in warned[0]


def test_the_authors_format_both_ways(
    inilora: Inilora, minilm: Path, minilm_factors: FactorSet, file: Path, tmp_path: Path
) -> None:
    pt = "export", file, "-o", tmp_path / "pt", "--format", "inilora-pt"
    assert inilora(*pt, "--lora-alpha", "4")[0] != 0
    assert inilora(*pt)[0] == 0
    status, printed, _ = inilora("inspect", tmp_path / "pt", "--base", minilm, "--json")
    assert status == 0
    for name, record in json.loads(printed)["modules"].items():
        assert record["loss"] == pytest.approx(minilm_factors[name].certificate.loss)
    options = ["--base", minilm, "--form", "delta"]
    assert inilora("export", tmp_path / "pt", "-o", tmp_path / "delta", *options)[0] == 0
    assert inilora("export", file, "-o", tmp_path / "same", *options)[0] == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_convert_and_merge(inilora: Inilora, minilm: Path, file: Path, trained: Path, tmp_path: Path) -> None:
    status, printed, _ = inilora("convert", trained, "--init", file, "-o", tmp_path / "lora")
    assert (status, printed) == (0, "")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / "lora")
    assert model.peft_config["default"].r == 16
    assert inilora("merge", trained, "--init", file, "-o", tmp_path / "merged")[0] == 0
    merged = output(AutoModel.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(merged, output(model), rtol=0, atol=1e-4)
    assert (merged - output(AutoModel.from_pretrained(minilm))).abs().max() > 0.1


def test_recompression_shows_what_is_lost(inilora: Inilora, file: Path, trained: Path, tmp_path: Path) -> None:
    status, printed, _ = inilora("convert", trained, "--init", file, "-o", tmp_path / "one", "--rank", 3, "--all")
    assert status == 0
    assert "recompressed to rank 3" in printed
    assert "encoder.layer.*.attention.self.*" in printed
    shown = [float(share) for share in re.findall(r"([\d.]+)%", printed)]
    status, printed, _ = inilora("convert", trained, "--init", file, "-o", tmp_path / "two", "--rank", 3, "--json")
    errors = json.loads(printed)["truncation_error"]
    assert shown == pytest.approx([100 * error for error in [*errors.values(), max(errors.values())]], abs=0.005)
    assert all(0 < error < 1 for error in errors.values())


def test_bad_input_gives_one_clear_line_and_leaves_nothing(
    inilora: Inilora, minilm: Path, minilm_factors: FactorSet, file: Path, trained: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    AutoModel.from_pretrained(minilm).to(torch.bfloat16).save_pretrained(other)
    factorize(other).save(tmp_path / "other.safetensors")
    save_inilora_pt(minilm_factors, tmp_path / "pt")
    before = set(tmp_path.rglob("*"))
    out = ["-o", tmp_path / "out"]
    for arguments, message in (
        (["export", file, *out], "as --base"),
        (["export", file, "--base", other, *out], "is not the weight that these factors were computed from (sha256"),
        (["export", file, "--base", minilm, *out, "--form", "detla"], 'did you mean "delta"'),
        (["export", file, "--base", minilm, *out, "--task-type", "CAUSAL"], 'did you mean "CAUSAL_LM"'),
        (["export", file, "--base", minilm, "-o", trained], "already there"),
        (["convert", trained, "--init", tmp_path / "other.safetensors", *out], "is not the weight that these factors"),
        (["merge", trained, "--init", tmp_path / "other.safetensors", *out], "is not the weight that these factors"),
        (["convert", trained, "--init", tmp_path / "pt", *out], "do not record which weight they were computed"),
        (["convert", trained, "--init", tmp_path / "gone", *out], "no such factor file"),
        (["convert", minilm, "--init", file, *out], "adapter_config.json"),
        (["convert", trained, "--init", file, *out, "--rank", 0], "rank=0"),
    ):
        status, printed, error = inilora(*arguments)
        assert status == 2
        assert not printed
        assert message in error
        assert set(tmp_path.rglob("*")) == before
    assert inilora("convert", trained, "--init", tmp_path / "pt", "--base", minilm, *out)[0] == 0
