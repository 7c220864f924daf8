"""Folders that hold R = W − BA in place of some weights, as `export_residual` writes them."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, FactorFileError
from ..storage.reading import MOST_JSON, is_there, read_bytes
from ..storage.schema import ResidualRecord, parse
from .checkpoint import open_checkpoint
from .location import WEIGHT_SUFFIXES

RESIDUAL_RECORD = "inilora_residual.json"


def require_no_residual(path: Path) -> None:
    """Raise CheckpointError for a residual folder or its file: what is computed from R starts no model."""
    record = residual_record(path.parent if path.suffix in WEIGHT_SUFFIXES else path)
    if record is not None:
        raise CheckpointError(
            f"{path}: it holds R = W − BA in place of W, as export_residual writes it; give the original, {record.base}"
        )


def residual_record(folder: Path | None) -> ResidualRecord | None:
    """Return the record of a residual folder; None for any other, even one to which a program has copied the record."""
    file = None if folder is None else folder / RESIDUAL_RECORD
    if folder is None or file is None or not is_there(file):
        return None
    record = parse(ResidualRecord, read_bytes(file, FactorFileError, MOST_JSON), str(file))
    for tensor, sha256 in list(record.residual_sha256.items())[:1]:
        checkpoint = open_checkpoint(folder)
        if tensor not in checkpoint.tensors or checkpoint.sha256(tensor) != sha256:
            return None
    return record
