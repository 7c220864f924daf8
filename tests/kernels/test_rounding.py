from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inilora_kernels.kernels.rounding import round_up


@given(value=st.integers(0, 10**12), multiple=st.integers(1, 512))
def test_the_least_multiple_from_above(value: int, multiple: int) -> None:
    found = round_up(value, multiple)
    assert found % multiple == 0
    assert value <= found < value + multiple
