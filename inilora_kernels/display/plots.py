"""Figures of a result: the error by layer, the spectra and the convergence, with one line for each kind of matrix."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..factors import Factors
from .names import places_of
from .sentences import run_in_words, worth_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Lines beyond this many can't be told apart: the error becomes a map of kinds and layers, the other panels one band.
MOST_LINES = 7
# Values whose largest is this many times their smallest are drawn on a logarithmic axis.
DECADES = 30.0
ALL = "all kinds"


def require_plot_path(path: Path) -> None:
    """Raise OptionError unless a plot can be written to a file of this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path}: the name must end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install 'inilora-kernels[plot]'") from error


@dataclass(frozen=True)
class Matrix:
    """One matrix in the figure. kind: its line; layer: its position on the line."""

    kind: str
    layer: int
    factors: Factors

    @property
    def error(self) -> float:
        """||W − BA||² / ||W||², in percent."""
        certificate = self.factors.certificate
        return 100 * certificate.loss / certificate.energy if certificate.energy else 0.0

    @property
    def least(self) -> float:
        """f* / ||W||², in percent: the least error at this rank."""
        certificate = self.factors.certificate
        return 100 * certificate.optimum / certificate.energy if certificate.energy else 0.0


def picture(factors: Mapping[str, Factors], options: Mapping[str, Any], model: str, suffix: str) -> bytes:
    """The error by layer, compared with the least at this rank, the spectra and the convergence, as a file's content.

    options: the run's, as the factor file records them. model: its name for the title. suffix: one of SUFFIXES.
    """
    content = io.BytesIO()
    draw(factors, options, model).savefig(content, format=suffix[1:].lower(), dpi=150)
    return content.getvalue()


def draw(factors: Mapping[str, Factors], options: Mapping[str, Any], model: str) -> Figure:
    """The figure itself. A panel is left out if the factors hold no data for it.

    Raises OptionError for factors without certificates, as of an authors' folder without its model.
    """
    from matplotlib.figure import Figure

    if any(math.isnan(one.certificate.loss + one.certificate.energy) for one in factors.values()):
        raise OptionError("--plot: factors without their model have no errors to draw; give the model as --base")
    places = places_of(list(factors))
    matrices = [Matrix(place.kind, place.layer, one) for place, one in zip(places, factors.values(), strict=True)]
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))
    many = len(kinds) > MOST_LINES
    colors = {ALL: "C0"} if many else {kind: f"C{i}" for i, kind in enumerate(kinds)}
    lines = {kind: [matrix for matrix in matrices if many or matrix.kind == kind] for kind in colors}

    panels = [_draw_error_map if many else _draw_errors]
    if any(_spectrum(matrix) for matrix in matrices):
        panels.append(_draw_spectra)
    if any(_excesses(matrix.factors) for matrix in matrices):
        panels.append(_draw_convergence)
    # Two panels across at most: on a page, a third would make the letters too small to read.
    tall, across = len(panels) == 3, min(len(panels), 2)
    figure = Figure(figsize=(1.5 + 4.6 * across, 8.4 if tall else 5.0), layout="constrained")
    grid = figure.add_gridspec(2 if tall else 1, across)
    cells = [grid[0, :], grid[1, 0], grid[1, 1]] if tall else [grid[0, place] for place in range(across)]
    axes = [figure.add_subplot(cell) for cell in cells]
    for panel, one in zip(panels, axes, strict=True):
        panel(one, {kind: [m for m in matrices if m.kind == kind] for kind in kinds} if many else lines, colors)
    title = f"{model}: {run_in_words(factors, options)}\n{worth_in_words(factors)}"
    figure.suptitle(title, fontsize=10.5, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8.5)
        for text in legend.get_texts():  # a name with $ in it is no formula
            text.set_parse_math(False)
    return figure


Lines = Mapping[str, Sequence[Matrix]]


def _draw_errors(axes: Axes, lines: Lines, colors: Mapping[str, str]) -> None:
    """A line for each kind; where a layer has several matrices of a kind, their median and middle half."""
    errors = [matrix.error for mine in lines.values() for matrix in mine]
    least = [matrix.least for mine in lines.values() for matrix in mine]
    together = all(math.isclose(error, bound, rel_tol=5e-3) for error, bound in zip(errors, least, strict=True))
    logarithmic = _spans_decades([*errors, *least])
    for kind, mine in lines.items():
        _band(axes, _by_layer(mine, "error"), colors[kind], kind, marked=True)
        if not together:
            bounds = _by_layer(mine, "least")
            axes.plot(
                list(bounds),
                [statistics.median(values) for values in bounds.values()],
                color=colors[kind],
                linestyle=(0, (2, 2)),
                linewidth=1,
            )
    if not together:
        axes.plot([], [], color="0.4", linestyle=(0, (2, 2)), linewidth=1, label="the least at this rank")
    _scale(axes, logarithmic, [*errors, *least])
    _whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("‖W − BA‖² / ‖W‖²")
    axes.set_title("Error by layer, the least at this rank" if together else "Error by layer", fontsize=10)
    axes.grid(alpha=0.25)


