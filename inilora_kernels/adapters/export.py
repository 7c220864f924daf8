"""Factors as folders that PEFT, and every trainer that reads PEFT's folders, can load as they are.

export_residual   OUT/base      the model with R = W − BA in place of each target W
                  OUT/adapter   A and B, trainable
export_delta      OUT/adapter   [0; A] and [B, 0], which add nothing yet to the untouched model
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import TaskType
from ..errors import TargetError, WeightError
from ..factor_set import FactorSet, factor_set
from ..factors import Factors
from ..model.fused import row_index
from ..storage.atomic import whole_folder
from ..storage.reading import absolute
from ..suggestions import some
from ..torch_defaults import ordinary_tensors
from .attached_model import adapters
from .base import write_residual_record
from .diffusers_folder import write_for
from .folder import KEY_PREFIX, WEIGHTS, Adapter, named_base, write_adapter
from .model_copy import copy_model
from .modules import is_conv1d, module_of
from .plan import lora_config, plan_export
from .rehearsal import require_peft_takes, require_same_start
from .weights import warn_if_rounded_away
from .wrappers import plain_name, unwrapped_model

_ABOUT_RESIDUAL = (
    "A LoRA that starts from the pretrained weights: B·A is the low-rank part of W, and the base model of this "
    "adapter, the folder `base` next to it, holds R = W − s·BA in the place of W. Together they give the output of the "
    "original model. Load this adapter on that base alone. Without the adapter the base is no usable model: a program "
    "that switches the adapter off (for DPO's reference) needs `inilora_kernels.load_residual`. After training, "
    "`inilora convert` makes a plain LoRA for the original model."
)
_ABOUT_DELTA = (
    "A plain LoRA of rank 2r for the original model that adds nothing yet: [B, 0] [0; A], where B·A is the low-rank "
    "part of W. `inilora_kernels.load_delta` trains A and B from there and keeps the start, r trainable rows a module. "
    "PEFT by itself, and any trainer that goes on with an adapter's folder, trains all 2r. What either saves is a "
    "plain LoRA for the original model."
)
_ABOUT_TRAINED = (
    "A plain LoRA for the original model, of rank 2r: what training from the pretrained weights has added to them."
)


@dataclass
class _Residual:
    """R = W − BA of one tensor, strip by strip, with its sha256 and size once all rows are done.

    parts: the factors of the whole W, or those of rows of a fused one.
    out_features: of W.
    squares: of W and of R, summed.
    """

    parts: list[Factors]
    out_features: int
    digest: Any = field(default_factory=hashlib.sha256)
    squares: tuple[float, float] = (0.0, 0.0)
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, W: Tensor) -> Tensor:
        """Rows of R as stored, from `start` on, given W's; summed in float32."""
        R = W.to(torch.float32, copy=True)
        for part in self.parts:
            index = row_index(part.rows, self.out_features)
            if part.transposed:
                R[:, index] -= part.A[:, start : start + len(W)].T @ part.B.T
                continue
            # The part's rows, in ascending order, that lie in this strip.
            rows = torch.arange(self.out_features, device=R.device)[index]
            low, high = torch.searchsorted(rows, torch.tensor([start, start + len(W)], device=rows.device)).tolist()
            R[rows[low:high] - start] -= part.B[low:high] @ part.A
        rounded = R.to(W.dtype)
        self.digest.update(rounded.contiguous().view(torch.uint8).numpy().data)
        self.squares = (
            self.squares[0] + float(torch.linalg.vector_norm(W, dtype=torch.float32)) ** 2,
            self.squares[1] + float(torch.linalg.vector_norm(R)) ** 2,
        )
        self.dtype = W.dtype
        return rounded

    def warn_if_rounded_away(self, name: str) -> None:
        growth = math.sqrt(self.squares[1] / self.squares[0]) if self.squares[0] else 1.0
        warn_if_rounded_away(torch.ones(1, dtype=self.dtype), torch.full((1,), growth), name)


