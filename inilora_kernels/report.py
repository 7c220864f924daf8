"""How a result is shown to people: the table and the plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .errors import OptionError
from .factors import FactorSet
from .files import write_whole
from .init import METHODS

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# From this many modules on, each layer's name no longer fits under its bar.
_MOST_LABELS = 40


def table(factors: FactorSet) -> Table:
    """One row a matrix: shape, rank, loss, share of energy kept, excess over the optimum, steps; totals below."""
    certificates = [one.certificate for one in factors.values()]
    energy = math.fsum(certificate.energy for certificate in certificates)
    loss = math.fsum(certificate.loss for certificate in certificates)
    labels, pattern = _labels(list(factors))
    result = Table(title=f"{len(factors)} matrices by {factors.options['method']}: {pattern}", show_footer=True)
    worst = max(certificate.excess for certificate in certificates)
    result.add_column("module", "all", overflow="fold")
    result.add_column("out×in", justify="right")
    result.add_column("rank", justify="right")
    result.add_column("‖W − BA‖²", f"{loss:.5g}", justify="right")
    result.add_column("energy kept", f"{1 - loss / energy if energy else 1:.2%}", justify="right")
    result.add_column("excess", f"≤ {worst:.1e}", justify="right")
    result.add_column("steps", justify="right")
    for label, one in zip(labels, factors.values(), strict=True):
        certificate = one.certificate
        result.add_row(
            label,
            f"{one.B.shape[0]}×{one.A.shape[1]}",
            str(one.rank),
            f"{certificate.loss:.5g}",
            f"{certificate.kept:.2%}",
            f"{certificate.excess:.1e}",
            f"{certificate.steps:,}",
        )
    return result


def methods_table() -> Table:
    """One row an initialization: what `--method` and `--solver` take, formula, source, and the convention for all."""
    result = Table(
        title="Initializations (--method)",
        caption="W x + s(BA − B₀A₀) x at the start is W x for all; s = lora_alpha/r. d×k = out×in, B: d×r, A: r×k.",
    )
    result.add_column("method", no_wrap=True)
    result.add_column("start of B and A")
    result.add_column("solver, the default first")
    result.add_column("source")
    for name, method in METHODS.items():
        result.add_row(name, method.formula, ", ".join(method.solvers) or "none: random", method.source)
    return result


def methods_json() -> dict[str, Any]:
    """The table's content as JSON values."""
    return {
        name: {"formula": method.formula, "solvers": list(method.solvers), "source": method.source}
        for name, method in METHODS.items()
    }


def json_report(factors: FactorSet) -> dict[str, Any]:
    """The table's content, and the options, as JSON values."""
    return {
        "options": dict(factors.options),
        "modules": {
            name: {
                "shape": [one.B.shape[0], one.A.shape[1]],
                "rank": one.rank,
                "loss": one.certificate.loss,
                "optimum": one.certificate.optimum,
                "excess": one.certificate.excess,
                "energy": one.certificate.energy,
                "energy_kept": one.certificate.kept,
                "steps": one.certificate.steps,
                "source_sha256": one.source_sha256,
            }
            for name, one in factors.items()
        },
    }


def require_plot_path(path: Path) -> None:
    """Raise OptionError unless a plot can be drawn into such a file."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise OptionError(f"--plot {path}: the name must end in one of {', '.join(PLOT_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install 'inilora-kernels[plot]'") from error


def plot(factors: FactorSet, path: Path) -> None:
    """Draw the error by layer, ‖W−BA‖²/‖W‖² beside its least at this rank, and the convergence curves."""
    from matplotlib.figure import Figure

    names = list(factors)
    certificates = [factors[name].certificate for name in names]
    curves = {name: factors[name].history for name in names if len(factors[name].history) > 1}
    figure = Figure(figsize=(12, 5.2) if curves else (8, 5.2), layout="constrained")
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]

    places = range(len(names))
    shares = [100 * c.loss / c.energy if c.energy else 0.0 for c in certificates]
    least = [100 * c.optimum / c.energy if c.energy else 0.0 for c in certificates]
    bars = panels[0]
    kinds = [name.replace(":", ".").rsplit(".", 1)[-1] for name in names]
    palette = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kinds))}
    for kind, color in palette.items():
        mine = [i for i in places if kinds[i] == kind]
        bars.bar(mine, [shares[i] for i in mine], color=color, alpha=0.75, label=kind)
    bars.scatter(places, least, marker="_", s=90, color="black", label="least at this rank", zorder=3)
    bars.set_ylabel("error ‖W − BA‖² / ‖W‖² (%)")
    bars.set_title("Error by layer")
    if len(names) <= _MOST_LABELS:
        bars.set_xticks(list(places), _labels(names)[0], rotation=90, fontsize=7)
    else:
        bars.set_xlabel("matrix, in the model's order")
    bars.set_ylim(0, 1.15 * max(*shares, 1e-6))
    bars.legend(fontsize=8, loc="upper center", ncols=len(palette) + 1)
    bars.grid(axis="y", alpha=0.3)

    if curves:
        axes = panels[1]
        for name, history in curves.items():
            bound = factors[name].certificate
            excesses = [(loss - bound.optimum) / bound.optimum if bound.optimum else 0.0 for _, loss in history]
            points = [(step, e) for (step, _), e in zip(history, excesses, strict=True) if step > 0 and e > 0]
            kind = name.replace(":", ".").rsplit(".", 1)[-1]
            axes.plot(*zip(*points, strict=True), color=palette[kind], alpha=0.7, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("Adam step")
        axes.set_ylabel("excess f/f* − 1")
        axes.set_title("Convergence, a line a matrix")
        axes.grid(alpha=0.3)

    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    write_whole(path, picture.getvalue())


def _labels(names: Sequence[str]) -> tuple[list[str], str]:
    """What tells each name from the others, and the pattern they share.

    >>> _labels(["layer.0.self.query", "layer.1.self.query"])
    (['0', '1'], 'layer.*.self.query')
    """
    rows = [name.split(".") for name in names]
    if len(names) == 1 or len({len(row) for row in rows}) > 1:
        return list(names), "*"
    differs = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
    labels = [".".join(part for part, own in zip(row, differs, strict=True) if own) for row in rows]
    pattern = ".".join("*" if own else part for part, own in zip(rows[0], differs, strict=True))
    return labels, pattern
