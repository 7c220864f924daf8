"""Names that are nearly right: refused or warned of, with the nearest valid one, wherever a name is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import inilora_kernels
from inilora_kernels import (
    FactorSet,
    InitializationError,
    approximate,
    approximate_model,
    attach,
    convert,
    export_delta,
    load_delta,
    lora_model,
)
from inilora_kernels.kernels.gpu.gpus import gpu_named
from inilora_kernels.suggestions import near_names, some


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
        ({"device": "cdua:0"}, '"cuda"'),
        ({"device": "gpu"}, '"cuda"'),
        ({"target_modules": "all_linear"}, '"all-linear"'),
        ({"target_modules": ["all-linear"]}, '"all-linear" itself'),
        ({"target_modules": "query value"}, "['query', 'value']"),
        ({"target_modules": r".*\.qurey"}, '"query"'),
        ({"rank_pattern": ["value"]}, '{"value": 4}'),
    ],
)
def test_a_slip_is_refused_with_the_name_that_was_meant(model: Path, options: dict[str, Any], meant: str) -> None:
    with pytest.raises(InitializationError) as refused:
        approximate_model(model, **{"rank": 1, "steps": 0, "cache": False, "progress": False, **options})
    assert meant in str(refused.value)


@pytest.mark.parametrize("given", [{"rnak": 4}, {"target_module": ["query"]}])
def test_a_keyword_nearly_named(model: Path, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r'approximate_model\(\) .*; did you mean "(rank|target_modules)"'):
        approximate_model(model, **given)


def test_a_function_nearly_named() -> None:
    with pytest.raises(AttributeError, match='did you mean "approximate_model"'):
        inilora_kernels.aproximate_model  # noqa: B018


@pytest.mark.parametrize("function", [attach, lora_model])
def test_a_form_nearly_named_and_arguments_that_are_swapped(function: Callable[..., Any]) -> None:
    base = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("query", "value")})
    factors = approximate_model(base, rank=1, method="lora", cache=False, progress=False)
    with pytest.raises(InitializationError, match='did you mean "delta"'):
        function(base, factors, form="detla")
    with pytest.raises(InitializationError, match=r"give the model first|factors: was given a ModuleDict"):
        function(factors, base)


def test_a_file_nearly_named(model: Path, tmp_path: Path) -> None:
    factors = approximate_model(model, rank=1, method="lora", cache=False, progress=False)
    factors.save(tmp_path / "factors.safetensors")
    for given in ("factor.safetensors", "factors.safetensor", "factors"):
        with pytest.raises(InitializationError, match=r'did you mean "factors\.safetensors"'):
            FactorSet.load(tmp_path / given)
    with pytest.raises(InitializationError, match="was given a FactorSet"):
        FactorSet.load(factors)  # type: ignore[arg-type]
    with pytest.raises(InitializationError, match="not as a Linear"):
        export_delta(torch.nn.Linear(2, 2), factors, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InitializationError, match="not as a Linear"):
        load_delta(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InitializationError, match="not as a Linear"):
        convert(torch.nn.Linear(2, 2), factors, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InitializationError, match="a factor file, where training starts"):
        convert(tmp_path / "factors.safetensors", factors, tmp_path / "out", model)


def test_a_start_may_be_a_files_path(model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rank": 1, "solver": "krylov", "cache": False, "progress": False}
    start = approximate_model(model, **given)
    start.save(tmp_path / "start.safetensors")
    one, other = (approximate_model(model, start=each, **given) for each in (start, tmp_path / "start.safetensors"))
    assert one.to_bytes() == other.to_bytes()


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


def test_a_folder_that_may_not_be_listed_has_no_near_names(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").touch()
    assert near_names(tmp_path / "file.safetensors" / "model", ()) == ""
    assert near_names(tmp_path / "fil.safetensors", (".safetensors",)) == '; did you mean "file.safetensors"?'
    assert near_names(tmp_path / "fil.safetensors", (".gguf",)) == ""
    assert near_names(tmp_path, ()) == ""
