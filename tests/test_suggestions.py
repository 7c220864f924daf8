"""Names that are nearly right: refused or warned of, with the nearest valid one, wherever a name is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels import InitializationError, approximate, approximate_model
from inilora_kernels.kernels.gpu.gpus import gpu_named
from inilora_kernels.suggestions import some


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{layer}.attention.{name}" for layer in range(2) for name in ("query", "key", "value")]
    save_file({f"{name}.weight": torch.randn(12, 10, generator=generator) for name in names}, path)
    return path


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"target_modules": ["qurey", "value"]}, "query"),
        ({"target_modules": "query,value"}, "['query', 'value']"),
        ({"target_modules": ["quer"]}, "query"),
        ({"rank_pattern": {"valeu": 2}}, "value"),
        ({"rank_pattern": {"key": 2}}, "matches none of the 4 matrices"),
        ({"method": "inilora-alfa"}, "inilora-alpha"),
        ({"method": "PISSA"}, "pissa"),
        ({"solver": "krilov"}, "krylov"),
        ({"gauge": "nearst"}, "nearest"),
        ({"loss": "frobenious"}, "frobenius"),
        ({"backend": "tritn"}, "triton"),
    ],
)
def test_a_slip_is_refused_with_the_name_that_was_meant(model: Path, options: dict[str, Any], meant: str) -> None:
    with pytest.raises(InitializationError) as refused:
        approximate_model(model, **{"rank": 1, "steps": 0, "cache": False, "progress": False, **options})
    assert meant in str(refused.value)


def test_a_gpu_nearly_named() -> None:
    with pytest.raises(InitializationError, match='did you mean "rtx4090"'):
        gpu_named("rtx 409")


def test_a_device_that_is_not_here() -> None:
    assert not torch.cuda.is_available()
    for backend in ("auto", "reference", "triton"):
        with pytest.raises(InitializationError, match="finds no GPU here"):
            approximate(torch.eye(4), rank=1, steps=0, backend=backend, device="cuda")


def test_a_list_for_several_models_is_taken_with_a_warning(model: Path) -> None:
    with pytest.warns(UserWarning, match="'to_out' in target_modules selects nothing"):
        factors = approximate_model(
            model, rank=1, steps=0, target_modules=["value", "to_out"], cache=False, progress=False
        )
    assert len(factors) == 2


@pytest.mark.parametrize(("count", "shown"), [(0, ""), (1, "m0"), (2, "m0 and 1 more")])
def test_one_name_alone_has_no_zero_more(count: int, shown: str) -> None:
    assert some([f"m{place}" for place in range(count)], most=1) == shown
