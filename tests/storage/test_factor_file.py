"""A factor file's records and tensors are checked at the door."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inilora_kernels import Certificate, Factors, FactorSet
from inilora_kernels.errors import FactorFileError

from .records import STEP, A, B, M, changed, header_of


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
    # safetensors before 0.5 refuses an empty tensor itself, without its name.
    with pytest.raises(FactorFileError, match=f"{M}|buffer length"):
        FactorSet.load(file)


def test_certificates_may_be_unknown_only_where_the_weights_are(file: Path) -> None:
    header = header_of(file)
    unknown = {"loss": float("nan"), "optimum": float("nan"), "energy": float("nan"), "source_sha256": ""}
    header["modules"][M].update(unknown)
    changed(file, header, {})
    assert FactorSet.load(file)[M].source_sha256 == ""


def test_every_flipped_bit_is_noticed_and_a_tensors_is_named(file: Path) -> None:
    """Or else it changes nothing that is read, such as the name of the checksum itself."""
    whole = file.read_bytes()
    before = FactorSet.load(file).to_bytes()
    values = 8 + int.from_bytes(whole[:8], "little")
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = refusal(file)
        assert found is None or str(file) in found
        if place >= values:
            assert found is not None
            assert ".lora_" in found
        elif found is None:
            assert FactorSet.load(file).to_bytes() == before, place


def refusal(file: Path) -> str | None:
    try:
        FactorSet.load(file)
    except FactorFileError as error:
        return str(error)
    return None


def test_a_tensor_of_another_run_is_noticed(file: Path) -> None:
    # Copies: before safetensors 0.5 they were the file's own bytes, which save_file replaces.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**tensors, A: tensors[A] + 1}, file, metadata)
    with pytest.raises(FactorFileError, match=f"damaged: {re.escape(A)}"):
        FactorSet.load(file)
    save_file(tensors, file, metadata)
    FactorSet.load(file)


def test_files_without_checksums_are_read(file: Path) -> None:
    header = header_of(file)
    assert "checksum" not in header
    before = FactorSet.load(file)
    changed(file, header, {})
    assert torch.equal(FactorSet.load(file)[M].A, before[M].A)


def test_the_metadata_is_json_also_where_the_excess_has_no_bound(tmp_path: Path) -> None:
    zero = Factors(torch.ones(1, 2), torch.ones(3, 1), Certificate(6.0, 0.0, 0.0, 3), "ab" * 32)
    FactorSet({M: zero}, {}).save(tmp_path / "factors")
    record = header_of(tmp_path / "factors")["modules"][M]
    assert json.loads(json.dumps(record, allow_nan=False))["excess"] is None
    assert FactorSet.load(tmp_path / "factors")[M].certificate.excess == math.inf
