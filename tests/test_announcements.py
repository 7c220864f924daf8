"""What a run says of its cost, of the cache, and when it is cut off."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels import approximate_model, estimate
from inilora_kernels.storage import cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"l.{i}.{name}_proj.weight": torch.randn(9, 7, generator=generator) for i in range(6) for name in "qv"}, path
    )
    return path


def test_approximate_model_warns_once_of_a_long_run(
    model: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(estimate, "WORTH_SAYING", 1e-6)
    approximate_model(model, rank=1, steps=5, cache=False, progress=False)
    (said,) = [str(one.message) for one in recwarn if "an estimate" in str(one.message)]
    assert "5 Adam steps, 12 matrices" in said


def test_what_the_cache_has_is_said_and_what_an_interrupted_run_keeps(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_cache: Path
) -> None:
    keep, kept = cache.keep, []

    def interrupted_after_nine(*entry: object) -> None:
        if len(kept) == 9:
            raise KeyboardInterrupt
        keep(*entry)  # type: ignore[arg-type]
        kept.append(entry)

    monkeypatch.setattr(cache, "keep", interrupted_after_nine)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped: 9 of 12 matrices are finished and kept in .*cache; run it"):
        approximate_model(model, rank=1, solver="krylov", progress=False)
    monkeypatch.setattr(cache, "keep", keep)
    with caplog.at_level(logging.INFO, logger="inilora_kernels"):
        approximate_model(model, rank=1, solver="krylov", progress=False)
    assert "9 of 12 matrices found in the cache" in caplog.messages
    assert "solving 3 matrices" in caplog.messages
