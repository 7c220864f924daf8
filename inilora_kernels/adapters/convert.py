"""After training: back to the original model, as a plain LoRA next to it or merged into it.

A model that was started in memory saves a plain LoRA of rank 2r, `save_adapter` too, and so does PEFT from what
`export_delta` wrote. What PEFT saves from a residual's folder is A and B alone: together with the factors they started
from, A0 and B0, they are the update

    ΔW = s(BA − B0A0) = s [B, B − B0] [A − A0; A0]

of the original W, whichever form they were trained in: a LoRA of rank 2r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FactorFileError, OptionError, TargetError, WeightError
from ..factor_set import FactorSet, factor_set
from ..model.checkpoint import Checkpoint
from ..model.experts import ExpertParameter
from ..storage.atomic import require_new_folder, whole_folder
from ..storage.reading import is_there
from ..suggestions import some
from ..torch_defaults import ordinary_tensors
from .base import expert_parameters, find_original
from .diffusers_folder import named_as, read_diffusers, write_for
from .expert_folder import unwrapped
from .folder import CONFIG, KEY_PREFIX, Adapter, adapter_path, named_base, read_adapter
from .model_copy import Change, copy_model, size_of_copy
from .modules import Start, find_starts, module_of
from .rehearsal import require_converted_loads
from .started import difference
from .trained_whole import find_trained_whole

_ABOUT = (
    "A plain LoRA for the original model, made by `inilora convert` from a LoRA that started from the pretrained "
    "weights."
)

# Below this cosine between the trained A and the factors' A, training hardly started from these factors.
_UNRELATED = 0.5


@ordinary_tensors()
def convert(
    trained: str | Path,
    factors: FactorSet | str | Path,
    out: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    insist: bool = False,
) -> dict[str, float]:
    """Write a trained adapter as a plain LoRA for the original model, which PEFT loads and merges like any other.

    The result has the trained adapter's key names and fully trained modules, scaling 1 and one rank: 2r, or `rank`.
    Programs that serve LoRAs (vLLM, SGLang) read r and lora_alpha alone, so it has no patterns and no rslora;
    modules of a smaller rank are padded with zeros. Sums are taken in float64, A and B written in float32.

    trained: the adapter folder that a trainer saved, in either form.
    factors: those that it started from, or the path of their file.
    out: a folder to create.
    base: the original model, a folder or an id on the hub ("org/name", "org/name@revision"), or the residual folder
        that the adapter was trained on, if it is not where the adapter's config says.
    rank: recompress ΔW to this rank by its singular value decomposition, the nearest there is; None: exactly 2r.
    insist: accept the factors even if the adapter does not seem to have started from them.

    Returns the truncation error of each module, ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, all 0 without `rank`.

    Raises FactorFileError (the factors are of another model or another run; the folder holds no plain LoRA, or NaN),
    WeightError (an update leaves float32's range), OptionError (rank; the base cannot be found), TargetError (PEFT
    would load it onto other modules, or onto none), CheckpointError and OutputError, and then leaves nothing behind.
    """
    trained, out = adapter_path(trained), Path(out)
    if rank is not None and rank < 1:
        raise OptionError(f"rank={rank}: it must be at least 1")
    require_new_folder(out)
    factors = factor_set(factors, base)
    adapter = _read(trained, factors)
    checkpoint, _, residual = find_original(adapter.config, factors, base)
    whole = sum(tensor.nbytes for tensor in adapter.others.values())
    # Of rank 2r in float32, or of the rank that is asked for: all of each row of A and column of B.
    pairs = adapter.factors.values()
    most = max(max(2 * A.shape[-2], min(A.shape[-1], B.shape[-2])) for A, B in pairs)
    if rank is not None and rank > most:
        raise OptionError(f"rank={rank}: no update of this adapter has a rank above {most}; take that or less")
    written = sum((rank or 2 * A.shape[-2]) * (A.numel() + B.numel()) // A.shape[-2] for A, B in pairs)
    require_new_folder(out, whole + 4 * written)
    updates, _ = _updates(trained, adapter, factors, checkpoint, residual, insist)
    errors = dict.fromkeys(updates, 0.0)
    if rank is not None:
        for module, (A, B) in updates.items():
            A, B, errors[module] = recompress(A, B, rank)
            updates[module] = (A, B)
    common = rank or max(A.shape[-2] for A, _ in updates.values())
    padded = {module: _pad(A, B, common) for module, (A, B) in updates.items()}
    for module, pair in padded.items():
        if not all(factor.isfinite().all() for factor in pair):
            raise WeightError(f"{trained}: the update of {module} leaves float32's range; take an earlier checkpoint")
    config = {
        **adapter.config,
        **named_base(checkpoint.path),
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if isinstance(config.get("target_modules"), str):  # SGLang reads a list of names, no regular expression
        config["target_modules"] = sorted(updates)
    with whole_folder(out) as folder:
        converted = Adapter(config, padded, adapter.others)
        write_for(checkpoint, folder, converted, _ABOUT)
        require_converted_loads(checkpoint, folder, converted)
    return errors


@ordinary_tensors()
def export_merged(
    trained: str | Path,
    factors: FactorSet | str | Path,
    out: str | Path,
    base: str | Path | None = None,
    insist: bool = False,
) -> None:
    """Write the original model with a trained adapter merged into it: W + ΔW, summed in float32, in W's dtype.

    Config, tokenizer and all other tensors are copied as they are, some rows of one tensor in memory at a time. An
    embedding that was trained by itself, although the model shares it with its output layer, gets a tensor of its own,
    and config.json says so.

    Parameters and errors are those of `convert`; FactorFileError too if a module trained whole has no tensor in the
    base, WeightError if a weight is quantized or the sum leaves the range of its dtype, TargetError if ΔW would change
    a weight that other modules share.
    """
    trained, out = adapter_path(trained), Path(out)
    require_new_folder(out)
    factors = factor_set(factors, base)
    adapter = _read(trained, factors)
    checkpoint, tensors, residual = find_original(adapter.config, factors, base, whole=True)
    require_new_folder(out, size_of_copy(checkpoint))
    updates, modules = _updates(trained, adapter, factors, checkpoint, residual, insist)
    transposed = {tensors[module_of(name)]: part.transposed for name, part in factors.items()}
    changes: dict[str, Change] = {}
    live = {}
    experts = expert_parameters(checkpoint, factors)
    for module, update in updates.items():
        tensor = tensors[modules[module]]
        if modules[module] in experts:
            changes |= _plus_experts(checkpoint, experts[modules[module]], *update)
            if experts[modules[module]].is_fused:
                live[module] = tensor
            continue
        weight = checkpoint.weights[tensor]
        if weight.is_quantized:
            raise WeightError(
                f"{checkpoint.path}: {tensor} is quantized ({weight.dequantization}), so W + ΔW cannot be written in "
                f"its place; use `inilora convert`, and merge the adapter into the original model"
            )
        if tensor in changes:
            raise TargetError(
                f"{checkpoint.path}: {tensor} is the weight of several layers with an adapter each, and cannot hold "
                f"all of their updates; use `inilora convert` and load the adapter next to the model"
            )
        changes[tensor] = _plus(*update, transposed[tensor])
        live[f"{module}.weight"] = tensor
    others = {key.removeprefix(KEY_PREFIX): value for key, value in adapter.others.items()}
    whole = find_trained_whole(checkpoint, live, others)
    for tensor, value in whole.values.items():
        changes[tensor] = functools.partial(_instead, value)
    with whole_folder(out) as folder:
        copy_model(checkpoint, folder, changes, whole.untied)


def _read(trained: Path, factors: FactorSet) -> Adapter:
    """What was trained, saved by PEFT or by diffusers, under the names that the factors have.

    Raises FactorFileError, also where a folder has both, and they differ: which was trained cannot be told.
    """
    by_diffusers = read_diffusers(trained)
    if by_diffusers is None:
        return unwrapped(read_adapter(trained), factors, str(trained))
    if is_there(trained / CONFIG):
        by_peft = read_adapter(trained)
        there = by_peft.factors.keys() == by_diffusers.factors.keys()
        if not there or any(
            not (torch.equal(A, by_diffusers.factors[name][0]) and torch.equal(B, by_diffusers.factors[name][1]))
            for name, (A, B) in by_peft.factors.items()
        ):
            raise FactorFileError(
                f"{trained}: PEFT's file and diffusers' hold different adapters; remove the one that was not trained"
            )
    return named_as(by_diffusers, dict.fromkeys(map(module_of, factors)))


def _plus(A: Tensor, B: Tensor, transposed: bool) -> Change:
    """Rows of W as stored, plus those of BA."""

    def rows(start: int, W: Tensor) -> Tensor:
        stop = start + len(W)
        update = A[:, start:stop].T @ B.T if transposed else B[start:stop] @ A
        return (W.float() + update.float()).to(W.dtype)

    return rows


def _plus_experts(checkpoint: Checkpoint, parameter: ExpertParameter, A: Tensor, B: Tensor) -> dict[str, Change]:
    """Change each stored tensor of a parameter of experts by its part of B_e A_e, stacks (E, r, k) and (E, d, r)."""
    if parameter.dequantization:
        raise WeightError(
            f"{checkpoint.path}: {parameter.name} is quantized ({parameter.dequantization}), so W + ΔW cannot be "
            f"written in its place; use `inilora convert`, and merge the adapter into the original model"
        )
    if parameter.is_fused:

        def experts(start: int, W: Tensor) -> Tensor:
            update = B[start : start + len(W)] @ A[start : start + len(W)]
            return (W.float() + (update.mT if parameter.turned else update).float()).to(W.dtype)

        return {parameter.stored[0][0].name: experts}
    changes: dict[str, Change] = {}
    for number, parts in enumerate(parameter.stored):
        first = 0
        for part in parts:
            changes[part.name] = _plus(A[number], B[number, first : first + part.shape[0]], False)
            first += part.shape[0]
    return changes


def _instead(value: Tensor, start: int, rows: Tensor) -> Tensor:
    return (value[start : start + len(rows)] if value.dim() else value).to(rows.dtype)


def recompress(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest factors of a smaller rank to BA (Eckart–Young), balanced, and the relative error ‖BA − B'A'‖/‖BA‖.

    By QR of B and Aᵀ and the SVD of a small core; BA itself is never formed.

    A: (r, k), B: (d, r), or stacks of them. Returns A' (rank, k), B' (d, rank), padded with zeros where BA has a
    smaller rank.

    >>> A, B = torch.eye(2, 3, dtype=torch.float64), torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> A1, B1, error = recompress(A, B, 1)
    >>> (B1 @ A1).abs().round(decimals=6) + 0, round(error, 6)
    (tensor([[0., 0., 0.], [0., 4., 0.]], dtype=torch.float64), 0.6)
    """
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(left_core @ right_core.mT)
    total = float(S.norm())
    error = float(S[..., rank:].norm()) / total if total else 0.0
    root = S[..., :rank].sqrt()
    A1, B1 = root[..., None] * (Vh[..., :rank, :] @ right.mT), (left @ U[..., :rank]) * root[..., None, :]
    A, B = _pad(A1, B1, rank, A.dtype)
    return A, B, error


