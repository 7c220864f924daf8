"""Tables and the plot of what bench.gpu has measured: prediction next to measurement.

python -m bench.gpu_report results/gpu-NAME.json [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .harness import cell, columns, markdown

STEP_COLUMNS = (
    "matrix",
    "dtype",
    "rank",
    "graph µs",
    "launches µs",
    "predicted µs",
    "measured / predicted",
    "share of DRAM",
    "bound",
)


def report(content: dict[str, Any]) -> str:
    """A Markdown section for each part; a step's row has only what a reader compares."""
    lines: list[str] = []
    for part, one in content.items():
        header = list(STEP_COLUMNS) if part == "steps" else columns(one["rows"])
        extra = [name for name in ("error", "left out") if any(name in row for row in one["rows"])]
        header = list(dict.fromkeys([*header, *extra]))
        lines += [f"## {part}, measured", "", one["note"], ""]
        lines += [*markdown(header, [[cell(row.get(name)) for name in header] for row in one["rows"]]), ""]
    return "\n".join(lines)


def direct_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The direct solver's passes and solves in a step's columns, in microseconds, so that one plot has both."""
    found = []
    for row in rows:
        if "a pass" in row:
            found.append({**row, "matrix": row["a pass"], "rank": "pass"})
        elif "predicted s" in row:
            taken = {"graph µs": None, "launches µs": 1e6 * row["s"], "predicted µs": 1e6 * row["predicted s"]}
            found.append({"matrix": row["solve"], "rank": "solve", **taken})
    return found


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Measured against predicted microseconds, both logarithmic; on the line they are equal."""
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    points = [row for row in rows if "predicted µs" in row]
    predicted = [row["predicted µs"] for row in points]
    measured = [row["graph µs"] or row["launches µs"] for row in points]
    axes.loglog(predicted, measured, "o")
    for row, x, y in zip(points, predicted, measured, strict=True):
        axes.annotate(f"{row['matrix']} r={row['rank']}", (x, y), fontsize=6)
    if points:
        ends = [min(predicted + measured), max(predicted + measured)]
        axes.loglog(ends, ends, linewidth=0.8)
    axes.set_xlabel("predicted, µs a step, pass or solve")
    axes.set_ylabel("measured, µs a step, pass or solve")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    content = json.loads(given.file.read_text(encoding="utf-8"))
    folder = given.output or given.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{given.file.stem}-report.md").write_text(report(content), encoding="utf-8")
    measured = {part: one["rows"] for part, one in content.items()}
    rows = [*measured.get("steps", []), *direct_rows(measured.get("direct", []))]
    plot(rows).savefig(folder / f"{given.file.stem}.png", dpi=130)


if __name__ == "__main__":
    main()
