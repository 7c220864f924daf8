"""Tables and the plot of what bench.gpu has measured: prediction next to measurement.

python -m bench.gpu_report results/gpu-NAME.json [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
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


# Factor within which the band of the plot lies.
_BAND = 1.25


def series(measured: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[tuple[float, float, str]]]:
    """Predicted and measured microseconds and a rank: steps by dtype, the direct solver's passes and solves."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in measured.get("steps", []):
        if "predicted µs" in row:
            taken = row["graph µs"] or row["launches µs"]
            name = f"a step, {row['dtype'].removeprefix('torch.')}"
            found.setdefault(name, []).append((row["predicted µs"], taken, str(row["rank"])))
    for row in measured.get("direct", []):
        if "a pass" in row:
            taken = row["graph µs"] or row["launches µs"]
            found.setdefault("direct solver, a pass", []).append((row["predicted µs"], taken, ""))
        elif "predicted s" in row:
            found.setdefault("direct solver, whole", []).append((1e6 * row["predicted s"], 1e6 * row["s"], ""))
    return found


def plot(measured: Mapping[str, Sequence[dict[str, Any]]], device: str) -> Figure:
    """Measured against predicted microseconds, both logarithmic; on the line they are equal."""
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.subplots()
    points = series(measured)
    for marker, (name, found) in zip("os^DvP", points.items(), strict=False):
        axes.loglog(*zip(*((x, y) for x, y, _ in found), strict=True), marker, label=name)
        for x, y, rank in found:
            axes.annotate(rank, (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7)
    values = [value for found in points.values() for x, y, _ in found for value in (x, y)]
    if values:
        ends = [min(values) / 1.5, max(values) * 1.5]
        axes.loglog(ends, ends, color="grey", linewidth=0.8, label="equal")
        low, high = [end / _BAND for end in ends], [end * _BAND for end in ends]
        axes.fill_between(ends, low, high, color="grey", alpha=0.15, linewidth=0, label=f"within {_BAND} times")
    axes.set_title(f"{device}\nmatrices of a wave or batch, ranks as numbers")
    axes.set_xlabel("predicted, µs")
    axes.set_ylabel("measured, µs")
    axes.legend(fontsize=8)
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
    device = next(iter(content.values()))["machine"].get("gpu", "no GPU")
    plot(measured, device).savefig(folder / f"{given.file.stem}.png", dpi=130)


if __name__ == "__main__":
    main()
