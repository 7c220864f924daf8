"""Scripts set torch's default dtype and device for their models; the factors are the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inilora_kernels import Factors, approximate, approximate_model, attach, export_residual
from inilora_kernels.torch_defaults import created_on_the_cpu


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


RUNS: list[dict[str, Any]] = [
    {"solver": "krylov"},
    {"solver": "adam", "steps": 20},
    {"solver": "adam", "steps": 5, "backend": "reference"},
    {"method": "lora"},
    {"method": "milora"},
    {"method": "inilora-beta-uniform"},
]


def both(options: dict[str, Any], path: Path) -> list[Factors]:
    W = torch.randn(60, 40, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    from_file = approximate_model(path, 4, target_modules=["q"], cache=False, progress=False, **options)
    return [approximate(W, 4, **options), *from_file.values()]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_the_callers_defaults_change_no_bit(options: dict[str, Any], tmp_path: Path, defaults: None) -> None:
    """They crashed Adam, changed the last bits of the direct solver's and made float64 factors."""
    save_file({"layers.0.q.weight": torch.arange(1200.0).view(40, 30).sin()}, tmp_path / "model.safetensors")
    expected = both(options, tmp_path)
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        for one, same in zip(expected, both(options, tmp_path), strict=True):
            assert (same.A.dtype, same.A.device.type) == (torch.float32, "cpu")
            assert torch.equal(one.A, same.A)
            assert torch.equal(one.B, same.B)
            assert one.certificate == same.certificate


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float32, "meta")])
def test_neither_do_they_change_an_adapter(dtype: torch.dtype, device: str, tmp_path: Path, defaults: None) -> None:
    save_file({"c_attn.weight": torch.arange(1080.0).view(18, 60).sin()}, tmp_path / "model.safetensors")
    factors = approximate_model(tmp_path, 4, target_modules=["c_attn"], cache=False, progress=False, solver="krylov")
    x = torch.arange(120.0).view(2, 60).cos()
    outputs, residuals = [], []
    for place in ("as usual", "with defaults"):
        model = nn.ModuleDict({"c_attn": nn.Linear(60, 18, bias=False, device="cpu", dtype=torch.float32)})
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))
        attach(model, factors)
        outputs.append(model["c_attn"](x))
        export_residual(tmp_path, factors, tmp_path / place)
        residuals.append(load_file(next((tmp_path / place).glob("base/*.safetensors")))["c_attn.weight"])
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
    assert torch.equal(residuals[0], residuals[1])
    assert outputs[1].device.type == "cpu"


def test_the_callers_device_is_the_callers_again_afterwards(defaults: None) -> None:
    torch.set_default_device("meta")
    with created_on_the_cpu():
        assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(1).device.type == "meta"
