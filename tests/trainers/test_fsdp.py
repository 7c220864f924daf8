"""FSDP as accelerate and transformers set it up for PEFT: two gloo processes, and PEFT's own wrap policy."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import torch
from accelerate.utils import get_module_children_bottom_up
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)

from inilora_kernels.factor_set import FactorSet

from ..adapters.started import FORMS, load, logits, started
from ..factorized import factorize

IDS = torch.arange(1, 11)[None]


def train(model: nn.Module) -> Tensor:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model(input_ids=IDS).logits.detach()


def fsdp1(model: PeftModel, strategy: ShardingStrategy) -> nn.Module:
    """As transformers' Trainer: each lora_A and lora_B is a unit of its own."""
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, sharding_strategy=strategy, device_id=torch.device("cpu")
    )


def fsdp2(model: PeftModel) -> nn.Module:
    """As accelerate's fsdp2_prepare_model, by the same policy, which accelerate 1.15 itself leaves out for FSDP2."""
    chosen = functools.partial(fsdp_auto_wrap_policy(model), recurse=False, nonwrapped_numel=1)
    mesh = init_device_mesh("cpu", (2,))
    for module in get_module_children_bottom_up(model)[:-1]:
        if chosen(module=module):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def in_a_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        factors = FactorSet.load(folder / "factors.safetensors")
        base = logits(load(folder / "base"))
        for form in FORMS:
            tolerance = 0.0 if form == "delta" else 1e-6
            # torch 2.13's FSDP1 cannot gather the state dict of shards on a CPU, a plain LoRA's neither; see the docs.
            sharded = fsdp1(started(folder / "base", factors, form), ShardingStrategy.FULL_SHARD)
            assert (sharded(input_ids=IDS).logits - base).abs().max() <= tolerance
            for version in (1, 2):
                model = started(folder / "base", factors, form)
                parallel = fsdp2(model) if version == 2 else fsdp1(model, ShardingStrategy.NO_SHARD)
                assert (parallel(input_ids=IDS).logits - base).abs().max() <= tolerance
                trained = train(parallel)
                assert not torch.allclose(trained, base, rtol=0, atol=1e-2)
                assert torch.allclose(trained, train(started(folder / "base", factors, form)), rtol=0, atol=1e-5)
                with model.disable_adapter():
                    assert (parallel(input_ids=IDS).logits - base).abs().max() <= tolerance
            set_model_state_dict(model, get_model_state_dict(model))
            assert (parallel(input_ids=IDS).logits - trained).abs().max() <= tolerance
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                model.save_pretrained(folder / form, state_dict=state)
                torch.save(trained, folder / f"{form}.pt")
    finally:
        # A model that is freed while the group is torn down waits for its threads for ever.
        gc.collect()
        distributed.destroy_process_group()


def test_both_forms_train_and_save_under_pefts_wrap_policy(llama: Path, tmp_path: Path) -> None:
    """peft 1984: FSDP wraps lora_A by itself, and code that reads it from outside crashes on the first forward pass."""
    factorize(llama, ("q_proj", "v_proj"), rank=4).save(tmp_path / "factors.safetensors")
    (tmp_path / "base").symlink_to(llama)
    torch.multiprocessing.spawn(in_a_process, (tmp_path,), nprocs=2)
    for form in FORMS:
        saved = PeftModel.from_pretrained(load(llama), tmp_path / form)
        trained = torch.load(tmp_path / f"{form}.pt", weights_only=True)
        assert torch.allclose(logits(saved), trained, rtol=0, atol=1e-5)
