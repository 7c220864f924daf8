"""Names: one prefix for all, in time that grows with their number and not with its square."""

from __future__ import annotations

import pytest

from inilora_kernels.errors import TargetError
from inilora_kernels.model.names import match_names, shortest_endings


class Counted(str):
    """A name that counts how often it is looked at."""

    looks = 0

    def __new__(cls, text: str) -> Counted:
        return super().__new__(cls, text)

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()

    def startswith(self, *args: object) -> bool:  # type: ignore[override]
        Counted.looks += 1
        return super().startswith(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "new"), [("", ""), ("", "bert."), ("base_model.model.", "")])
def test_one_prefix_for_all(old: str, new: str) -> None:
    wanted = [f"{old}layer.{i}.q" for i in range(3)]
    available = [f"{new}layer.{i}.{kind}" for i in range(4) for kind in ("q", "k")]
    assert match_names(wanted, available, "here") == {f"{old}layer.{i}.q": f"{new}layer.{i}.q" for i in range(3)}


def test_its_own_name_goes_before_a_prefix() -> None:
    assert match_names(["q"], {"q", "a.q", "b.q"}, "here") == {"q": "q"}


def test_what_is_missing_is_named() -> None:
    with pytest.raises(TargetError, match=r"no linear module l\.1\.q.*there are l\.0\.q, l\.2\.q\. Use the factors"):
        match_names(["l.0.q", "l.1.q"], ["l.0.q", "l.2.q"], "here")
    with pytest.raises(TargetError, match="none at all"):
        match_names(["l.0.q"], [], "here")


def test_two_towers_are_ambiguous() -> None:
    """open_clip and CLIP: text and vision tower have the same module names."""
    with pytest.raises(TargetError, match=r"layer\.0\.q fits text\.layer\.0\.q and vision\.layer\.0\.q"):
        match_names(["layer.0.q"], ["text.layer.0.q", "vision.layer.0.q"], "here")


@pytest.mark.parametrize("count", [2_000, 40_000])
def test_each_name_is_looked_at_a_few_times(count: int) -> None:
    """A model with 256 experts a layer, all-linear, has 44,544 matrices; each was compared with every other."""
    wanted = [Counted(f"l.{i}.w1") for i in range(count)]
    available = [Counted(f"model.l.{i}.w1") for i in range(count)]
    Counted.looks = 0
    assert len(match_names(wanted, available, "here")) == count
    assert Counted.looks < 10 * count


def test_shortest_endings_select_nothing_else() -> None:
    names = [f"layer.{i}.{block}.dense" for i in range(2) for block in ("output", "attention.output")] + [
        "pooler.dense"
    ]
    assert shortest_endings({name for name in names if "attention" in name}, names) == ["attention.output.dense"]
    assert shortest_endings({names[0]}, names) == ["0.output.dense"]
    assert shortest_endings({"a.b.c.d"}, ["a.b.c.d", "x.b.c.d"]) is None
    assert shortest_endings(set(names), names) == ["dense"]