@ordinary_tensors()
def export_residual(
    base: str | Path,
    factors: FactorSet | str | Path,
    out: str | Path,
    *,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: TaskType | None = None,
) -> None:
    """Write OUT/base, the model with R = W − BA in place of each target W, and OUT/adapter, A and B.

    `PeftModel.from_pretrained(AutoModel….from_pretrained("OUT/base"), "OUT/adapter", is_trainable=True)` gives the
    output of the original model, to the rounding of R; with the adapter switched off it gives R's, and
    `load_residual` the original's. R is summed in float32 and cast to W's dtype; config, tokenizer and all
    other tensors are copied as they are. Memory holds one tensor at a time.

    base: a Hugging Face model folder, or a model's id on the hub, "org/name" or "org/name@revision"; its target weights
        must be the ones that the factors were computed from.
    factors: a FactorSet, or the path of a factor file.
    lora_alpha: PEFT's; None for a scaling of 1, as in the paper. The scaling is the same for modules of every rank, and
        A and B are divided by its square root, so that scaling·BA stays the same.
    use_rslora: the scaling is lora_alpha / √r instead of lora_alpha / r.
    task_type: PEFT's; None for the model's own class, from config.json. It decides the names of the modules.
        The head of SEQ_CLS, TOKEN_CLS and QUESTION_ANS must be in `base`, and is copied into the adapter.

    Raises FactorFileError (factors of another model), OptionError, TargetError, CheckpointError and OutputError, and
    then leaves nothing behind. Warns where the dtype of R loses W to rounding.
    """
    out = Path(out)
    factors = factor_set(factors, base)
    plan = plan_export(
        base,
        factors,
        out,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        task_type=task_type,
        changes_weights=True,
    )
    parts: dict[str, list[Factors]] = {}
    for name, part in plan.factors.items():
        parts.setdefault(plan.tensors[module_of(name)], []).append(part)
    for tensor in parts:
        weight = plan.checkpoint.weights[tensor]
        if weight.is_quantized:
            raise WeightError(
                f"{plan.checkpoint.path}: {tensor} is quantized ({weight.dequantization}); R = W − BA would have to be "
                f"quantized anew, which is another model: use export_delta, or the original model"
            )
    residuals = {
        tensor: _Residual(its_parts, plan.checkpoint.weights[tensor].shape[its_parts[0].transposed])
        for tensor, its_parts in parts.items()
    }
    adapter = plan.adapter.with_base({"base_model_name_or_path": str(absolute(out / "base"))})
    with whole_folder(out) as folder:
        for name in ("base", "adapter"):
            (folder / name).mkdir()
        write_for(plan.checkpoint, folder / "adapter", adapter, _ABOUT_RESIDUAL)
        require_peft_takes(plan, folder / "adapter")
        copy_model(plan.checkpoint, folder / "base", {tensor: one.rows for tensor, one in residuals.items()})
        for tensor, one in residuals.items():
            one.warn_if_rounded_away(tensor)
        hashes = {tensor: one.digest.hexdigest() for tensor, one in residuals.items()}
        write_residual_record(folder / "base", plan.checkpoint.path, factors, hashes, folder / "adapter" / WEIGHTS)
        require_same_start(plan, folder / "base", folder / "adapter")


@ordinary_tensors()
def export_delta(
    base: str | Path,
    factors: FactorSet | str | Path,
    out: str | Path,
    *,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: TaskType | None = None,
) -> None:
    """Write OUT/adapter: a plain LoRA of rank 2r, [0; A] and [B, 0], from which training goes on as from A and B.

    Its product is exactly 0, so the model, which stays as it is and may be quantized, starts unchanged to the bit,
    whatever program loads it. `load_delta` trains A and B alone, r rows a module, and subtracts their frozen start. A
    program that knows PEFT alone trains all of it: the zeros have the gradients of A and B, and A and B move too. What
    either of them saves is a plain LoRA for the original model.

    base: the model that the factors were computed from, a folder or an id on the hub. The other parameters and the
        errors are `export_residual`'s. lora_alpha is that of rank r; adapter_config.json has that of 2r.
    """
    out = Path(out)
    factors = factor_set(factors, base)
    plan = plan_export(
        base,
        factors,
        out,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        task_type=task_type,
        changes_weights=False,
    )
    adapter = plan.adapter.with_base(named_base(plan.checkpoint.path))
    with whole_folder(out) as folder:
        (folder / "adapter").mkdir()
        write_for(plan.checkpoint, folder / "adapter", adapter, _ABOUT_DELTA)
        require_peft_takes(plan, folder / "adapter")
        require_same_start(plan, None, folder / "adapter")


