"""Experts: parameters that hold a matrix for each expert of a layer, however a checkpoint stores them.

transformers 5 keeps all experts of a layer in one parameter of three dimensions, `experts.gate_up_proj`, which PEFT
adapts by `target_parameters`. On disk it may be that parameter (gpt-oss, Llama 4; blocks and scales of MXFP4 too), or a
matrix for each expert and projection (Mixtral, Qwen, DeepSeek), which transformers stacks on loading. Both are the same
matrices, so they have one name here, the parameter's with the expert's number: `mlp.experts.gate_up_proj:3`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import CheckpointError, TargetError
from ..suggestions import some
from .architecture import Architecture
from .checkpoint import Checkpoint
from .files.gguf import GGUFTensor
from .files.tensor import tensor_sha256
from .formats.weight import StoredWeight

REARRANGED = "rearranged on loading, so its experts are no matrices of the file; factorize the live model"

_STACKED = ("MergeModulelist(0)",)
_STACKED_AND_JOINED = ("MergeModulelist(0)", "Concatenate(1)")


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter (experts, …, …) of a model, and the stored weights that make it up.

    name: in the model.
    shape: (d, k) of each expert's W, out_features by in_features as PEFT takes them.
    transposed: the parameter holds Wᵀ for each expert; PEFT knows that by the module's `is_transposed`.
    stored: for each expert, the weights whose rows, one below the other, are its W. If the checkpoint stores all
        experts in one tensor, or in two that are joined: these weights, with three dimensions, for all.
    count: how many experts the model has.
    flipped: the one stored tensor holds the parameter's matrices transposed, as Qwen3-VL's older files do.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    stored: tuple[tuple[StoredWeight, ...], ...]
    count: int
    flipped: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0][0].dtype

    @property
    def dequantization(self) -> str:
        return self.stored[0][0].dequantization

    def read(self, expert: int) -> Tensor:
        """One expert's W (d×k), contiguous and in its own memory. Raises CheckpointError."""
        parts = self.stored[expert]
        if len(parts[0].shape) == 2:
            return parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])
        own = [part.read(slice(expert, expert + 1))[0] for part in parts]
        W = own[0] if len(own) == 1 else torch.cat(own)
        return W.T.contiguous() if self.turned else W

    @property
    def turned(self) -> bool:
        """Whether the stored tensor holds Wᵀ. MXFP4's blocks are along in_features, so they hold W."""
        fused = self.stored[0][0]
        return self.transposed != self.flipped and self.is_fused and not fused.is_quantized

    @property
    def is_fused(self) -> bool:
        """Whether one stored tensor holds all experts."""
        return len(self.stored[0][0].shape) == 3

    def files(self, expert: int) -> list[Path]:
        """Where one expert's W is stored."""
        return [tensor.file for part in self.stored[expert] for tensor in part.stored.values()]

    def sha256(self, expert: int) -> str:
        """sha256 (hex) of W's values, row by row, dequantized where they are quantized: the same in every storage."""
        return tensor_sha256(self.read(expert))


def find_expert_parameters(checkpoint: Checkpoint, architecture: Architecture | None) -> list[ExpertParameter]:
    """Every parameter of experts that the checkpoint holds completely, in the model's order.

    architecture: of the model; None if transformers knows none: then they are the tensors with three dimensions that
        are no layer's `weight`, each holding W for every expert.
    """
    if architecture is None:
        return [
            ExpertParameter(
                name, (weight.shape[1], weight.shape[2]), False, ((weight,),) * weight.shape[0], weight.shape[0]
            )
            for name, weight in _fused(checkpoint).items()
            if min(weight.shape) > 1 and not name.endswith((".weight", ".bias"))
        ]
    live: dict[str, StoredWeight] = {}
    for tensor, weight in _fused(checkpoint).items():
        into, conversion = architecture.loads_into(tensor)
        if into is not None and (conversion is None or conversion.turns_if_needed):
            live[into] = weight
    stacked, stacks = _stacked(checkpoint, architecture), _stacks_of_gguf(checkpoint)
    found = []
    for name, parameter in architecture.model.named_parameters():
        module = architecture.model.get_submodule(name.rpartition(".")[0])
        if not may_hold_experts(module, parameter):
            continue
        count, *sides = parameter.shape
        transposed = bool(getattr(module, "is_transposed", False))
        shape = (sides[1], sides[0]) if transposed else (sides[0], sides[1])
        whole = (live[name],) if name in live else stacks.get(name)
        parts = (whole,) * count if whole else stacked.get(name)
        if parts is None:
            continue
        _, conversion = architecture.loads_into(parts[0][0].name)
        turns = conversion is not None and conversion.turns_if_needed
        flipped = turns and parts[0][0].shape == (count, sides[1], sides[0]) != tuple(parameter.shape)
        found.append(ExpertParameter(name, shape, transposed, parts, count, flipped))
    return found


def rearranged_experts(checkpoint: Checkpoint, architecture: Architecture | None) -> list[str]:
    """The parameters of experts that the model makes of a stored stack in another way than `find_expert_parameters`."""
    if architecture is None:
        return []
    names = []
    for tensor in _fused(checkpoint):
        into, conversion = architecture.loads_into(tensor)
        if into is not None and conversion is not None and not conversion.turns_if_needed:
            names.append(into)
    return names


