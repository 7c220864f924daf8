"""Layers whose weight is read around them, and models run on random input without a trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from inilora_kernels.adapters.live_model import (
    called_layers,
    output_of,
    random_inputs,
    reads_weight,
    require_called,
    require_called_by_kernels,
    require_same_output,
)
from inilora_kernels.errors import TargetError


class Fused(nn.Module):
    """Multiplies with `passed_by`'s weight itself, asks `asked`'s for its dtype, and calls both others."""

    def __init__(self) -> None:
        super().__init__()
        self.passed_by, self.asked, self.called = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(x.to(self.asked.weight.dtype))
        return self.called(F.linear(x, self.passed_by.weight))


class Hidden(nn.Module):
    """Multiplies with weights that no `self.layer.weight` names, and calls the layer of the same kind next to them."""

    main_input_name = "input_ids"
    config = SimpleNamespace(vocab_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.local, self.called = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed, self.numbered = (nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))
        self.given, self.asked, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.called(self.embedding(input_ids))
        layer = self.local
        x = x @ layer.weight
        for layer in self.listed:
            x = x @ layer.weight
        x = x @ self.numbered[0].weight
        return multiplied(x.to(getattr(self.asked, "weight").dtype), self.given)  # noqa: B009


def multiplied(x: Tensor, layer: nn.Module) -> Tensor:
    return x @ layer.weight  # type: ignore[operator]


class InTraining(nn.Module):
    """Takes a fused path in evaluation alone, as nn.TransformerEncoderLayer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.training else F.linear(x, self.layer.weight, self.layer.bias)


def test_a_layer_that_is_passed_by_is_refused_with_who_reads_its_weight() -> None:
    """An adapter on MultiheadAttention.out_proj, or on Mamba's dt_proj, trains and changes nothing."""
    model = nn.ModuleDict({"block": Fused(), "attention": nn.MultiheadAttention(4, 2)})
    assert reads_weight(model, "block.passed_by") == "Fused.forward"
    assert reads_weight(model, "block.asked") is None
    require_called(model, ["block.asked", "block.called"])
    with pytest.raises(TargetError, match=r"block\.passed_by: Fused\.forward reads its weight and does not call"):
        require_called(model, ["block.called", "block.passed_by"])
    with pytest.raises(TargetError, match=r"attention\.out_proj: MultiheadAttention"):
        require_called(model, ["attention.out_proj"])


def test_a_weight_is_found_to_be_read_by_whatever_name() -> None:
    """By the source, also of models whose inputs are not known, or by a run in which the weight changes the output."""
    model = Hidden()
    for name in ("local", "listed.0", "numbered.0"):
        assert reads_weight(model, name) == "Hidden.forward", name
    for name in ("called", "asked", "unused", "given"):
        assert reads_weight(model, name) is None, name
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    require_called(model, ["called", "asked", "unused"])
    with pytest.raises(TargetError, match=r"given: the code around it reads its weight and does not call"):
        require_called(model, ["called", "given"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {type(module) for module in model.modules()} == {Hidden, nn.Embedding, nn.Linear, nn.ModuleList}


class Mixer(nn.Module):
    """As transformers' Bamba, Falcon-H1 and Nemotron-H in training, and as its Mamba before 5 wherever it has a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.offered, self.last, self.sliced = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.is_cuda:
            return F.linear(x, self.offered.weight)
        if x.dim() > 5:
            return F.linear(x, self.sliced.weight)
        if x.is_cuda:
            return self.cuda_kernels_forward(x)
        return self.sliced(self.last(self.offered(self.first(x))))

    def cuda_kernels_forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.last.weight)


def test_a_layer_whose_weight_is_offered_to_a_kernel_is_for_this_machine_alone() -> None:
    """peft 761: such a layer is called on a CPU, and read on a GPU."""
    model = nn.ModuleDict({"mixer": Mixer()})
    require_called_by_kernels(model, ["mixer.first", "mixer.sliced"])
    for name in ("mixer.offered", "mixer.last"):
        with pytest.raises(TargetError, match=rf"{name}: Mixer\..*forward hands its weight to a fused kernel"):
            require_called_by_kernels(model, [name])


class OnCpu(nn.Module):
    """As transformers' 4.45 LLaMA: does not run on the meta device, and multiplies slice by slice in a branch alone."""

    main_input_name = "input_ids"
    config = SimpleNamespace(vocab_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.sliced, self.read = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if input_ids.shape[1] > 100:
            return torch.cat([F.linear(x, part) for part in self.sliced.weight.split(2)])
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.sliced(x), self.read.weight)


def test_a_model_that_does_not_run_on_meta_is_judged_by_whether_it_calls_the_layer_anywhere() -> None:
    with torch.device("meta"):
        model = OnCpu()
    require_called(model, ["sliced"])
    with pytest.raises(TargetError, match=r"OnCpu\.forward reads its weight and does not call"):
        require_called(model, ["read"])


def test_called_means_in_training_and_in_evaluation() -> None:
    inputs = {"x": torch.randn(2, 4)}
    assert called_layers(Fused(), ["passed_by", "asked", "called"], inputs) == {"asked", "called"}
    assert called_layers(InTraining(), ["layer"], inputs) == frozenset()


def test_a_model_that_was_run_is_as_it_was(gpt2: Path) -> None:
    """Dropout off, its modes, its hooks and torch's random state as before."""
    model = GPT2LMHeadModel.from_pretrained(gpt2).train()
    model.lm_head.eval()
    inputs = random_inputs(model)
    assert inputs is not None
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    first, second = output_of(model, inputs), output_of(model, inputs)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert not first.requires_grad
    called_layers(model, ["transformer.h.0.attn.c_attn"], inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_run_tells_nothing() -> None:
    assert random_inputs(nn.Linear(4, 4)) is None
    assert output_of(nn.Linear(4, 4), {"nonsense": torch.zeros(1)}) is None


def test_a_changed_output_is_refused_and_rounding_is_not() -> None:
    before = torch.randn(50, generator=torch.Generator().manual_seed(0))
    require_same_output(before, before * (1 + 1e-5), "model")
    require_same_output(before.bfloat16(), (before * 1.001).bfloat16(), "model")
    for after, complaint in ((None, "does not run"), (before[:9], "gives another shape")):
        with pytest.raises(TargetError, match=rf"model: with the adapters it {complaint}"):
            require_same_output(before, after, "model")
    with pytest.raises(TargetError, match=r"model: .*changes by 1\.0%"):
        require_same_output(before, before * 1.01, "model")