def _draw_error_map(axes: Axes, lines: Lines, colors: Mapping[str, str]) -> None:
    """Kinds down, layers across, the error as a color: for more kinds than lines can show."""
    from matplotlib.colors import LogNorm

    layers = sorted({matrix.layer for mine in lines.values() for matrix in mine})
    cells = [
        [statistics.median(values) if (values := _by_layer(mine, "error").get(layer)) else math.nan for layer in layers]
        for mine in lines.values()
    ]
    found = [cell for row in cells for cell in row if not math.isnan(cell)]
    norm = LogNorm(min(found), max(found)) if _spans_decades(found) else None
    image = axes.pcolormesh(range(len(layers) + 1), range(len(cells) + 1), cells, norm=norm, cmap="viridis")
    axes.invert_yaxis()
    axes.set_yticks([place + 0.5 for place in range(len(lines))], list(lines), fontsize=7, parse_math=False)
    step = max(1, math.ceil(len(layers) / 12))
    axes.set_xticks([place + 0.5 for place in range(0, len(layers), step)], [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_title("Error ‖W − BA‖² / ‖W‖²", fontsize=10)
    axes.figure.colorbar(image, ax=axes, format=_percent, pad=0.02)


def _draw_spectra(axes: Axes, lines: Lines, colors: Mapping[str, str]) -> None:
    """The median over a kind's matrices and their middle half, as far as all of them are known."""
    from matplotlib.ticker import FuncFormatter

    for kind, color in colors.items():
        chosen = [m for mine in lines.values() for m in mine] if kind == ALL else lines[kind]
        spectra = [values for matrix in chosen if (values := _spectrum(matrix))]
        known = min((len(values) for values in spectra), default=0)
        _band(axes, {order + 1: [values[order] for values in spectra] for order in range(known)}, color, kind)
    ranks = {matrix.factors.rank for mine in lines.values() for matrix in mine}
    if len(ranks) == 1:
        rank = ranks.pop()
        axes.axvline(rank, color="0.4", linewidth=1, linestyle=":")
        axes.annotate(
            f"rank {rank}", (rank, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", fontsize=8, color="0.3",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(_plain_where_rare))
    _whole_numbers(axes)
    axes.set_xlabel("i, as far as the singular values are known")
    axes.set_ylabel("singular value σᵢ of W")
    axes.set_title("Spectrum: median and middle half", fontsize=10)
    axes.grid(alpha=0.25, which="both")


def _draw_convergence(axes: Axes, lines: Lines, colors: Mapping[str, str]) -> None:
    """The median over a kind's matrices and their middle half."""
    for kind, color in colors.items():
        chosen = [m for mine in lines.values() for m in mine] if kind == ALL else lines[kind]
        points: dict[int, list[float]] = {}
        for matrix in chosen:
            for step, excess in _excesses(matrix.factors):
                points.setdefault(step, []).append(excess)
        _band(axes, dict(sorted(points.items())), color, kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Adam step")
    axes.set_ylabel("excess f/f* − 1")
    axes.set_title("Convergence: median and middle half", fontsize=10)
    axes.grid(alpha=0.25)


def _band(axes: Axes, points: Mapping[int, Sequence[float]], color: str, label: str, *, marked: bool = False) -> None:
    """A line of medians in the band that holds the middle half of the values."""
    if not points:
        return
    at = list(points)
    few = marked and len(at) <= 16
    axes.plot(
        at, [statistics.median(values) for values in points.values()],
        color=color, linewidth=1.4, label=label, marker="o" if few else None, markersize=3.5,
    )  # fmt: skip
    if any(len(values) > 1 for values in points.values()):
        low, high = zip(*(_quartiles(values) for values in points.values()), strict=True)
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _by_layer(matrices: Sequence[Matrix], value: str) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.layer):
        values.setdefault(matrix.layer, []).append(getattr(matrix, value))
    return values


def _spans_decades(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return len(positive) == len(values) > 0 and max(positive) > DECADES * min(positive)


def _scale(axes: Axes, logarithmic: bool, values: Sequence[float]) -> None:
    """A linear axis from zero, or decades; labels in percent, or multiples from tenfold on."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.12 * max([*values, 1e-6]))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))


def _percent(value: float, place: object = None) -> str:
    """A share of ||W||²: 85 %, or 252× where that is easier to read.

    >>> _percent(85.0), _percent(25_200.0), _percent(0.001)
    ('85 %', '252×', '0.001 %')
    """
    return f"{value / 100:,.4g}×" if value >= 1000 else f"{value:.3g} %"


def _plain(value: float, place: object = None) -> str:
    return f"{value:g}"


def _plain_where_rare(value: float, place: object = None) -> str:
    """Label 2 and 5 between the decades; all nine labels would overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _spectrum(matrix: Matrix) -> Sequence[float]:
    values = matrix.factors.singular_values
    return values if len(values) > 1 and values[0] > 0 else ()


def _excesses(one: Factors) -> list[tuple[int, float]]:
    """(step, excess) of the run, as far as a logarithmic axis can show them; none if that is too few for a curve."""
    samples = ((step, replace(one.certificate, loss=loss).excess) for step, loss in one.history)
    points = [(step, excess) for step, excess in samples if step > 0 and 0 < excess < math.inf]
    return points if len(points) > 1 else []
