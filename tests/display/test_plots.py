"""The figures of small and large results: how many lines, on which axes, under which title."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from inilora_kernels.display.plots import MOST_LINES, draw, picture
from inilora_kernels.errors import OptionError
from inilora_kernels.factors import Certificate

from .synthetic import SEVEN, all_linear, one

OPTIONS = {"method": "inilora", "solver": "adam"}


def test_210_matrices_are_seven_lines_and_the_legend_stays_in_the_figure() -> None:
    figure = draw(all_linear(curve=True), OPTIONS, "SmolLM2")
    errors, spectra, convergence = figure.axes
    assert [line.get_label() for line in errors.lines] == list(SEVEN)
    assert len(convergence.lines) == 7
    assert len(spectra.lines) == 8  # and the rank
    figure.canvas.draw()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert "SmolLM2: inilora by adam, rank 8, 210 matrices" in figure.get_suptitle()
    assert "BA keeps 15.0 % of the energy" in figure.get_suptitle()


def test_decades_get_a_logarithmic_axis_and_the_least_a_line_of_its_own() -> None:
    (errors, _) = draw(all_linear(252.0, 0.6), {"method": "inilora-alpha"}, "model").axes
    assert errors.get_yscale() == "log"
    assert len(errors.lines) == 7 + 7 + 1
    assert "252×" in [errors.yaxis.get_major_formatter()(25_200, None)]
    (errors, _) = draw(all_linear(), OPTIONS, "model").axes
    assert errors.get_yscale() == "linear"


def test_more_kinds_than_colors_are_a_map() -> None:
    factors = {f"h.{layer}.kind{kind}": one() for layer in range(4) for kind in range(MOST_LINES + 3)}
    figure = draw(factors, OPTIONS, "model")
    assert len(figure.axes[0].collections) == 1
    assert len(figure.axes[0].get_yticklabels()) == MOST_LINES + 3
    assert len(figure.axes[1].lines) == 2  # all kinds as one, and the rank


def test_one_matrix_and_a_matrix_of_zeros_are_drawn() -> None:
    draw({"matrix 0": one()}, {}, "model").canvas.draw()
    draw({"h.0.q": one(0.0, 0.0), "h.0.v": one(0.0, 0.0)}, OPTIONS, "model").canvas.draw()


def test_factors_without_their_model_are_not_drawn() -> None:
    unknown = replace(one(), certificate=Certificate(math.nan, math.nan, math.nan, 0))
    with pytest.raises(OptionError, match="give the model as --base"):
        draw({"h.0.q": unknown}, OPTIONS, "authors")


def test_no_more_than_two_panels_are_side_by_side() -> None:
    figure = draw(all_linear(curve=True), OPTIONS, "SmolLM2")
    figure.canvas.draw()
    errors, spectra, convergence = (axes.get_position() for axes in figure.axes)
    assert errors.y0 > max(spectra.y1, convergence.y1)
    assert spectra.x1 < convergence.x0


def test_a_name_with_dollars_is_no_formula() -> None:
    few = {f"a$b_$c.{layer}.x$\\foo$": one() for layer in range(2)} | {f"a$b_$c.{layer}.y": one() for layer in range(2)}
    many = {f"h.{layer}.$x_${kind}": one() for layer in range(2) for kind in range(MOST_LINES + 3)}
    for factors in (few, many):
        assert picture(factors, OPTIONS, "a$b_$c", ".svg")
