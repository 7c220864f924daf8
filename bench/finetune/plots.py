"""Plots from rows, mean and standard deviation over the seeds: scores over a setting, training losses, and sweeps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inilora_kernels.storage.atomic import write_whole

from .comparison import mean_interval
from .rows import Row
from .run import Run
from .table import Cell, Table

LABELS = {
    "steps": "steps of approximation",
    "lr": "learning rate",
    "init_std": "standard deviation of the start",
    "rank": "rank r",
    "train_size": "training examples",
}
Points = dict[str, dict[float, list[float]]]


def draw(table: Table, cells: Sequence[Cell], rows: Mapping[Run, Row], path: Path) -> None:
    """The plot that the table's `show` names, as PNG; none where it names none."""
    plot = table.show.get("plot")
    if plot is None:
        return
    finished = [cell for cell in cells if cell.run in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    KINDS[plot["kind"]](axes, finished, rows, plot)
    axes.set_title(table.title)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getvalue())


def scores_over(axes: Axes, cells: Sequence[Cell], rows: Mapping[Run, Row], plot: Mapping[str, Any]) -> None:
    """A line a system: `score` on the test part over the setting `x`."""
    points: Points = {}
    score = plot.get("score")
    for cell in cells:
        if not cell.sweep:
            scores = rows[cell.run]["scores"]
            value = scores[score] if score else next(iter(scores.values()))
            points.setdefault(_label(cell, cells), {}).setdefault(_x(cell, plot["x"]), []).append(value)
    _lines(axes, points, plot["x"])
    axes.set_ylabel(plot.get("label", score or "score") + " (× 100), mean ± s.d. over seeds")


def systems_as_bars(axes: Axes, cells: Sequence[Cell], rows: Mapping[Run, Row], plot: Mapping[str, Any]) -> None:
    """A dot a seed and a bar at the mean for each system."""
    points: dict[str, list[float]] = {}
    for cell in cells:
        if not cell.sweep:
            points.setdefault(cell.system, []).append(100 * rows[cell.run]["scores"][plot["score"]])
    for place, (system, values) in enumerate(points.items()):
        finite = [value for value in values if math.isfinite(value)]
        axes.scatter([place] * len(finite), finite, color="C0", alpha=0.5, s=18, zorder=3)
        if finite:
            axes.plot([place - 0.3, place + 0.3], [fmean(finite)] * 2, color="C3", linewidth=2)
        points[system] = finite
    axes.set_xticks(range(len(points)), list(points), rotation=40, ha="right", fontsize=8)
    axes.set_ylabel(plot.get("label", plot["score"]) + " (× 100), a dot a seed, line: mean")


def sweep(axes: Axes, cells: Sequence[Cell], rows: Mapping[Run, Row], plot: Mapping[str, Any]) -> None:
    """A line a system: the validation score over the swept learning rates."""
    points: Points = {}
    for cell in cells:
        if cell.sweep:
            value = rows[cell.run]["validation_score"]
            points.setdefault(cell.system, {}).setdefault(cell.run.lr, []).append(value)
    _lines(axes, points, "lr")
    axes.set_ylabel(plot.get("label", "validation score") + " (× 100), mean ± s.d. over seeds")


