from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, BertModel, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from inilora_kernels.adapters.attach import (
    adapter_state_dict,
    attach,
    detach,
    load_adapter_state_dict,
    merge,
    trainable_parameters,
    unmerge,
)
from inilora_kernels.adapters.attached_model import adapters
from inilora_kernels.adapters.layer import LoRALinear
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError, TargetError, WeightError
from inilora_kernels.factor_set import FactorSet

from .models import small

FORMS: tuple[Form, ...] = ("delta", "residual")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> BertModel:
    return AutoModel.from_pretrained(folder).to(dtype).eval()


def tokens() -> Tensor:
    return torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(0))


def output(model: nn.Module) -> Tensor:
    return model(tokens()).last_hidden_state


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def train(model: nn.Module, steps: int = 5, features: int = 16) -> list[float]:
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, features, generator=generator)
    losses = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", ["svd", "alpha"])
@pytest.mark.parametrize("scaling", [1.0, 0.3, 16.0])
def test_the_delta_form_starts_from_the_base_models_output_to_the_bit(
    minilm: Path, minilm_factors: FactorSet, minilm_alpha: FactorSet, dtype: torch.dtype, start: str, scaling: float
) -> None:
    model = load(minilm, dtype)
    expected = output(model)
    attach(model, {"svd": minilm_factors, "alpha": minilm_alpha}[start], scaling=scaling)
    assert len(list(adapters(model))) == 12
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("scaling", [1.0, 0.3, 16.0])
def test_the_residual_form_starts_from_it_to_float32_rounding(
    minilm: Path, minilm_factors: FactorSet, scaling: float
) -> None:
    model = load(minilm)
    expected = output(model)
    attach(model, minilm_factors, form="residual", scaling=scaling)
    # The layer sums r + 1 products where the base has one: a few units in the last place of outputs below 4, through
    # 6 layers.
    assert (output(model) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_gpt2s_conv1d_with_a_fused_weight(gpt2: Path, gpt2_factors: FactorSet, form: Form) -> None:
    model = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    ids = tokens() % 64
    expected = model(ids).logits
    attach(model, gpt2_factors, form=form)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LoRALinear)
    assert isinstance(layer.base_layer, Conv1D)
    assert layer.lora_A.weight.shape == (8, 24)
    assert layer.lora_B.weight.shape == (72, 8)
    assert not layer.lora_B.weight[24:48].any(), "the key rows have no factors"
    assert torch.allclose(model(ids).logits, expected, rtol=0, atol=0 if form == "delta" else 1e-6)
    for parameter in trainable_parameters(model):
        parameter.data.mul_(1.1)
    changed = model(ids).logits
    assert (changed - expected).abs().max() > 1e-2
    merge(model)
    assert torch.allclose(model(ids).logits, changed, rtol=0, atol=1e-5)


