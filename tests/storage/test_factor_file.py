"""A factor file's records and tensors are checked at the door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inilora_kernels import Certificate, Factors, FactorSet
from inilora_kernels.errors import FactorFileError

M = "layer.0.query"
A, B, STEP = f"{M}.lora_A.weight", f"{M}.lora_B.weight", f"{M}.lora_A.step_5.weight"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    one = Factors(
        A=torch.ones(2, 5),
        B=torch.ones(7, 2),
        certificate=Certificate(1.5, 1.0, 3.0, 10),
        source_sha256="ab" * 32,
        rows=(7, 14),
        history=((5, 2.0), (10, 1.5)),
        checkpoints={5: (torch.ones(2, 5), torch.ones(7, 2))},
        singular_values=(2.0, 1.0),
    )
    FactorSet({M: one, "layer.0.value": one}, {"method": "inilora"}).save(tmp_path / "factors")
    return tmp_path / "factors"


def changed(file: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(file), **tensors}, file, {"inilora_kernels": json.dumps(header)})


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return dict(json.loads(metadata["inilora_kernels"]))


@pytest.mark.parametrize(
    "record",
    [
        {"loss": "abc"},
        {"loss": None},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"optimum": -1.0},
        {"energy": [1.0]},
        {"steps": None},
        {"steps": -1},
        {"steps": 1e400},
        {"steps": 10**40},
        {"rows": [1, 2, 3, 4]},
        {"rows": [2, 5, 4]},
        {"rows": [0, 2, 3]},
        {"rows": [14, 7]},
        {"rows": [0, 6]},
        {"rows": "all"},
        {"transposed": "yes"},
        {"source_sha256": 5},
        {"source_sha256": "ab"},
        {"source_sha256": "AB" * 32},
        {"history": [[5]]},
        {"history": {"5": 2.0}},
        {"checkpoint_steps": [6]},
        {"checkpoint_steps": [10]},
        {"singular_values": [float("nan")]},
        {"singular_values": [-1.0]},
        {"singular_values": "1.0"},
    ],
)
def test_a_wrong_record_is_refused(file: Path, record: dict[str, Any]) -> None:
    header = header_of(file)
    header["modules"][M].update(record)
    changed(file, header, {})
    with pytest.raises(FactorFileError, match=str(file)):
        FactorSet.load(file)


@pytest.mark.parametrize(
    "tensors",
    [
        {A: torch.full((2, 5), float("nan"))},
        {B: torch.full((7, 2), float("inf"))},
        {A: torch.ones(10)},
        {A: torch.ones(2, 5, 1)},
        {A: torch.ones(1, 5)},
        {A: torch.ones(0, 5), B: torch.ones(7, 0)},
        {B: torch.ones(6, 2)},
        {A: torch.ones(2, 5, dtype=torch.int32)},
        {A: torch.ones(2, 5, dtype=torch.float64)},
        {A: torch.ones(2, 5).to(torch.float8_e4m3fn)},
        {STEP: torch.full((2, 5), float("nan"))},
        {STEP: torch.ones(3, 5)},
    ],
)
def test_a_wrong_tensor_is_refused(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    changed(file, header_of(file), tensors)
    with pytest.raises(FactorFileError, match=M):
        FactorSet.load(file)


@pytest.mark.parametrize(
    "header",
    [None, [], "text", 5, {}, {"format_version": 1}, {"format_version": "1"}, {"format_version": 10**30}]
    + [{"format_version": 1, "options": {}, "modules": modules} for modules in ({}, [], {M: None}, {M: {}}, {5: 6})]
    + [{"format_version": 1, "options": options, "modules": {}} for options in (None, [])],
)
def test_wrong_metadata_is_refused(file: Path, header: Any) -> None:
    changed(file, header, {})
    with pytest.raises(FactorFileError, match=str(file)):
        FactorSet.load(file)


def test_deep_nesting_is_refused(file: Path) -> None:
    save_file(load_file(file), file, {"inilora_kernels": "[" * 100_000})
    with pytest.raises(FactorFileError, match=str(file)):
        FactorSet.load(file)


def test_certificates_may_be_unknown_only_where_the_weights_are(file: Path) -> None:
    header = header_of(file)
    unknown = {"loss": float("nan"), "optimum": float("nan"), "energy": float("nan"), "source_sha256": ""}
    header["modules"][M].update(unknown)
    changed(file, header, {})
    assert FactorSet.load(file)[M].source_sha256 == ""
