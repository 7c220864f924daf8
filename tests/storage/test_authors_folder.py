from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.export import export_delta
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import FactorFileError, OptionError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.storage.authors_folder import save_inilora_pt

QUERY = "encoder.layer.0.attention.self.query"


def test_the_files_are_as_the_authors_write_them(minilm_factors: FactorSet, tmp_path: Path) -> None:
    part = replace(minilm_factors[QUERY], history=((0, 14745.6), (50, 1474.56)))
    save_inilora_pt(FactorSet({QUERY: part}, {}), tmp_path / "pt")
    assert sorted(file.name for file in (tmp_path / "pt").iterdir()) == [
        f"{QUERY}.weight.loss.pt",
        f"{QUERY}.weight.pt",
    ]
    content = torch.load(tmp_path / "pt" / f"{QUERY}.weight.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in content.items()} == {"A": (384, 8), "B": (8, 384)}
    assert torch.equal(content["A"] @ content["B"], part.product())
    # The mean over 384² entries, which is what their loop minimizes.
    losses = torch.load(tmp_path / "pt" / f"{QUERY}.weight.loss.pt", weights_only=True)["loss"]
    assert losses == pytest.approx([0.1, 0.01])


def test_roberta_has_the_names_that_their_training_code_looks_for(minilm_factors: FactorSet, tmp_path: Path) -> None:
    """It takes `roberta.` off: of a checkpoint with that prefix it found none of ours. The way back keeps the steps."""
    start = minilm_factors[QUERY]
    part = replace(start, history=((0, 4.0), (50, 2.0), (299, 1.0)), certificate=replace(start.certificate, steps=300))
    save_inilora_pt(FactorSet({f"roberta.{QUERY}": part}, {}), tmp_path / "pt")
    back = FactorSet.load(tmp_path / "pt")
    assert list(back) == [QUERY]
    assert [step for step, _ in back[QUERY].history] == [0, 50, 299]
    assert [loss for _, loss in back[QUERY].history] == pytest.approx([4.0, 2.0, 1.0])
    assert back[QUERY].certificate.steps == 300


def test_there_and_back_and_into_peft(minilm: Path, minilm_alpha: FactorSet, tmp_path: Path) -> None:
    save_inilora_pt(minilm_alpha, tmp_path / "pt")
    factors = FactorSet.load(tmp_path / "pt", minilm)
    export_delta(minilm, factors, tmp_path / "delta")
    model = load_delta(AutoModel.from_pretrained(minilm), tmp_path / "delta").eval()
    original = AutoModel.from_pretrained(minilm).eval()
    ids = torch.arange(1000, 1012)[None]
    assert torch.equal(model(ids)[0], original(ids)[0])
    convert(tmp_path / "delta/adapter", factors, tmp_path / "lora")
    assert torch.equal(PeftModel.from_pretrained(original, tmp_path / "lora").eval()(ids)[0], model(ids)[0])
    with pytest.raises(FactorFileError, match="do not record which weight they were computed"):
        convert(tmp_path / "delta/adapter", FactorSet.load(tmp_path / "pt"), tmp_path / "other")


def test_what_is_no_such_folder_is_refused(gpt2_factors: FactorSet, minilm_factors: FactorSet, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not fit into the authors' format"):
        save_inilora_pt(gpt2_factors, tmp_path / "pt")
    with pytest.raises(FactorFileError, match="a folder without factors"):
        FactorSet.load(tmp_path)
    save_inilora_pt(minilm_factors, tmp_path / "pt")
    file = tmp_path / "pt" / f"{QUERY}.weight.pt"
    for content, match in (
        ({"A": torch.zeros(384, 8)}, "no 'A' .d×r. and 'B'"),
        ({"A": torch.zeros(384, 8), "B": torch.zeros(7, 384)}, "no 'A' .d×r. and 'B'"),
        ([torch.zeros(1)], "holds a list, not the dict"),
        ({"A": Path("x")}, "damaged, or holds objects other than tensors"),
    ):
        torch.save(content, file)
        with pytest.raises(FactorFileError, match=match):
            FactorSet.load(tmp_path / "pt")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FactorFileError, match="damaged"):
        FactorSet.load(tmp_path / "pt")


def test_what_could_not_be_read_again_is_refused(minilm_factors: FactorSet, tmp_path: Path) -> None:
    """Loaded, saved as a factor file, and refused there; or a traceback of torch."""
    save_inilora_pt(FactorSet({QUERY: minilm_factors[QUERY]}, {}), tmp_path / "pt")
    file, losses = (tmp_path / "pt" / f"{QUERY}.weight{part}.pt" for part in ("", ".loss"))
    right = torch.load(file, weights_only=True)
    for content, match in (
        ({name: one.double() * 1e100 for name, one in right.items()}, "more than float32 does"),
        ({name: one.to(torch.float8_e4m3fn) for name, one in right.items()}, "float8_e4m3fn, not float16 to float64"),
        ({"A": torch.zeros(384, 0), "B": torch.zeros(0, 384)}, "no 'A' .d×r. and 'B'"),
        ({"A": torch.zeros(0, 8), "B": torch.zeros(8, 384)}, "no 'A' .d×r. and 'B'"),
    ):
        torch.save(content, file)
        with pytest.raises(FactorFileError, match=match):
            FactorSet.load(tmp_path / "pt")
    torch.save(right, file)
    for history in (
        {"loss": [float("nan")]},
        {"loss": [1e308] * 3},
        {"loss": [1.0], "steps": -5},
        {"loss": [1.0], "step": [-3]},
    ):
        torch.save(history, losses)
        with pytest.raises(FactorFileError, match="a loss is NaN or Inf, or a step is negative"):
            FactorSet.load(tmp_path / "pt")


def test_names_that_would_share_a_file_or_have_none(minilm_factors: FactorSet, tmp_path: Path) -> None:
    """`roberta.e.query` took the file of `e.query`: one for two modules."""
    one = minilm_factors[QUERY]
    for names, match in (
        (("e.query", "roberta.e.query"), "have the same file"),
        (("e.\0.query",), "no name of a file"),
    ):
        with pytest.raises(OptionError, match=match):
            save_inilora_pt(FactorSet(dict.fromkeys(names, one), {}), tmp_path / "pt")
    assert not (tmp_path / "pt").exists()
