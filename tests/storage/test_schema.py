"""Records of the wrong type, range or length are refused at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from inilora_kernels import FactorSet
from inilora_kernels.errors import FactorFileError

from .records import M, changed, header_of


@pytest.mark.parametrize(
    "record",
    [
        {"loss": "abc"},
        {"loss": None},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": 1.7e308},
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
        {"singular_values": [1e200]},
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