@ordinary_tensors()
def save_adapter(
    model: nn.Module, out: str | Path, base: str | Path, task_type: TaskType | None = None, lora_dropout: float = 0.0
) -> None:
    """Write what a model with attached adapters has learned as PEFT's adapter folder, for the original model.

    For training without PEFT: `attach`, train, `save_adapter`. The folder is a plain LoRA of rank 2r,
    [B, B − B0] [A − A0; A0], as live PeftModels save it, with modules trained whole, such as a head; `convert` gives it
    another rank, `export_merged` merges it. Gather a sharded model first: load its `adapter_state_dict` into a model
    that is not sharded.

    model: also in DDP, torch.compile, AveragedModel, or another module, a LightningModule, say: the names are those of
        the model that saves itself by `save_pretrained` in it. Where something is trained outside of that, they are
        those of the module given, with a warning.
    base: the original model, a folder or its id on the hub; task_type: PEFT's, for loading the adapter.

    Raises TargetError (no adapter is attached, they are sharded, or a parameter is trained for which such a folder has
    no place: a bias or the weight below an adapter), and OutputError.
    """
    if not any(True for _ in adapters(model)):
        raise TargetError(f"{type(model).__name__} has no adapters; call attach(model, factors) before training")
    model = _saved_by_itself(unwrapped_model(model))
    layers = dict(adapters(model))
    for name, layer in layers.items():
        if type(layer.lora_A.weight.data) is not Tensor or layer.lora_A.weight.shape != layer.lora_A.initial.shape:
            raise TargetError(f"{name}: A and B are sharded; load adapter_state_dict(model) into one that is not")
    whole = _trained_whole(model, layers)
    others = {
        f"{KEY_PREFIX}{plain_name(f'{module}.{name}')}": tensor.detach().cpu().contiguous()
        for module in whole
        for name, tensor in model.get_submodule(module).state_dict().items()
    }
    learned = {}
    for name, layer in layers.items():
        A, B = layer.learned()
        learned[plain_name(name)] = (A.cpu(), B.cpu())
    ranks = {name: A.shape[0] for name, (A, _) in learned.items()}
    modules = [plain_name(name) for name, _ in model.named_modules()]
    config = {
        **lora_config(ranks, next(iter(layers.values())).scaling, False, modules),
        **named_base(Path(base)),
        "lora_dropout": lora_dropout,
        "task_type": task_type,
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "modules_to_save": [plain_name(module) for module in whole] or None,
    }
    with whole_folder(Path(out)) as folder:
        write_adapter(folder, Adapter(config, learned, others), _ABOUT_TRAINED)


def _saved_by_itself(model: nn.Module) -> nn.Module:
    """The outermost part with `save_pretrained` that has all adapters, of which `base` is a folder; or all of it."""
    every = {id(layer) for _, layer in adapters(model)}
    inner = next(
        (
            part
            for part in model.modules()
            if hasattr(type(part), "save_pretrained") and every <= {id(one) for one in part.modules()}
        ),
        model,
    )
    own = {id(parameter) for parameter in inner.parameters()}
    outside = [name for name, one in model.named_parameters() if one.requires_grad and id(one) not in own]
    if not outside:
        return inner
    warnings.warn(
        f"{some(outside, most=1)} is trained and is no part of {type(inner).__name__}, so the adapter has the names of "
        f"{type(model).__name__}, and loads onto a model of that class alone; for a LoRA of {type(inner).__name__}, "
        f"give that to save_adapter, and save the rest by itself",
        stacklevel=4,
    )
    return model


def _trained_whole(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """The modules with parameters of their own that are trained. Raises TargetError where adapters are in them."""
    factors = {f"{name}.{linear}" for name in layers for linear in ("lora_A", "lora_B")}
    whole = set()
    for parameter, values in model.named_parameters():
        module = parameter.rpartition(".")[0]
        if not values.requires_grad or module in factors:
            continue
        if any(f"{module}.".startswith(f"{name}.") or not module or name.startswith(f"{module}.") for name in layers):
            raise TargetError(
                f"{plain_name(parameter).replace('.base_layer.', '.')}: it is trained, and a LoRA's folder has no "
                f"place for it, next to an adapter; save the whole model, by its save_pretrained or state_dict, which "
                f"keep it, or freeze it"
            )
        whole.add(module)
    return sorted(whole)