def may_hold_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module's own parameter may be the matrices of several experts.

    A position or a token of a ViT is none, nor is a convolution's weight, also where weight_norm keeps its parts.

    parameter: also one that ZeRO-3 has partitioned.
    """
    name = next((name for name, one in module.named_parameters(recurse=False) if one is parameter), "")
    if "embed" in name or "position" in name:
        return False
    shape = getattr(parameter, "ds_shape", parameter.shape)
    other = (nn.Conv1d, nn.ConvTranspose1d, nn.Linear, nn.Embedding, parametrize.ParametrizationList)
    return len(shape) == 3 and min(shape) > 1 and not isinstance(module, other)


def selected(
    checkpoint: Checkpoint,
    parameters: Collection[ExpertParameter],
    target_parameters: Collection[str],
    rearranged: Collection[str] = (),
) -> list[ExpertParameter]:
    """The ones that `target_parameters` selects, in PEFT's syntax: whole names, or endings after a dot.

    rearranged: what `rearranged_experts` found, for messages.

    Raises TargetError for a name that selects none, and CheckpointError if experts are missing or their shapes differ
    from the model's.
    """
    if isinstance(target_parameters, str):
        raise TargetError(f"target_parameters={target_parameters!r}: give a list of names, as in PEFT")
    for name in target_parameters:
        if not any(is_selected(one.name, [name]) for one in parameters):
            endings = sorted({".".join(one.name.split(".")[-2:]) for one in parameters})
            there = f"here there are {', '.join(endings)}" if endings else "this checkpoint has no fused experts"
            stacks = [] if endings else [stack for stack in _fused(checkpoint) if is_selected(stack, [name])]
            if stacks or (not endings and any("switch_mlp" in stack for stack in _fused(checkpoint))):
                there = "the stacks of experts here (MLX's) have other names than those that transformers loads"
            if odd := next((one for one in rearranged if is_selected(one, [name])), None):
                there = f"{odd} is {REARRANGED}"
            raise TargetError(
                f"target_parameters: {name!r} selects no parameter of experts; {there}. Linear layers are named in "
                f"target_modules"
            )
    chosen = [one for one in parameters if is_selected(one.name, target_parameters)]
    for one in chosen:
        _require_shape(checkpoint, one)
    return chosen


def is_selected(name: str, target_parameters: Collection[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def parameter_of_expert(name: str) -> str | None:
    """The parameter of which a matrix in a FactorSet is one expert; None if it is not an expert's.

    >>> parameter_of_expert("mlp.experts.gate_up_proj:3"), parameter_of_expert("h.0.attn.c_attn:query")
    ('mlp.experts.gate_up_proj', None)
    """
    parameter, _, expert = name.rpartition(":")
    return parameter if expert.isdecimal() else None


def _fused(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """The tensors that may be a whole parameter: stored plainly, or as a format's experts."""
    plain = {
        name: StoredWeight(name, tensor.shape, tensor.dtype, "", {"values": tensor})
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 3 and tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2
    }
    return plain | {
        name: weight for name, weight in checkpoint.weights.items() if len(weight.shape) == 3 and weight.is_quantized
    }


def _stacked(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, tuple[tuple[StoredWeight, ...], ...]]:
    """By the parameter: for each expert, in the order of their numbers, the weights that transformers stacks."""
    found: dict[str, dict[int, dict[int, StoredWeight]]] = {}
    for module, parameter in architecture.merged.items():
        conversion = architecture.conversions[module]
        number = _expert_number(module, parameter)
        if conversion.operations in (_STACKED, _STACKED_AND_JOINED) and number is not None:
            weight = checkpoint.weights[f"{module}.weight"]
            found.setdefault(parameter, {}).setdefault(number, {})[conversion.place] = weight
    return {
        parameter: tuple(tuple(parts[place] for place in sorted(parts)) for _, parts in sorted(experts.items()))
        for parameter, experts in found.items()
    }


def _stacks_of_gguf(checkpoint: Checkpoint) -> dict[str, tuple[StoredWeight, ...]]:
    """By the parameter: GGUF's stacks of all experts' rows, the gate's before those of `up`."""
    found: dict[str, dict[str, StoredWeight]] = {}
    for name, weight in checkpoint.weights.items():
        parameter, _, part = name.removesuffix(".weight").rpartition(".")
        if len(weight.shape) == 3 and any(isinstance(tensor, GGUFTensor) for tensor in weight.stored.values()):
            found.setdefault(parameter, {})[part] = weight
    return {parameter: tuple(parts[part] for part in sorted(parts)) for parameter, parts in found.items()}


def _expert_number(module: str, parameter: str) -> int | None:
    """The last number in a stored module's name, which its parameter lacks."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
    return int(numbers[-1]) if len(numbers) == len(re.findall(r"(?<=\.)\d+(?=\.)", parameter)) + 1 else None


def _require_shape(checkpoint: Checkpoint, parameter: ExpertParameter) -> None:
    where, count = f"{checkpoint.path}: {parameter.name}", parameter.count
    if len(parameter.stored) != count:
        raise CheckpointError(f"{where} consists of {len(parameter.stored)} experts, but config.json says {count}")
    for number, parts in enumerate(parameter.stored):
        refused = next((part.refusal for part in parts if part.refusal), "")
        if refused:
            raise CheckpointError(f"{where}: expert {number} cannot be read ({refused})")
        d, k = parameter.shape
        if len(parts[0].shape) == 3:
            rows = sum(part.shape[1] for part in parts)
            whole = (*parts[0].shape[:1], rows, *parts[0].shape[2:]) if len(parts) > 1 else parts[0].shape
            fits = whole == ((count, k, d) if parameter.turned else (count, d, k))
        else:
            fits = sum(part.shape[0] for part in parts) == d and all(part.shape[1:] == (k,) for part in parts)
        if not fits:
            raise CheckpointError(
                f"{where}: expert {number} is stored as {some([str(part.shape) for part in parts])}, and config.json "
                f"makes it {d}×{k}; config.json and weights do not belong together"
            )
