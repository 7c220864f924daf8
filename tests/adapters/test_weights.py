"""What a base layer's weight is: its own and whole, or sharded, quantized, offloaded or shared."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from inilora_kernels.adapters.weights import (
    device_of,
    require_own_weight,
    require_unshared_weight,
    users_of_weights,
    warn_if_rounded_away,
)
from inilora_kernels.errors import TargetError, WeightError


def shard(layer: nn.Module, rows: int) -> nn.Module:
    """As ZeRO-3 and FlatParameter leave a layer: with a part of its weight."""
    layer.weight = nn.Parameter(layer.weight[:rows].detach().clone())
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_may_be_changed(dtype: torch.dtype) -> None:
    for layer in (nn.Linear(4, 6), Conv1D(6, 4)):
        require_own_weight(layer.to(dtype), "q", "do that")


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Linear(4, 6, device="meta"), "offloaded or sharded .on the meta device."),
        (shard(nn.Linear(4, 6), 3), r"a shard of shape \(3, 4\)"),
        (shard(nn.Linear(4, 6), 0), r"a shard of shape \(0, 4\)"),
        (nn.ReLU(), "quantized or sharded .no `weight`."),
        (nn.Linear(4, 6).to(torch.float8_e4m3fn), "quantized or sharded .*float8"),
    ],
)
def test_what_is_not_wholly_there_may_not(layer: nn.Module, found: str) -> None:
    with pytest.raises(WeightError, match=rf"^layer.0.q: .*{found}.*; do that$"):
        require_own_weight(layer, "layer.0.q", "do that")


def test_a_shared_weight_is_named_with_its_other_user() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "q": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    users = users_of_weights(model)
    require_unshared_weight(users, "q", model["q"], "the residual", "do that")
    with pytest.raises(TargetError, match=r"head: its weight is also embedding\.weight, which the residual would"):
        require_unshared_weight(users, "head", model["head"], "the residual", "do that")


def test_a_wrapped_layer_shares_nothing_with_itself() -> None:
    wrapper = nn.Module()
    wrapper.base_layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"q": wrapper})
    require_unshared_weight(users_of_weights(model), "q", wrapper.base_layer, "the residual", "do that")


def test_an_offloaded_layer_is_where_accelerate_brings_it() -> None:
    layer = nn.Linear(4, 4, device="meta")
    assert device_of(nn.Linear(4, 4)) == device_of(layer) == torch.device("cpu")
    layer._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert device_of(layer) == torch.device("cuda", 1)


def test_rounding_is_warned_of_where_it_costs_part_of_the_weight() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"q: the residual is 35 times as large .*rounds away about 7\.9% of the wei"):
        warn_if_rounded_away(W.bfloat16(), 35 * W, "q")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rounded_away(W, 35 * W, "q")
        warn_if_rounded_away(W.bfloat16(), W, "q")
