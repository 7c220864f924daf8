"""After training: back to the original model, as a plain LoRA beside it or merged into it.

What a trainer saves is A and B alone. Together with the factors they started from, A0 and B0, they are the update

    ΔW = s(BA − B0A0) = s [B, B − B0] [A − A0; A0]

of the original W, whichever form they were trained in: a LoRA of rank 2r.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FactorFileError, OptionError, TargetError, WeightError
from ..factor_set import FactorSet
from ..model.checkpoint import Checkpoint, open_checkpoint
from ..storage.atomic import require_new_folder, whole_folder
from .export import RESIDUAL_RECORD, factors_sha256, require_same_base
from .folder import KEY_PREFIX, Adapter, copy_model, read_adapter, write_adapter
from .layer import difference
from .modules import Start, find_starts, module_of

# Below this cosine between the trained A and the factors' A, they are hardly the ones that training started from.
_UNRELATED = 0.5


def convert(
    trained: str | Path,
    factors: FactorSet,
    out: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Write a trained adapter as a plain LoRA for the original model, which PEFT loads and merges as any other.

    The result has the trained one's key names and modules trained whole, scaling 1 and one rank: 2r, or `rank`.
    Programs that serve LoRAs (vLLM, SGLang) read r and lora_alpha alone, so there are no patterns and no rslora in it;
    modules of a smaller rank are filled up with zeros. Sums are taken in float64, A and B written in float32.

    trained: the adapter folder that a trainer saved, in whichever form.
    factors: those that it started from.
    out: a folder to make.
    base: the original model's folder, or the residual one that the adapter was trained on, if it is not where the
        adapter's config says.
    rank: recompress ΔW to this rank by its singular value decomposition, the nearest there is; None: exactly 2r.

    Returns the truncation error of each module, ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, all 0 without `rank`.

    Raises FactorFileError (the factors are of another model, or of another run; the folder is no plain LoRA),
    OptionError (rank; no base to be found), CheckpointError and OutputError; nothing is left behind then.
    Warns if the adapter does not look as if it had started from these factors.
    """
    trained, out = Path(trained), Path(out)
    if rank is not None and rank < 1:
        raise OptionError(f"rank={rank}: it must be at least 1")
    require_new_folder(out)
    adapter = read_adapter(trained)
    checkpoint, _, on_residual = _original(adapter, factors, base)
    updates = _updates(trained, adapter, factors, checkpoint, on_residual)
    errors = dict.fromkeys(updates, 0.0)
    if rank is not None:
        for module, (A, B) in updates.items():
            A, B, errors[module] = recompress(A, B, rank)
            updates[module] = (A, B)
    common = rank or max(A.shape[0] for A, _ in updates.values())
    padded = {module: _pad(A, B, common) for module, (A, B) in updates.items()}
    config = {
        **adapter.config,
        "base_model_name_or_path": str(checkpoint.path.resolve()),
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if isinstance(config.get("target_modules"), str):  # SGLang reads a list of names, no regular expression
        config["target_modules"] = sorted(updates)
    with whole_folder(out) as folder:
        write_adapter(folder, Adapter(config, padded, adapter.others))
    return errors


def export_merged(trained: str | Path, factors: FactorSet, out: str | Path, base: str | Path | None = None) -> None:
    """Write the original model with a trained adapter merged into it: W + ΔW, summed in float32, in W's dtype.

    Config, tokenizer and all other tensors are copied as they are, one tensor in memory at a time. Parameters and
    errors are those of `convert`; FactorFileError too if a module trained whole has no tensor in the base.
    """
    trained, out = Path(trained), Path(out)
    require_new_folder(out)
    adapter = read_adapter(trained)
    checkpoint, tensors, on_residual = _original(adapter, factors, base)
    updates = _updates(trained, adapter, factors, checkpoint, on_residual)
    transposed = {tensors[module_of(name)]: part.transposed for name, part in factors.items()}
    by_tensor = dict(zip(dict.fromkeys(tensors.values()), updates, strict=True))
    for tensor in by_tensor:
        weight = checkpoint.weights[tensor]
        if weight.is_quantized:
            raise WeightError(
                f"{checkpoint.path}: {tensor} is quantized ({weight.dequantization}), so W + ΔW cannot be written in "
                f"its place; use `inilora convert`, and merge the adapter into the original model"
            )
    whole = _trained_whole(adapter, checkpoint, next(iter(by_tensor.items())))

    def change(tensor: str, W: Tensor) -> Tensor:
        if tensor in whole:
            return whole[tensor].to(W.dtype)
        A, B = updates[by_tensor[tensor]]
        update = (B @ A).float()
        return (W.float() + (update.T if transposed[tensor] else update)).to(W.dtype)

    with whole_folder(out) as folder:
        copy_model(checkpoint, folder, [*by_tensor, *whole], change)


def recompress(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest factors of a smaller rank to BA (Eckart–Young), balanced, and the relative error ‖BA − B'A'‖/‖BA‖.

    By QR of B and Aᵀ and the SVD of a small core: BA itself is never formed.

    A: (r, k), B: (d, r). Returns A' (rank, k), B' (d, rank), filled up with zeros where BA has a smaller rank.

    >>> A, B = torch.eye(2, 3, dtype=torch.float64), torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> A1, B1, error = recompress(A, B, 1)
    >>> (B1 @ A1).abs().round(decimals=6) + 0, round(error, 6)
    (tensor([[0., 0., 0.], [0., 4., 0.]], dtype=torch.float64), 0.6)
    """
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(left_core @ right_core.T)
    total = float(S.norm())
    error = float(S[rank:].norm()) / total if total else 0.0
    root = S[:rank].sqrt()
    A, B = _pad(root[:, None] * (Vh[:rank] @ right.T), (left @ U[:, :rank]) * root, rank, A.dtype)
    return A, B, error


def _pad(A: Tensor, B: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return F.pad(A, (0, 0, 0, missing)).to(dtype), F.pad(B, (0, missing)).to(dtype)


def _updates(
    trained: Path, adapter: Adapter, factors: FactorSet, checkpoint: Checkpoint, on_residual: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors A' (2r, k) and B' (d, 2r) of each module's ΔW, float64, in the factor set's order."""
    shapes = {module: (B.shape[0], A.shape[1]) for module, (A, B) in adapter.factors.items()}
    try:
        starts = find_starts(shapes, factors, str(trained), checkpoint.config)
    except TargetError as error:
        raise FactorFileError(f"the adapter did not start from these factors: {error}") from error
    without = [module for module in adapter.factors if module not in starts]
    if without:
        raise FactorFileError(
            f"{trained}: {without[0]} and {len(without) - 1} more of its modules have no factors; "
            f"give the factors that it started from"
        )
    updates = {}
    for module, start in starts.items():
        A, B = adapter.factors[module]
        if A.shape[0] != start.rank:
            raise FactorFileError(
                f"{trained}: {module} has rank {A.shape[0]}, the factors have {start.rank}; "
                f"give the factors that it started from"
            )
        scaling = adapter.scaling(module)
        A0, B0 = start.scaled(scaling)
        if not on_residual:
            # A trainer may keep A and B in bfloat16 (TRL does on a quantized base): then what was subtracted in
            # training is A0 and B0 in bfloat16 too. A residual on disk was made of the float32 ones.
            A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
        A1, B1 = difference(A.double(), B.double(), A0.double(), B0.double())
        root = math.sqrt(scaling)
        updates[module] = (root * A1, root * B1)
    _warn_if_unrelated(trained, adapter, starts)
    return updates


def _warn_if_unrelated(trained: Path, adapter: Adapter, starts: Mapping[str, Start]) -> None:
    cosines = [
        F.cosine_similarity(adapter.factors[module][0].float().flatten(), start.A.flatten(), dim=0)
        for module, start in starts.items()
    ]
    cosine = float(torch.stack(cosines).mean())
    if cosine < _UNRELATED:
        warnings.warn(
            f"{trained}: its A is far from the factors' A (mean cosine {cosine:.2f}); "
            f"make sure that training started from these factors",
            stacklevel=4,
        )


def _original(adapter: Adapter, factors: FactorSet, base: str | Path | None) -> tuple[Checkpoint, dict[str, str], bool]:
    """The original model that the factors are of, checked, its tensor of each module, and whether the adapter was
    trained on a residual folder of it."""
    named = adapter.config.get("base_model_name_or_path")
    trained_on = _local(str(named)) if named else None
    record = _record(trained_on)
    if record is not None and record.get("factors_sha256") != factors_sha256(factors):
        raise FactorFileError(
            f"{trained_on}: the adapter was trained on the residual of other factors than these; "
            f"give the factor file that `inilora export` read"
        )
    original = Path(base) if base is not None else Path(record["base"]) if record is not None else trained_on
    if original is None or not original.exists():
        raise OptionError(
            f"cannot find the original model ({original or named or 'the adapter names none'}); give its folder as base"
        )
    given = _record(original)
    if given is not None:
        original = Path(given["base"])
    checkpoint = open_checkpoint(original)
    return checkpoint, require_same_base(checkpoint, factors), record is not None or given is not None


def _record(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / RESIDUAL_RECORD).is_file():
        return None
    return dict(json.loads((folder / RESIDUAL_RECORD).read_text(encoding="utf-8")))


def _local(name: str) -> Path | None:
    """The folder of a model: a path, or a hub model that was downloaded before."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _trained_whole(adapter: Adapter, checkpoint: Checkpoint, example: tuple[str, str]) -> dict[str, Tensor]:
    """The tensors of modules trained whole, by their name in the checkpoint, whose prefix one known pair tells."""
    tensor, live = example
    stored = tensor.removesuffix(".weight")
    added = live.removesuffix(stored) if live.endswith(stored) else ""
    taken = stored.removesuffix(live) if stored.endswith(live) else ""
    whole = {}
    for key, value in adapter.others.items():
        name = taken + key.removeprefix(KEY_PREFIX).removeprefix(added)
        entry = checkpoint.tensors.get(name)
        if entry is None or entry.shape != tuple(value.shape):
            raise FactorFileError(
                f"{checkpoint.path}: no tensor {name} of shape {tuple(value.shape)}, which training has made; "
                f"use `inilora convert`, then PEFT's merge_and_unload, which knows the model's class"
            )
        whole[name] = value
    return whole