def test_both_forms_train_to_the_same_place() -> None:
    results = []
    for form in FORMS:
        model, factors = small()
        attach(model, factors, form=form)
        losses = train(model, 20)
        assert losses[-1] < 0.5 * losses[0]
        results.append(model(torch.ones(1, 16)))
    # 20 steps of Adam, which divides by the gradients' own size, so rounding grows to about 1e-5.
    assert torch.allclose(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", ["svd", "alpha"])
def test_autocast(
    minilm: Path, minilm_factors: FactorSet, minilm_alpha: FactorSet, dtype: torch.dtype, start: str
) -> None:
    model = load(minilm)
    with torch.autocast("cpu", dtype):
        expected = output(model)
        attach(model, {"svd": minilm_factors, "alpha": minilm_alpha}[start])
        assert torch.equal(output(model), expected)
        output(model).float().square().mean().backward()
    gradients = [parameter.grad for parameter in trainable_parameters(model)]
    assert all(gradient is not None and gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_after_attaching_still_starts_exactly(
    minilm: Path, minilm_factors: FactorSet, dtype: torch.dtype
) -> None:
    expected = output(load(minilm, dtype))
    assert torch.equal(output(attach(load(minilm), minilm_factors).to(dtype)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_torch_compile(form: Form) -> None:
    model, factors = small()
    x = torch.randn(4, 16)
    expected = model(x)
    attach(model, factors, form=form)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(x), expected, rtol=0, atol=1e-6)
    losses = train(compiled)
    assert losses[-1] < losses[0]
    assert list(adapter_state_dict(compiled)) == list(adapter_state_dict(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(minilm: Path, minilm_factors: FactorSet, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = attach(load(minilm), minilm_factors).train()
        without_dropout(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)  # transformers before 5 keeps a dropout of its own in the attention
        output(model).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_detach_gives_the_base_back_to_the_bit(minilm: Path, minilm_factors: FactorSet, form: Form, dtype) -> None:
    model = load(minilm, dtype)
    model.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attach(model, minilm_factors, form=form)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in model.state_dict() if "lora_" in name
    }
    output(model).float().square().mean().backward()
    torch.optim.SGD(trainable_parameters(model), lr=1.0).step()
    merge(model)
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_merge_and_unmerge(minilm: Path, minilm_factors: FactorSet, form: Form) -> None:
    model = attach(load(minilm), minilm_factors, form=form, scaling=2.0)
    weights = {name: one.clone() for name, one in model.named_parameters()}
    started = output(model)
    merge(model)
    if form == "delta":
        assert torch.equal(output(model), started)
    unmerge(model)
    for parameter in trainable_parameters(model):
        parameter.data.add_(0.01)
    trained = output(model)
    assert (trained - started).abs().max() > 1e-2
    merge(model)
    merge(model)
    assert torch.allclose(output(model), trained, rtol=0, atol=1e-5)
    unmerge(model)
    assert torch.equal(output(model), trained)
    bases = {name: one for name, one in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bases.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_of_a_and_b_alone_restores_the_model(form: Form) -> None:
    model, factors = small()
    base = copy.deepcopy(model)
    train(attach(model, factors, form=form, scaling=2.0))
    state = adapter_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "0.lora_A.weight": (3, 16),
        "0.lora_B.weight": (24, 3),
        "2.lora_A.weight": (3, 24),
        "2.lora_B.weight": (8, 3),
    }
    load_adapter_state_dict(attach(base, factors, form=form, scaling=2.0), state)
    x = torch.randn(3, 16)
    assert torch.equal(base(x), model(x))
    with pytest.raises(TargetError, match=r"2\.lora_B\.weight is only in the model"):
        load_adapter_state_dict(base, {name: state[name] for name in list(state)[:-1]})
    with pytest.raises(TargetError, match=r"0\.lora_A\.weight is \(3, 16\) in the model and \(2, 16\)"):
        load_adapter_state_dict(base, {**state, "0.lora_A.weight": torch.zeros(2, 16)})


def test_dropout_drops_nothing_of_the_base_in_the_delta_form() -> None:
    model, factors = small()
    x = torch.randn(4, 16)
    expected = model(x)
    attach(model, factors, dropout=0.5).train()
    assert torch.equal(model(x), expected)
    train(model)
    assert not torch.equal(model(x), model(x))


def test_quantized_by_torchao(minilm: Path, minilm_alpha: FactorSet) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(minilm)
    quantize_(model, Int8WeightOnlyConfig())
    _works_on_a_quantized_base(model, minilm_alpha)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_bitsandbytes(minilm: Path, minilm_alpha: FactorSet, bits: int) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModel.from_pretrained(minilm, quantization_config=config, device_map="cpu").eval()
    _works_on_a_quantized_base(model, minilm_alpha)


def _works_on_a_quantized_base(model: nn.Module, factors: FactorSet) -> None:
    # In eval mode bitsandbytes packs 4-bit weights for the CPU in a way that it cannot train with.
    without_dropout(model.train())
    with torch.no_grad():
        expected = output(model)
    with pytest.raises(WeightError, match=r'quantized or sharded.*use form="delta"'):
        attach(model, factors, form="residual")
    attach(model, factors)
    with torch.no_grad():
        assert torch.equal(output(model), expected)
    output(model).float().square().mean().backward()
    torch.optim.SGD(trainable_parameters(model), lr=0.1).step()
    with torch.no_grad():
        assert not torch.equal(output(model), expected)
        assert torch.equal(output(detach(model)), expected)


def test_a_quantized_base_is_not_merged(minilm: Path, minilm_factors: FactorSet) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(minilm)
    quantize_(model, Int8WeightOnlyConfig())
    attach(model, minilm_factors)
    with pytest.raises(WeightError, match="quantized or sharded"):
        merge(model)


PARALLEL = ("DDP", "FSDP2")


def _in_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for way in PARALLEL:
        _trains_as_one_does(rank, way == "FSDP2", f"{folder}/{way}.pt")
    # DDP's reducer must not be the last to hold the process group: it would join gloo's thread under the GIL, for which
    # that thread may wait (torch 2.13 then hangs for ever, about once in ten times).
    gc.collect()
    torch.distributed.destroy_process_group()


def _trains_as_one_does(rank: int, sharded: bool, path: str) -> None:
    model, factors = small()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    expected = model(x)
    attach(model, factors)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parallel: nn.Module = model
    else:
        parallel = DistributedDataParallel(model)
    assert torch.equal(parallel(x), expected)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (parallel(x[4 * rank : 4 * rank + 4]) - 1).square().mean().backward()
        optimizer.step()
    load_adapter_state_dict(parallel, state := adapter_state_dict(parallel))
    set_model_state_dict(model, get_model_state_dict(model))
    if rank == 0:
        torch.save((state, {name: tensor.clone() for name, tensor in adapter_state_dict(parallel).items()}), path)
    else:
        adapter_state_dict(parallel)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_two_processes, (str(tmp_path),), nprocs=2, daemon=True)
    model, factors = small()
    attach(model, factors)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    expected = adapter_state_dict(model)
    for way in PARALLEL:
        state, reloaded = torch.load(tmp_path / f"{way}.pt", weights_only=True)
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor)
            assert torch.equal(reloaded[name], state[name])


def test_it_warns_where_the_residual_would_lose_the_weight_to_rounding(
    minilm: Path, minilm_factors: FactorSet, minilm_alpha: FactorSet
) -> None:
    with pytest.warns(UserWarning, match=r"torch\.bfloat16 rounds away about .*%.*form=\"delta\""):
        attach(load(minilm, torch.bfloat16), minilm_alpha, form="residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(load(minilm, torch.bfloat16), minilm_alpha)
        attach(load(minilm, torch.bfloat16), minilm_factors, form="residual")
        attach(load(minilm), minilm_alpha, form="residual")


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, factors = small()
    before = copy.deepcopy(model.state_dict())

    def refuses(error: type[Exception], match: str, chosen: FactorSet = factors, **options) -> None:
        with pytest.raises(error, match=match):
            attach(model, chosen, **options)
        assert model.state_dict().keys() == before.keys()
        assert all(parameter.requires_grad for parameter in model.parameters())

    refuses(OptionError, "form='both'", form="both")
    refuses(OptionError, "scaling=0", scaling=0.0)
    refuses(OptionError, "scaling=nan", scaling=float("nan"))
    refuses(OptionError, r"dropout=1\.0", dropout=1.0)
    refuses(TargetError, "factor set is empty", FactorSet({}, {}))
    refuses(TargetError, "no linear module 1, for which there are factors", FactorSet({"1": factors["0"]}, {}))
    refuses(TargetError, r"0 is 24×16, but 0 has A \(3, 24\)", FactorSet({"0": factors["2"]}, {}))
    twice = nn.ModuleList([model, copy.deepcopy(model)])
    with pytest.raises(TargetError, match=r"fits 0\.0 and 1\.0"):
        attach(twice, factors)
    attach(model, factors)
    with pytest.raises(TargetError, match="has adapters already"):
        attach(model, factors)
    detach(model)
    model[2] = nn.Linear(24, 8)
    tied = nn.ModuleDict({"one": nn.Linear(16, 24), "two": nn.Linear(16, 24)})
    tied["two"].weight = tied["one"].weight
    with pytest.raises(TargetError, match=r"its weight is also two\.weight"):
        attach(tied, FactorSet({"one": factors["0"]}, {}), form="residual")
