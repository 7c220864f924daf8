"""The way over disk and back, on every architecture of the list; minutes in all."""

from __future__ import annotations

from pathlib import Path

import pytest

from .architectures import ALL, ARCHITECTURES, Architecture, round_trip

# What PEFT does not take, so that the exports refuse it before they write anything.
REFUSED = {
    ("DeepseekV3ForCausalLM", ALL): "parameters of the experts",
    ("MambaForCausalLM", ALL): "out_proj",
    ("MambaForCausalLM", str(["in_proj", "x_proj"])): "fused kernel",
    ("FalconH1ForCausalLM", ALL): "out_proj",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.title)
def test_start_training_convert_and_merge(architecture: Architecture, tmp_path: Path) -> None:
    result = round_trip(architecture, tmp_path)
    reason = REFUSED.get((architecture.name, str(architecture.targets)))
    if reason is not None:
        assert set(result.refused) == {"residual", "delta"}
        assert all(reason in message for message in result.refused.values())
        assert not (tmp_path / "residual").exists()
        assert not (tmp_path / "delta").exists()
        return
    assert not result.refused
    # Outputs in float32; R alone loses one rounding of each entry.
    assert {step: error for step, error in result.errors.items() if not error < 1e-5} == {}
    assert len(result.errors) == 6


def test_the_page_has_every_architecture() -> None:
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    assert len(ARCHITECTURES) >= 35
    assert [one.title for one in ARCHITECTURES if f"| {one.title} |" not in page] == []
