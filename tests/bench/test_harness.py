"""What every benchmark relies on: peak memory as the kernel counts it, a process of its own, rows as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bench import harness


def test_the_peak_is_what_was_taken_and_given_back_since() -> None:
    size = 32 * 2**20
    # As a warm-up: the memory is freed, but the process may keep it.
    del (before := [np.ones(2**10) for _ in range(4 * 2**10)])[:]
    peak = harness.PeakMemory()
    assert peak.bytes() < size / 8
    held = np.ones(size, dtype=np.uint8)
    del held, before
    # Half a MiB of either side: what numpy and the interpreter take and give back meanwhile.
    assert abs(peak.bytes() - size) < size / 8


def test_rows_become_json_markdown_and_a_plot_and_leave_other_parts_alone(tmp_path: Path) -> None:
    harness.publish("small", "first", [{"case": "a", "ms": 1.23456, "checked": True}], "make one", folder=tmp_path)
    rows = [{"case": "a", "GB": 2.0}, {"case": "b", "ratio": 3}]
    figure = Figure()
    harness.publish("small", "second", rows, "make two", note="So it is read.", figure=figure, folder=tmp_path)
    content = json.loads((tmp_path / "small.json").read_text())
    assert list(content) == ["first", "second"]
    assert content["second"]["rows"] == rows
    assert content["first"]["command"] == "make one"
    assert len(content["first"]["machine"]["commit"]) >= 7
    text = (tmp_path / "small.md").read_text()
    assert "| a | 1.235 | yes |" in text
    assert "| case | GB | ratio |" in text
    assert "| b |  | 3 |" in text
    assert "So it is read." in text
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_process_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        harness.in_own_process("bench.table5", "--models", "nothing")
