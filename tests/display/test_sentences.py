"""Numbers in words: never better than they are, and never a sign or a percentage that means nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inilora_kernels.display.sentences import duration_in_words, relative, run_in_words, share, times, worth_in_words

from .synthetic import one


@given(value=st.floats(0.0, 1.0, exclude_max=True))
def test_a_share_below_one_is_never_shown_as_all_of_it(value: float) -> None:
    shown = share(value)
    assert shown.endswith(" %")
    assert float(shown.removesuffix(" %")) < 100 or value > 1 - 1e-6


@given(error=st.floats(0.0, 1e9))
def test_errors_are_shares_up_to_ten_and_multiples_beyond(error: float) -> None:
    assert relative(error).endswith("×" if error >= 10 else " %")


@given(value=st.floats(1.0, 1e12))
def test_multiples_keep_three_digits(value: float) -> None:
    assert float(times(value).removesuffix("×").replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@given(shorter=st.floats(0.0, 1e7), factor=st.floats(1.0, 10.0))
def test_a_longer_time_is_never_said_to_be_shorter(shorter: float, factor: float) -> None:
    units = {"s": 1.0, "min": 60.0, "hours": 3600.0, "days": 86400.0}

    def said(seconds: float) -> float:
        words = duration_in_words(seconds)
        return 0.0 if words == "under a second" else float(words.split()[0]) * units[words.split()[1]]

    assert said(shorter) <= said(shorter * factor)


def test_a_run_is_named_by_what_was_chosen() -> None:
    assert run_in_words({"q": one(rank=8)}, {"method": "lora", "solver": None}) == "lora, rank 8, 1 matrix"
    two = {"q": one(rank=8), "v": one(rank=4)}
    assert run_in_words(two, {"method": "pissa", "solver": "exact"}) == "pissa by exact, ranks 4 to 8, 2 matrices"
    assert run_in_words(two, {}) == "factors, ranks 4 to 8, 2 matrices"


def test_what_is_kept_is_measured_against_what_the_rank_can_keep() -> None:
    assert (
        worth_in_words({"q": one(0.6, 0.5)}) == "BA keeps 40.0 % of the energy ‖W‖², 80.0 % of what the rank can keep"
    )
    assert "does not approximate W: ‖W − BA‖² is 2.00× ‖W‖²" in worth_in_words({"q": one(2.0, 0.5)})
