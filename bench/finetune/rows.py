"""Finished runs, one line of JSON each, in one file a table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .run import Run

Row = dict[str, Any]


def read_rows(folder: Path) -> dict[Run, Row]:
    """Every finished run of every table in the folder, by its settings; a later row replaces an earlier one.

    A last line that a killed run left half-written is no row, and is run again.
    """
    rows: dict[Run, Row] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[Run.from_record(row["run"])] = row
    return rows


def append_row(file: Path, row: Row) -> None:
    """Add a row so that it is on disk when this returns, even after a half-written last line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        start = b""
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            start = b"" if stream.read(1) == b"\n" else b"\n"
        stream.write(start + json.dumps(row).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
