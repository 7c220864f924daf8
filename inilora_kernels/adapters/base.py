"""The model that factors were computed from: found again, and compared by its weights, before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from ..errors import FactorFileError, OptionError, TargetError
from ..factor_set import FactorSet
from ..model.architecture import describe
from ..model.checkpoint import Checkpoint, open_checkpoint
from ..model.experts import ExpertParameter, find_expert_parameters, parameter_of_expert
from ..model.location import located, near_models
from ..model.names import match_names
from ..model.needed import tensors_of_modules, tensors_read
from ..model.residual import RESIDUAL_RECORD, residual_record
from ..storage.reading import read_bytes
from ..storage.schema import ResidualRecord
from .folder import named_base
from .modules import module_of


def require_same_base(checkpoint: Checkpoint, factors: FactorSet) -> dict[str, str]:
    """Return the checkpoint's tensor of each module, after comparing its sha256 with the one that the factors record.

    Raises FactorFileError if the factors were computed from other weights, or do not say which.
    """
    experts = expert_parameters(checkpoint, factors)
    modules = list(dict.fromkeys(module_of(name) for name in factors if not parameter_of_expert(name)))
    tensors = tensors_of_modules(checkpoint.weights, modules, str(checkpoint.path))
    tensors |= {name: parameter.name for name, parameter in experts.items()}
    for name, part in factors.items():
        if not part.source_sha256:
            raise FactorFileError(
                f"{name}: these factors do not record which weight they were computed from; "
                f"load them with their base: FactorSet.load(folder, base), or --base"
            )
    # Parts of a fused weight record the whole one's.
    recorded: dict[str, set[str]] = {}

    def compare(tensor: str, sha256: str, expected: Collection[str]) -> None:
        for other in set(expected) - {sha256}:
            raise FactorFileError(
                f"{checkpoint.path}: {tensor} is not the weight that these factors were computed from "
                f"(sha256 {sha256[:12]}… here, {other[:12]}… in the factors); give the base model that "
                f"`inilora approximate` read, in the same dtype, or compute factors from this one"
            )

    for name, part in factors.items():
        tensor = tensors[module_of(name)]
        if parameter_of_expert(name):
            sha256 = experts[module_of(name)].sha256(int(name.rpartition(":")[2]))
            compare(tensor, sha256, [part.source_sha256])
        else:
            recorded.setdefault(tensor, set()).add(part.source_sha256)
    checkpoint.hash_each(recorded, lambda tensor, sha256: compare(tensor, sha256, recorded[tensor]))
    return tensors


def expert_parameters(checkpoint: Checkpoint, factors: FactorSet) -> dict[str, ExpertParameter]:
    """Return the checkpoint's parameter of experts of each one in the factors, by its name there.

    Raises FactorFileError where it has none, or not as many experts as there are factors for.
    """
    counts = Counter(parameter for name in factors if (parameter := parameter_of_expert(name)))
    if not counts:
        return {}
    modules = [name.removesuffix(".weight") for name in checkpoint.weights if name.endswith(".weight")]
    architecture = describe(checkpoint.config, modules) if checkpoint.config else None
    there = {one.name: one for one in find_expert_parameters(checkpoint, architecture)}
    try:
        names = match_names(list(counts), there, str(checkpoint.path))
    except TargetError as error:
        raise FactorFileError(f"the factors are not of this model: {error}") from error
    for parameter, count in counts.items():
        one = there[names[parameter]]
        if not len(one.stored) == one.count == count:
            raise FactorFileError(
                f"{checkpoint.path}: {one.name} has {one.count} experts, and there are factors for {count}; compute "
                f"factors from this model, of all of its experts"
            )
    return {parameter: there[name] for parameter, name in names.items()}


def factors_sha256(factors: FactorSet) -> str:
    """Return the sha256 (hex) of all names, A and B: which factors these are."""
    digest = hashlib.sha256()
    for name, part in sorted(factors.items()):
        digest.update(name.encode())
        for factor in (part.A, part.B):
            digest.update(factor.contiguous().numpy().data)
    return digest.hexdigest()


def require_original(model: Any) -> None:
    """Raise OptionError if this is no model, or one loaded from a residual folder, that holds R where W is expected."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: was given a {type(model).__name__}; give the model first, then its factors")
    record = residual_record(_loaded_from(model))
    if record is not None:
        raise OptionError(
            f"{model.name_or_path}: this model holds R = W − sBA, and a start would subtract from it once more; load "
            f"the original ({record.base}), or take this one with its adapter, by load_residual"
        )


