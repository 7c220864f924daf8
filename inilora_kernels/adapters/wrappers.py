"""Modules that torch.compile and DDP have wrapped: a model's own names, without those that the wrappers add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What torch.compile, activation checkpointing and FSDP1 put into module names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Where the classes are that hold a model as their one child, `module` or one of the above.
_HOLDERS = ("torch.nn.parallel.", "torch.optim.swa_utils", "torch._dynamo.", "torch.distributed.", "deepspeed.")
# Names of wrappers that are not in those of a state dict: torch's own hooks take them off.
_UNSEEN = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model that DDP, torch.compile, AveragedModel, FSDP1 and DeepSpeed's engine hold, one in the other."""
    held = next((child for name, child in model.named_children() if name == "module" or name in _WRAPPERS), None)
    holds = any(owner.__module__.startswith(_HOLDERS) for owner in type(model).__mro__)
    return unwrapped_model(held) if holds and held is not None else model


def plain_name(name: str) -> str:
    """A name in an unwrapped model without what wrappers of its parts have put in.

    >>> plain_name("layers.0._orig_mod.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def in_state_dict(name: str) -> str:
    """A module's name in `named_modules` as the state dict of the same model has it."""
    for part in _UNSEEN:
        name = name.replace(part, "")
    return name


def _inside(module: nn.Module) -> str | None:
    """The name that a wrapper has for the module inside, also in a state dict; None for what is no wrapper."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    return "module" if isinstance(module, (DataParallel, DistributedDataParallel)) else None


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[bool]:
    """Let a model's children stand where compiled and distributed ones do, so that all names are its own.

    Yields whether there are such wrappers.
    """
    taken: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            if _inside(parent) is not None:
                continue
            for name, wrapper in list(parent.named_children()):
                child = wrapper
                while (inside := _inside(child)) is not None:
                    child = child.get_submodule(inside)
                if child is not wrapper:
                    parent._modules[name] = child
                    taken.append((parent, name, wrapper, child))
        yield bool(taken)
    finally:
        for parent, name, wrapper, child in taken:
            if parent._modules.get(name) is child:
                parent._modules[name] = wrapper


def own_names(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names that the model has within `without_wrappers`; others stay."""
    wrapped = [
        f"{in_state_dict(name)}.{inside}." if name else f"{inside}."
        for name, module in model.named_modules(remove_duplicate=False)
        if (inside := _inside(module)) is not None
    ]
    return {_without(wrapped, key): value for key, value in state_dict.items()}


def _without(wrapped: list[str], key: str) -> str:
    # Inner wrappers, which have the outer ones' names in theirs, come after them.
    for prefix in reversed(wrapped):
        if key.startswith(prefix):
            head = prefix[:-1].rpartition(".")[0]
            key = f"{head}.{key.removeprefix(prefix)}" if head else key.removeprefix(prefix)
    return key
