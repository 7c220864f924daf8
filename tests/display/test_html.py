"""What a notebook shows."""

from __future__ import annotations

from inilora_kernels import FactorSet


def test_a_notebook_shows_the_table(minilm_factors: FactorSet) -> None:
    shown = minilm_factors._repr_html_()
    assert shown.startswith("<pre")
    assert "encoder.layer.*.attention.self.*" in shown
    assert "384×384" in shown
