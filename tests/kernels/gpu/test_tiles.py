"""Tiles for every target and rank."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from inilora_kernels.kernels.gpu.tiles import RANKS, padded_rank, tiles

from .compiled import TARGETS


def test_every_rank_has_a_padded_rank() -> None:
    assert [padded_rank(rank) for rank in (1, 8, 9, 128)] == [8, 8, 16, 128]
    assert RANKS == (8, 16, 32, 64, 128)


def test_adam_does_not_depend_on_the_weights_dtype() -> None:
    """Hence one dtype stands for all in test_compile.py: same tiles, same arguments."""
    for target in TARGETS:
        for rank in RANKS:
            four = tiles(target, 4, rank)
            two = tiles(target, 2, four.rank)
            assert (two.rank, two.block, two.precision) == (four.rank, four.block, four.precision)