def _pad(A: Tensor, B: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[-2]
    return F.pad(A, (0, 0, 0, missing)).to(dtype), F.pad(B, (0, missing)).to(dtype)


def _updates(
    trained: Path,
    adapter: Adapter,
    factors: FactorSet,
    checkpoint: Checkpoint,
    residual: frozenset[str] | None,
    insist: bool,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Factors A' (2r, k) and B' (d, 2r) of each module's ΔW, float64, and the module's name in the factor set.

    Training may have covered only some of the modules that have factors (`layers_to_transform`, frozen towers).
    """
    shapes = {module: (*B.shape[:-1], A.shape[-1]) for module, (A, B) in adapter.factors.items()}
    try:
        fits = functools.partial(_started_from, adapter)
        starts = find_starts(shapes, factors, str(trained), checkpoint.config, partial=True, fits=fits)
    except TargetError as error:
        raise FactorFileError(f"the adapter did not start from these factors: {error}") from error
    updates = {}
    ends = {}
    for module, start in starts.items():
        scaling = adapter.scaling(module)
        A0, B0 = start.scaled(scaling)
        A, B = adapter.factors[module]
        root = math.sqrt(scaling)
        if A.shape[-2] == 2 * start.rank:
            if not (insist or _started_from(adapter, module, start)):
                raise FactorFileError(
                    f"{trained}: {module} has twice the rank of the factors, as a started model saves it, so it is a "
                    f"plain LoRA already, which started from other factors than these; load it as it is, or give the "
                    f"factors that it started from"
                )
            updates[module] = (root * A.double(), root * B.double())
            continue
        if A.shape[-2] != start.rank:
            raise FactorFileError(
                f"{trained}: {module} has rank {A.shape[-2]}, the factors have {start.rank}; "
                f"give the factors that it started from"
            )
        if residual is None:
            # A trainer may keep A and B in bfloat16 (TRL does on a quantized base): then what was subtracted in
            # training is A0 and B0 in bfloat16 too. A residual on disk was computed from the float32 ones.
            A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
        ends[module] = (A.double(), B.double(), A0.double(), B0.double())
        A1, B1 = difference(*ends[module])
        updates[module] = (root * A1, root * B1)
    if ends and not insist:
        _require_related(trained, ends)
    modules = {module: module_of(start.names[0]) for module, start in starts.items()}
    untrained = sorted({module_of(name) for name in factors} - set(modules.values()))
    if residual and any(f"{module}.weight" in residual for module in untrained):
        raise FactorFileError(
            f"{trained}: the base that it was trained on holds R for {some(untrained, most=1)}, and "
            f"the adapter has no A and B there, so it was trained on another model than the original; train all of the "
            f"exported adapter, or export the factors of those modules alone"
        )
    return updates, modules


def _started_from(adapter: Adapter, module: str, start: Start) -> bool:
    """Whether a module's A is still near the one of these factors rather than that of others.

    The plain LoRA of twice the rank has A0 below A − A0, and PEFT alone may have trained it too.
    """
    A = adapter.factors[module][0][..., -start.rank :, :]
    if A.shape != start.A.shape:
        return False
    A, A0 = A.double(), start.A.double()
    return _cosine(float((A * A0).sum()), float(A.norm() * A0.norm())) > _UNRELATED


def _require_related(trained: Path, ends: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Raise FactorFileError if neither A nor the product BA is near where the factors say it started.

    The product counts too, since factors of the same product in another basis (another seed's) serve as well.
    """
    nearness = {"A": 0.0, "BA": 0.0}
    for A, B, A0, B0 in ends.values():
        nearness["A"] += _cosine(float((A * A0).sum()), float(A.norm() * A0.norm()))
        # ⟨BA, B0A0⟩ and the norms from r×r matrices.
        inner = float(((B0.mT @ B) * (A0 @ A.mT)).sum())
        norms = [math.sqrt(max(0.0, float(((Y.mT @ Y) * (X @ X.mT)).sum()))) for X, Y in ((A, B), (A0, B0))]
        nearness["BA"] += _cosine(inner, norms[0] * norms[1])
    means = {name: total / len(ends) for name, total in nearness.items()}
    if max(means.values()) < _UNRELATED:
        raise FactorFileError(
            f"{trained}: neither its A nor its BA is near the factors' (mean cosine {means['A']:.2f} and "
            f"{means['BA']:.2f}), so it hardly started from them, and the result would be off by all of their BA; "
            f"give the factors that training started from, load what `inilora convert --rank` wrote as the plain LoRA "
            f"that it is, or insist (--insist, insist=True)"
        )


def _cosine(inner: float, norms: float) -> float:
    return inner / norms if norms else 0.0
