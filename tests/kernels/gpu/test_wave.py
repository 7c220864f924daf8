"""What a wave holds between launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from .cases import check_products, make, make_wave, relative, small_tiles
from .interpreter import interpreted


def test_products_read_a_transposed_or_sliced_weight() -> None:
    base, problems = make([(40, 60)], [8], torch.bfloat16)
    for W in (base[0], base[0].T.contiguous().T, torch.cat([base[0], base[0]], dim=1)[:, :60]):
        with interpreted():
            wave = make_wave([W], problems, small_tiles(8))
            wave.multiply()
        check_products(wave, base, problems)


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_gram_matrices_are_summed_from_their_shares(rank: int) -> None:
    weights, problems = make([(70, 45), (33, 100)], [rank, rank], torch.float32)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank))
        wave.advance(2)
        A_before = [wave.pair(index)[0].clone() for index in range(2)]
        wave.multiply()
    for index, place in enumerate(wave.layout.places):
        padded = wave.layout.tiles.rank
        gram = wave.grams[place.A_gram_offset :][: padded * padded].view(padded, padded)
        expected = A_before[index].double() @ A_before[index].double().T
        assert relative(gram[:rank, :rank], expected) < 1e-6
        assert gram[rank:].abs().sum() == 0
        assert gram[:, rank:].abs().sum() == 0
