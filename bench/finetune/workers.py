"""Run a table to its end: processes side by side, a row on disk for each finished run, and the time left."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .checkpoint import checkpoint
from .rows import Row, append_row, read_rows
from .run import Run
from .table import Cell, Table
from .training import finetune


def run_table(
    table: Table,
    model: Path,
    data: Path | None,
    results: Path,
    *,
    workers: int,
    origin: Mapping[str, Any],
    most: int | None = None,
) -> int:
    """Do every run of the table that has no row yet in the results; return how many were done.

    Each process has its share of the cores. A run that is cut off leaves no row and is done again next time.

    origin: what every row says of where it comes from.
    most: stop after this many runs.
    """
    done = 0
    rows = read_rows(results)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(workers,)
    )
    with pool, _progress() as progress:
        bar = progress.add_task(table.name, total=None, left="")
        underway: dict[Future[Row], Cell] = {}
        while True:
            cells = list(table.cells(rows))
            # Sweeps first, then seed by seed, so that a table cut off has as many seeds of one system as of another.
            missing = sorted(
                (cell for cell in cells if cell.run not in rows),
                key=lambda cell: (not cell.sweep, 0 if cell.sweep else table.grid["seed"].index(cell.run.seed)),
            )
            progress.update(
                bar,
                completed=len({cell.run for cell in cells} - {cell.run for cell in missing}),
                total=table.total(rows),
                left=_left(table, rows, workers),
            )
            for cell in _not_underway(missing, underway):
                if len(underway) == workers or (most is not None and done + len(underway) >= most):
                    break
                underway[pool.submit(finetune, cell.run, model, data, results / "checkpoints")] = cell
            if not underway:
                return done
            finished, _ = wait(underway, return_when=FIRST_COMPLETED)
            for future in finished:
                cell = underway.pop(future)
                row = {"table": table.name, "system": cell.system, **future.result(), **origin}
                append_row(results / f"{table.name}.jsonl", row)
                checkpoint(cell.run, results / "checkpoints").unlink(missing_ok=True)
                rows[cell.run] = row
                done += 1


def _not_underway(missing: list[Cell], underway: dict[Future[Row], Cell]) -> Iterator[Cell]:
    """Each run once, whatever number of places it has."""
    seen: set[Run] = {cell.run for cell in underway.values()}
    for cell in missing:
        if cell.run not in seen:
            seen.add(cell.run)
            yield cell


def _left(table: Table, rows: dict[Run, Row], workers: int) -> str:
    """The time left, from the median of this table's runs so far."""
    seconds = [sum(row["seconds"].values()) for row in rows.values() if row["table"] == table.name]
    if not seconds:
        return "time left: known after the first run"
    known = {cell.run for cell in table.cells(rows)} & rows.keys()
    minutes = (table.total(rows) - len(known)) * median(seconds) / workers / 60
    return f"about {minutes:.0f} min left, {median(seconds):.0f} s a run"


def threads_of_each(workers: int) -> int:
    """Its share of torch's threads, which are the cores unless OMP_NUM_THREADS says fewer."""
    return max(1, torch.get_num_threads() // workers)


def _begin(workers: int) -> None:
    """Take a share of the cores, and end when the parent is gone: a killed run leaves no process behind."""
    torch.set_num_threads(threads_of_each(workers))
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _follow(parent: BaseProcess | None) -> None:
    assert parent is not None
    parent.join()
    os._exit(1)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
    )