def require_residual(model: Any, folder: Path) -> ResidualRecord:
    """Return the record of the residual that a live model was loaded from. Raises OptionError if that is not folder."""
    wanted, found = residual_record(folder), residual_record(_loaded_from(model))
    if wanted is None:
        raise OptionError(f"{folder}: no residual model; give the folder that export_residual wrote")
    if found != wanted:
        raise OptionError(
            f"{getattr(model, 'name_or_path', '') or type(model).__name__}: this model is not the residual, so the "
            f"adapter would add BA to the wrong weights; load it from {folder}"
        )
    return wanted


def _loaded_from(model: Any) -> Path | None:
    name = getattr(model, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def write_residual_record(
    folder: Path, original: Path, factors: FactorSet, residual_sha256: Mapping[str, str], adapter: Path
) -> None:
    """Record in a residual folder which model and which factors it was computed from.

    residual_sha256: of R in each target's place, by the tensor's name. They identify the folder as a residual later; a
        merged model that carries a copy of the record (Axolotl makes one) is not mistaken for it.
    adapter: the file with its A and B, as they start.
    """
    record = {
        "base": "@".join(part for part in named_base(original).values() if part),
        "source_sha256": {name: part.source_sha256 for name, part in factors.items()},
        "factors_sha256": factors_sha256(factors),
        "residual_sha256": dict(residual_sha256),
        "adapter_sha256": sha256_of_file(adapter),
    }
    (folder / RESIDUAL_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def find_original(
    config: Mapping[str, Any], factors: FactorSet, base: str | Path | None, whole: bool = False
) -> tuple[Checkpoint, dict[str, str], frozenset[str] | None]:
    """Return the original model of a trained adapter, checked, and its tensor of each module.

    config: the adapter's, which names the model that it was trained on.
    base: what the user names: an original, a folder or an id on the hub, or a residual folder.
    whole: whether a model on the hub is needed with all of its files, not only the weights that have factors.

    The last value names the tensors that a residual folder replaces by R, if the adapter was trained on one; None if it
    was trained on the model itself. Raises FactorFileError (factors of another model, or another residual),
    OptionError (no such model here) and CheckpointError.
    """
    named = config.get("base_model_name_or_path")
    trained_on = _local(named, config.get("revision")) if named else None
    record = residual_record(trained_on)
    if record is not None and record.factors_sha256 != factors_sha256(factors):
        raise FactorFileError(
            f"{trained_on}: the adapter was trained on the residual of other factors than these; "
            f"give the factor file that `inilora export` read"
        )
    original = located(base) if base is not None else Path(record.base) if record is not None else trained_on
    if base is None and record is None and trained_on is not None and named and not os.path.isdir(named):
        # By its id: of what is in the hub's cache, some shards may be missing.
        original = Path("@".join(part for part in (named, config.get("revision")) if part))
    # A path that is not absolute may be the id of a model on the hub, which open_checkpoint looks up.
    may_be_id = original is not None and not original.is_absolute()
    if original is None or not (may_be_id or os.path.exists(original)):
        raise OptionError(
            f"cannot find the original model ({original or named or 'the adapter names none'})"
            f"{near_models(original) if original else ''}; give its folder, or its id on the hub, as "
            f"base"
        )
    given = residual_record(original)
    if given is not None:
        original = Path(given.base)
    needed = None if whole else tensors_read(factors, str(original))
    checkpoint = open_checkpoint(original, choose=needed)
    record = given or record
    return checkpoint, require_same_base(checkpoint, factors), frozenset(record.residual_sha256) if record else None


def sha256_of_file(file: Path) -> str:
    return hashlib.sha256(read_bytes(file, FactorFileError)).hexdigest()


def _local(name: str, revision: str | None) -> Path | None:
    """The folder of a model: a path, or a hub model that has been downloaded."""
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
