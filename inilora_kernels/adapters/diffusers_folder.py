"""LoRAs in the layout of diffusers' loaders: one file, with the names of the pipeline's models.

    pytorch_lora_weights.safetensors    unet.….to_q.lora_A.weight, unet.….to_q.lora_B.weight, text_encoder.…

`pipe.load_lora_weights(folder)` reads it for a pipeline. A single model's has no prefix:
`unet.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")`. Ranks and alphas are in
the file's metadata, where there are any: many training scripts save `.lora.down.weight`, `.lora.up.weight` and no
alpha, in whose place diffusers takes the rank.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FactorFileError
from ..factor_set import FactorSet
from ..model.checkpoint import Checkpoint
from ..storage.atomic import save_tensors
from ..storage.factor_file import METADATA_KEY
from ..storage.reading import is_there, read_json, reporting, require_regular
from ..suggestions import some
from .expert_folder import wrapped
from .folder import Adapter, pattern_value, require_trained, write_adapter, write_card
from .modules import without

WEIGHTS = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_A = re.compile(r"(?P<module>.+)\.(lora_A|lora\.down|lora_linear_layer\.down)\.weight")
_B = re.compile(r"(?P<module>.+)\.(lora_B|lora\.up|lora_linear_layer\.up)\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# Wan's second denoiser: `load_lora_weights` passes over it too, unless load_into_transformer_2 says a file is for it.
_BY_AN_OPTION = frozenset({"transformer_2"})


def is_diffusers(checkpoint: Checkpoint) -> bool:
    """Whether this is a pipeline of diffusers, or one of its models."""
    return _is_pipeline(checkpoint) or "_diffusers_version" in (checkpoint.config or {})


def _is_pipeline(checkpoint: Checkpoint) -> bool:
    return is_there(checkpoint.path / "model_index.json")


def write_for(checkpoint: Checkpoint, folder: Path, adapter: Adapter, about: str) -> None:
    """Write an adapter for this base into an existing folder, as the libraries that load the base read it.

    PEFT's files; for a model of diffusers its file too; for a pipeline, which PEFT does not load, its file alone.
    """
    if not _is_pipeline(checkpoint):
        write_adapter(folder, replace(adapter, factors=wrapped(adapter.factors)), about)
    else:
        write_card(folder, adapter.config.get("base_model_name_or_path"), about)
    if is_diffusers(checkpoint):
        _write(folder, adapter, _is_pipeline(checkpoint))


def loaded_by_pipeline(checkpoint: Checkpoint, factors: FactorSet) -> FactorSet:
    """The factors of those models of a pipeline to which its `load_lora_weights` gives adapters.

    It passes over others without a word: T5 in Flux and Stable Diffusion 3, every text encoder of most video pipelines,
    Wan 2.2's second denoiser.
    Warns of what is left out. Raises TargetError where nothing is left. Without diffusers all are kept.
    """
    index = read_json(checkpoint.path / "model_index.json") if _is_pipeline(checkpoint) else {}
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError:
        return factors
    pipeline = str(index.get("_class_name"))
    parts = getattr(getattr(diffusers, pipeline, None), "_lora_loadable_modules", None)
    if parts is None:
        return factors
    parts = [part for part in parts if part not in _BY_AN_OPTION]
    left_out = [name for name in factors if name.partition(".")[0] not in parts]
    if not left_out:
        return factors
    loads = f"{pipeline} loads adapters for {', '.join(parts)} alone"
    instead = "give that model's own folder as the base"
    return without(
        factors,
        set(left_out),
        f"{checkpoint.path}: left out {some(left_out, most=1)}: {loads}; to train others, {instead}",
        f"{checkpoint.path}: {loads}, and the factors are of other models ({left_out[0]}, …); {instead}",
    )


def _write(folder: Path, adapter: Adapter, prefixed: bool) -> None:
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    parts: dict[str, dict[str, int]] = {}
    for module, (A, B) in adapter.factors.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A.contiguous(), B.contiguous()
        part, _, name = module.partition(".") if prefixed else ("", "", module)
        # Older text encoders have this in front of their names; diffusers strips it, in the tensors alone.
        parts.setdefault(part, {})[name.removeprefix("text_model.")] = A.shape[0]
    for part, ranks in parts.items():
        first = next(iter(ranks.values()))
        others = {name: rank for name, rank in ranks.items() if rank != first}
        settings = {
            "r": first,
            "lora_alpha": first,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
        }
        described |= {f"{part}.{key}".removeprefix("."): value for key, value in settings.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(described, indent=2, sort_keys=True)}
    save_tensors(folder / WEIGHTS, tensors, metadata)


def read_diffusers(folder: Path) -> Adapter | None:
    """Read what diffusers or one of its training scripts saved; None if there is no such file.

    The config has an alpha for each module, since each may be scaled differently. Raises FactorFileError.
    """
    file = folder if os.path.isfile(folder) else folder / WEIGHTS
    if not is_there(file):
        return None
    require_regular(file, FactorFileError)
    try:
        with reporting(file, FactorFileError), safe_open(file, "pt") as opened:
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
            described = json.loads(metadata.get(_METADATA, "null"))
    except (SafetensorError, ValueError, RecursionError) as error:
        if file.suffix != ".safetensors":
            raise FactorFileError(f"{file}: no adapter; give the folder that the trainer saved") from error
        raise FactorFileError(f"{file}: damaged adapter ({error}); save it again") from error
    if METADATA_KEY in metadata:
        raise FactorFileError(f"{file}: a factor file, where training starts; give what the trainer saved")
    A, B, alphas = (
        {match["module"]: tensors[key] for key in tensors if (match := pattern.fullmatch(key))}
        for pattern in (_A, _B, _ALPHA)
    )
    strange = next((key for key in tensors if not any(one.fullmatch(key) for one in (_A, _B, _ALPHA))), None)
    if strange or not A or A.keys() != B.keys():
        raise FactorFileError(
            f"{file}: {strange or 'no A and B for each module'}: not a plain LoRA in diffusers' own names; load it in "
            f"diffusers and save it by save_lora_weights"
        )
    factors = {}
    for module in A:
        if A[module].dim() != 2 or B[module].dim() != 2 or A[module].shape[0] != B[module].shape[1]:
            raise FactorFileError(
                f"{file}: {module} has A {tuple(A[module].shape)} and B {tuple(B[module].shape)}; only linear layers "
                f"can be converted"
            )
        require_trained(A[module], B[module], f"{file}: {module}")
        factors[module] = (A[module], B[module])
    alpha = {
        module: float(alphas[module]) if module in alphas else _alpha(described, module, pair[0].shape[0])
        for module, pair in factors.items()
    }
    first = next(iter(factors.values()))[0].shape[0]
    config = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": first,
        "rank_pattern": {re.escape(module): pair[0].shape[0] for module, pair in factors.items()},
        "alpha_pattern": {re.escape(module): value for module, value in alpha.items()},
        "target_modules": sorted(factors),
        "bias": "none",
    }
    return Adapter(config, factors, {})


def _alpha(described: Mapping[str, Any] | None, module: str, rank: int) -> float:
    """A module's alpha according to the file's metadata; without one, diffusers takes the rank."""
    part, _, name = module.partition(".")
    prefix = f"{part}." if f"{part}.r" in (described or {}) else ""
    settings = {key.removeprefix(prefix): value for key, value in (described or {}).items() if key.startswith(prefix)}
    if "lora_alpha" not in settings:
        return rank
    name = name if prefix else module
    alpha = pattern_value(settings.get("alpha_pattern") or {}, name, settings["lora_alpha"])
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def named_as(adapter: Adapter, modules: Mapping[str, Any]) -> Adapter:
    """The adapter with the names that the factors have: those of a text encoder may lack `text_model.`."""

    def name(module: str) -> str:
        part, _, rest = module.partition(".")
        return next((one for one in (f"{part}.text_model.{rest}", f"text_model.{module}") if one in modules), module)

    named = {module: module if module in modules else name(module) for module in adapter.factors}
    patterns = {
        key: {re.escape(new): adapter.config[key][re.escape(old)] for old, new in named.items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    factors = {named[module]: pair for module, pair in adapter.factors.items()}
    return Adapter({**adapter.config, **patterns, "target_modules": sorted(factors)}, factors, {})
