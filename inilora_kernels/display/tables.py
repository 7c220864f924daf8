"""How a result is shown to people: the table and the plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import OptionError
from ..factors import Factors
from ..storage.atomic import write_whole

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# From this many modules on, each layer's name no longer fits under its bar.
_MOST_LABELS = 40
# Singular values drawn as a row of bars in the terminal, at most.
_SPARKS = 8


def table(factors: Mapping[str, Factors], options: Mapping[str, Any]) -> Table:
    """One row a matrix: shape, rank, loss, share of energy kept, excess over the optimum, steps; totals below."""
    certificates = [one.certificate for one in factors.values()]
    energy = math.fsum(certificate.energy for certificate in certificates)
    loss = math.fsum(certificate.loss for certificate in certificates)
    labels, pattern = _labels(list(factors))
    result = Table(title=f"{len(factors)} matrices by {options['method']}: {pattern}", show_footer=True)
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


def spectrum_table(factors: Mapping[str, Factors]) -> Table | None:
    """One row a matrix: its leading singular values, and the energy that the best approximation of each rank keeps.

    None where the file carries no singular values.
    """
    known = {name: one for name, one in factors.items() if one.singular_values}
    if not known:
        return None
    labels = dict(zip(factors, _labels(list(factors))[0], strict=True))
    most = max(len(one.singular_values) for one in known.values())
    ranks = [rank for rank in (1, 4, 8, 16, 32) if rank <= most]
    result = Table(title="Singular values σ, and the share of energy a rank can keep")
    result.add_column("module", overflow="fold")
    result.add_column("σ₁, …", no_wrap=True)
    for name in ("σ₁", "σ at r", "next"):
        result.add_column(name, justify="right", no_wrap=True)
    for rank in ranks:
        result.add_column(f"r={rank}", justify="right", no_wrap=True)
    for name, one in known.items():
        values, energy = one.singular_values, one.certificate.energy
        shares = [math.fsum(value**2 for value in values[:rank]) / energy if energy else 1.0 for rank in ranks]
        result.add_row(
            labels[name],
            _sparkline(values[:_SPARKS]),
            *(f"{values[place]:.3g}" if place < len(values) else "" for place in (0, one.rank - 1, one.rank)),
            *(f"{share:.0%}" if rank <= len(values) else "" for rank, share in zip(ranks, shares, strict=True)),
        )
    return result


def _sparkline(values: Sequence[float]) -> str:
    """Heights in eighths of the first value.

    >>> _sparkline([8.0, 4.0, 1.0])
    '█▄▁'
    """
    highest = values[0] or 1.0
    return "".join("▁▂▃▄▅▆▇█"[max(0, min(7, math.ceil(8 * value / highest) - 1))] for value in values)


def json_report(factors: Mapping[str, Factors], options: Mapping[str, Any]) -> dict[str, Any]:
    """The table's content, and the options, as JSON values."""
    return {
        "options": dict(options),
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
                "singular_values": list(one.singular_values),
                "source_sha256": one.source_sha256,
            }
            for name, one in factors.items()
        },
    }


def truncation_table(errors: Mapping[str, float], rank: int) -> Table:
    """One row a module: the relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ of an update recompressed to a rank; the worst below."""
    labels, pattern = _labels(list(errors))
    title = f"{len(errors)} updates recompressed to rank {rank}: {pattern}"
    result = Table(title=title, show_footer=True, min_width=len(title))
    result.add_column("module", "worst", overflow="fold")
    result.add_column("‖ΔW − ΔW'‖ / ‖ΔW‖", f"{max(errors.values()):.2%}", justify="right")
    for label, error in zip(labels, errors.values(), strict=True):
        result.add_row(label, f"{error:.2%}")
    return result


def require_plot_path(path: Path) -> None:
    """Raise OptionError unless a plot can be drawn into such a file."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise OptionError(f"--plot {path}: the name must end in one of {', '.join(PLOT_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install 'inilora-kernels[plot]'") from error


def plot(factors: Mapping[str, Factors], path: Path) -> None:
    """Draw the error by layer, ‖W−BA‖²/‖W‖² beside its least at this rank, the spectra and the convergence curves."""
    from matplotlib.figure import Figure

    names = list(factors)
    certificates = [factors[name].certificate for name in names]
    curves = {name: points for name in names if len(points := _positive_excesses(factors[name])) > 1}
    spectra = {name: values for name in names if len(values := factors[name].singular_values) > 1 and values[0] > 0}
    count = 1 + bool(spectra) + bool(curves)
    figure = Figure(figsize=(2.5 + 5 * count, 5.2), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])

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

    if spectra:
        axes = panels[1]
        for name, values in spectra.items():
            kind = name.replace(":", ".").rsplit(".", 1)[-1]
            orders = range(1, len(values) + 1)
            axes.plot(orders, values, color=palette[kind], alpha=0.6, linewidth=1)
            rank = min(factors[name].rank, len(values))
            axes.plot(rank, values[rank - 1], marker="o", markersize=4, color=palette[kind])
        axes.set_yscale("log")
        axes.set_xlabel("i, up to where the singular values are known")
        axes.set_ylabel("singular value σᵢ of W")
        axes.set_title("Spectrum, a line a matrix; ● at the rank")
        axes.grid(alpha=0.3)

    if curves:
        axes = panels[-1]
        for name, points in curves.items():
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


def _positive_excesses(one: Factors) -> list[tuple[int, float]]:
    """(step, excess) of the run, as far as a logarithmic axis can show them."""
    samples = ((step, replace(one.certificate, loss=loss).excess) for step, loss in one.history)
    return [(step, excess) for step, excess in samples if step > 0 and 0 < excess < math.inf]


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