def over_rates(axes: Axes, cells: Sequence[Cell], rows: Mapping[Run, Row], plot: Mapping[str, Any]) -> None:
    """A line a system: the validation loss over the learning rates, mean over the seeds that chose among them.

    The filled marks are seeds that no choice has seen, at the best and at the common rate, with the 95 % interval of
    their mean. The picture ends at `most`, and a line that goes beyond leaves it.
    """
    systems = list(dict.fromkeys(cell.system for cell in cells))
    for place, system in enumerate(systems):
        style = {**_style(place), "linestyle": "-"}
        own = [cell for cell in cells if cell.system == system]
        swept = _validation_losses((cell for cell in own if cell.sweep), rows)
        fresh = _validation_losses((cell for cell in own if not cell.sweep), rows)
        line = {rate: fmean(values) for rate, values in {**swept, **fresh}.items()}
        line |= {rate: fmean(values) for rate, values in swept.items()}
        finite = sorted(rate for rate in line if math.isfinite(line[rate]))
        # An open mark only where seeds chose: the common rate can lie outside a system's sweep.
        chose_at = [index for index, rate in enumerate(finite) if rate in swept]
        losses = [line[rate] for rate in finite]
        axes.plot(finite, losses, label=system, markerfacecolor="white", markevery=chose_at, **style)
        for rate, values in fresh.items():
            # Side by side, where several systems share a rate.
            at = rate * 1.025 ** (place - len(systems) / 2)
            low, high = mean_interval(values) if len(values) > 1 else (values[0], values[0])
            error = [[fmean(values) - low], [high - fmean(values)]]
            axes.errorbar([at], [fmean(values)], yerr=error, capsize=3, markersize=7, **{**style, "linestyle": ""})
    rates = sorted({cell.run.lr for cell in cells})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(top=plot.get("most"))
    axes.set_xlabel(LABELS["lr"])
    axes.set_ylabel(plot.get("label", "validation loss"))
    chose = len({cell.run.seed for cell in cells if cell.sweep})
    marks = f"open: mean of the {chose} seeds that chose the rate; filled: other seeds, 95 % interval of their mean"
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, title=marks, title_fontsize=8)


def _validation_losses(cells: Iterable[Cell], rows: Mapping[Run, Row]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for cell in cells:
        loss = rows[cell.run]["metrics"]["validation"]["loss"]
        found.setdefault(cell.run.lr, []).append(loss if math.isfinite(loss) else math.inf)
    return found


def training_loss(axes: Axes, cells: Sequence[Cell], rows: Mapping[Run, Row], plot: Mapping[str, Any]) -> None:
    """A line a system and rank: the training loss over the steps, mean over seeds."""
    curves: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        if not cell.sweep:
            for step, loss in rows[cell.run]["training_loss"]:
                curves.setdefault(_label(cell, cells), {}).setdefault(step, []).append(loss)
    for place, (label, curve) in enumerate(curves.items()):
        axes.plot(list(curve), [fmean(values) for values in curve.values()], label=label, **_style(place))
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss, mean over seeds")
    axes.legend(fontsize=8)


Kind = Callable[[Axes, Sequence[Cell], Mapping[Run, Row], Mapping[str, Any]], None]
KINDS: dict[str, Kind] = {
    "scores": scores_over,
    "systems": systems_as_bars,
    "sweep": sweep,
    "rates": over_rates,
    "loss": training_loss,
}


def _lines(axes: Axes, points: Points, x: str) -> None:
    for place, (label, line) in enumerate(points.items()):
        places = sorted(line)
        values = [[100 * value for value in line[at] if math.isfinite(value)] for at in places]
        kept = [(at, fmean(v), stdev(v) if len(v) > 1 else 0.0) for at, v in zip(places, values, strict=True) if v]
        if kept:
            xs, means, deviations = zip(*kept, strict=True)
            axes.errorbar(xs, means, yerr=deviations, label=label, capsize=3, **_style(place))
    positive = all(at > 0 for line in points.values() for at in line)
    axes.set_xscale("log" if positive else "symlog")
    axes.set_xlabel(LABELS.get(x, x))
    axes.legend(fontsize=8)


def _label(cell: Cell, cells: Sequence[Cell]) -> str:
    """The system, and the rank where there are several."""
    several = len({other.run.rank for other in cells}) > 1
    return f"{cell.system}, r = {cell.run.rank}" if several else cell.system


def _x(cell: Cell, name: str) -> float:
    return float(getattr(cell.run, name))


def _style(place: int) -> dict[str, Any]:
    """A colour of ten, and from the eleventh line on another dash."""
    return {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3], "marker": "os^Dv"[place % 5]}
