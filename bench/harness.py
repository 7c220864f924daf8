"""What every benchmark needs: the machine, time and peak memory, a process of its own, and rows that become files.

A benchmark collects rows, flat dictionaries with the same columns, and hands them to `publish`, which stores what they
need to mean anything: the machine, the commit and the command.
"""

from __future__ import annotations

import ctypes
import io
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from inilora_kernels.storage.atomic import write_whole

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def machine() -> Row:
    """Processor and its vectors, GPU if there is one, threads, versions and commit."""
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    described: Row = {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str:
    """The commit that is checked out; empty where there is no git, as on a borrowed machine."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, including the work that it queued on a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """The peak of memory since this was created: the process's growth since then, or on a GPU the total.

    Create it after the warm-up. Memory that the warm-up freed but the allocator kept is returned first: otherwise a run
    would take it again without raising the high-water mark, and the peak would come out too small. Linux only.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        if device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            # Resets VmHWM to what is resident now (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident()
        else:
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """So far."""
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text().splitlines()
        return max(0, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")) - self._before)


def resident() -> int:
    """Bytes of this process in memory now. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_own_process(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints as its last line, JSON: a process of its own has its own peak of memory.

    Raises RuntimeError with the end of what it wrote to stderr if it fails.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def cell(value: object) -> str:
    """A value as tables show it.

    >>> cell(0.123456), cell(4096), cell(True), cell(None)
    ('0.1235', '4096', 'yes', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, its first column to the left and the others to the right.

    >>> markdown(["case", "ms"], [["a", "1"]])
    ['| case | ms |', '| --- | ---: |', '| a | 1 |']
    """
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def show(title: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """The rows as a table on the terminal."""
    header = columns(rows)
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in header))
    (console or Console()).print(table)


def columns(rows: Sequence[Row]) -> list[str]:
    """Every row's columns, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def publish(
    name: str,
    part: str,
    rows: Sequence[Row],
    command: str,
    *,
    note: str = "",
    figure: Figure | None = None,
    folder: Path = RESULTS,
) -> None:
    """Store a part of a benchmark: in {name}.json next to its other parts, in {name}.md, and on the terminal.

    note: how the rows are to be read. figure: becomes {name}.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content[part] = {"command": command, "machine": machine(), "note": note, "rows": list(rows)}
    write_whole(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(folder / f"{name}.md", document(name, content).encode())
    if figure is not None:
        save_figure(name, figure, folder)
    show(part, rows)


def save_figure(name: str, figure: Figure, folder: Path = RESULTS) -> None:
    """Store {name}.png."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(folder / f"{name}.png", picture.getvalue())


def document(name: str, content: Mapping[str, Any]) -> str:
    """A Markdown page of what {name}.json holds, with a section for each part."""
    lines = [f"# {name}"]
    for title, one in content.items():
        where = one["machine"]
        place = f"{where.get('gpu', where['processor'])}, {where['threads']} threads, torch {where['torch']}"
        header = columns(one["rows"])
        lines += ["", f"## {title}", "", f"`{one['command']}` on {place}, commit {where['commit']}. {one['note']}", ""]
        lines += markdown(header, [[cell(row.get(column)) for column in header] for row in one["rows"]])
    return "\n".join(line.rstrip() for line in lines) + "\n"
