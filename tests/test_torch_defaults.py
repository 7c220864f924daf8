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
from inilora_kernels.torch_defaults import ordinary_tensors


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
    with ordinary_tensors():
        assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(1).device.type == "meta"


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_inference_mode_changes_no_bit_and_the_factors_can_be_trained(options: dict[str, Any], tmp_path: Path) -> None:
    """It is on in one thread alone: others could not write into what this one had made."""
    save_file({"layers.0.q.weight": torch.arange(1200.0).view(40, 30).sin()}, tmp_path / "model.safetensors")
    expected = both(options, tmp_path)
    with torch.inference_mode():
        found = both(options, tmp_path)
        assert torch.is_inference_mode_enabled()
    for one, same in zip(expected, found, strict=True):
        assert torch.equal(one.A, same.A)
        assert torch.equal(one.B, same.B)
        assert one.certificate == same.certificate
        assert not same.A.is_inference()
        (nn.Parameter(same.B) @ nn.Parameter(same.A)).sum().backward()


def test_large_ranks_are_found_in_inference_mode(tmp_path: Path) -> None:
    """By several threads, which write into the same tensors."""
    W = torch.randn(700, 700, generator=torch.Generator("cpu").manual_seed(0))
    save_file({"layers.0.q.weight": W}, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"q": nn.Linear(700, 700, bias=False)})
    with torch.inference_mode():
        live = nn.ModuleDict({"q": nn.Linear(700, 700, bias=False)})
        live.load_state_dict({"q.weight": W})
        model.load_state_dict({"q.weight": W})
        options: dict[str, Any] = {"solver": "krylov", "target_modules": ["q"], "cache": False, "progress": False}
        found = [next(iter(approximate_model(one, 128, **options).values())) for one in (tmp_path, live, model)]
    for one in found:
        assert one.certificate.certified
        assert torch.equal(one.A, found[0].A)


def test_a_model_attached_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    """An optimizer's first step raised: torch takes no update of what was made in inference mode."""
    save_file({"c_attn.weight": torch.arange(1080.0).view(18, 60).sin()}, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"c_attn": nn.Linear(60, 18, bias=False)})
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.inference_mode():
        attach(model, approximate_model(tmp_path, 4, target_modules=["c_attn"], cache=False, solver="krylov"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    before = [parameter.detach().clone() for parameter in trained]
    model["c_attn"](torch.ones(2, 60)).sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
