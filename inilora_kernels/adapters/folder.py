"""PEFT's adapter folder: its config, by PEFT's own LoraConfig, its tensors, and a model card that says what it is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import FactorFileError
from ..options import fits
from ..places import given_path
from ..storage.atomic import save_tensors
from ..storage.reading import FLOATS, MOST_JSON, absolute, is_there, read_bytes, reporting, require_regular
from ..storage.schema import AdapterConfig, parse
from ..suggestions import near_names, some
from .started import STARTS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_MERGE_INSTEAD = (
    "a LoRA for the original model holds A and B alone: train again without it, or load the adapter the way it was "
    "trained (on the residual base, or `adapter` and `initial` together) and call PEFT's merge_and_unload"
)

# Kinds of LoRA of which BA is not what is added to W, or not to every input: PEFT's fields of its config.
_NOT_PLAIN = ("use_dora", "alora_invocation_tokens", "use_qalora", "use_bdlora")

# Where huggingface_hub keeps a downloaded model: its id and its commit are in the path.
_HUB_CACHE = re.compile(r".*[/\\]models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[^/\\]+)")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as PEFT stores it.

    config: adapter_config.json.
    factors: A (r, in_features) and B (out_features, r) by the module's name in the model. Of a parameter of E experts
        stacks (E, r, in_features) and (E, out_features, r), see expert_folder.py.
    others: fully trained tensors (`modules_to_save`), by their full key.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Tensor]

    def with_base(self, named: Mapping[str, str | None]) -> Adapter:
        """The same adapter for another base model, as `named_base` names it."""
        return replace(self, config={**self.config, **named})

    def scaling(self, module: str) -> float:
        """s of sBA: lora_alpha / r, or lora_alpha / √r with rslora, by the module's own rank and alpha."""
        rank = self.factors[module][0].shape[-2]
        alpha = pattern_value(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def pattern_value(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a module: keys are regular expressions of name endings.

    >>> pattern_value({"layer.0.query": 4}, "encoder.layer.0.query", 8)
    4
    """
    return next((value for key, value in pattern.items() if fits(key, module)), otherwise)


def adapter_path(given: str | Path) -> Path:
    """Where a trained adapter is. Raises FactorFileError for what is no path, such as the model itself."""
    if not isinstance(given, (str, os.PathLike)):
        raise FactorFileError(
            f"the trained adapter is given by its folder, not as a {type(given).__name__}; save it by save_pretrained"
        )
    return given_path(given)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder that PEFT, or a trainer through PEFT, wrote. Raises FactorFileError.

    DoRA and LoRA with a bias are refused, since they add more than BA to W, aLoRA, which adds it to some of the tokens,
    QALoRA and BD-LoRA, whose A and B have other shapes, and a model whose layers PEFT has repeated. So are A and B of
    another rank than the config's, of which scaling and meaning are unknown.
    """
    try:
        for name in (CONFIG, WEIGHTS):
            if not is_there(folder / name):
                raise FactorFileError(
                    f"{folder / name}: no such file{near_names(folder, ()) or _adapters_in(folder)}; give the folder "
                    f"with {CONFIG} and {WEIGHTS} that the trainer saved"
                )
        text = read_bytes(folder / CONFIG, FactorFileError, MOST_JSON)
        require_regular(folder / WEIGHTS, FactorFileError)
        with reporting(folder / WEIGHTS, FactorFileError):
            tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise FactorFileError(f"{folder}: damaged adapter ({error}); save it again") from error
    config = parse(AdapterConfig, text, str(folder / CONFIG))
    settings = config.model_dump()
    kinds = {name: settings[name] for name in _NOT_PLAIN if settings.get(name)}
    if config.peft_type != "LORA" or kinds or config.bias not in (None, "none"):
        found = ", ".join(f"{name} {value}" for name, value in kinds.items())
        found = f"peft_type {config.peft_type}, {found or 'no variant'}, bias {config.bias}"
        raise FactorFileError(f"{folder / CONFIG}: not a plain LoRA ({found}); {_MERGE_INSTEAD}")
    if settings.get("layer_replication"):
        raise FactorFileError(
            f"{folder / CONFIG}: layer_replication {settings['layer_replication']}: PEFT has repeated the base's "
            f"layers for this adapter, so its modules are not those of the original model; merge it by PEFT's "
            f"merge_and_unload"
        )
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    if not modules:
        raise FactorFileError(f"{folder / WEIGHTS}: no lora_A in it; give the folder of a trained LoRA adapter")
    factors = {}
    for module in modules:
        if f"{module}.lora_B.weight" not in tensors:
            raise FactorFileError(f"{folder / WEIGHTS}: {module} has lora_A but no lora_B; save it again")
        A, B = tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            raise FactorFileError(
                f"{folder / WEIGHTS}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, not "
                f"(r, in_features) and (out_features, r); save it again"
            )
        require_trained(A, B, f"{folder / WEIGHTS}: {module}")
        name = module.removeprefix(KEY_PREFIX)
        _require_rank(config, name, A.shape[0], f"{folder / WEIGHTS}: {module}")
        factors[name] = (A, B)
    for key in [key for key in tensors if key.endswith(STARTS)]:  # what get_peft_model_state_dict adds
        del tensors[key]
    strange = [key for key in tensors if "lora_" in key]
    if strange:
        raise FactorFileError(f"{folder / WEIGHTS}: {strange[0]} is neither A nor B; {_MERGE_INSTEAD}")
    # Inf may be meant, in a buffer that masks.
    broken = [key for key, value in tensors.items() if value.dtype in FLOATS and value.isnan().any()]
    if broken:
        raise FactorFileError(f"{folder / WEIGHTS}: {broken[0]} holds NaN; take an earlier checkpoint")
    return Adapter(settings, factors, tensors)


def _require_rank(config: AdapterConfig, module: str, found: int, where: str) -> None:
    """Raise FactorFileError if A has another rank than adapter_config.json says; of experts, a multiple of it."""
    rank = int(pattern_value(config.rank_pattern or {}, module, config.r))
    if found != rank and (found % rank or not config.model_dump().get("target_parameters")):
        raise FactorFileError(
            f"{where} has A of rank {found}, and {CONFIG} says {rank}: they do not belong together; save by the "
            f"model's own save_pretrained, which writes both"
        )


def _adapters_in(folder: Path) -> str:
    """'; there is one in folder/name' for adapters below, where PEFT saves those that are not called default."""
    below = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
    return f"; there is one in {some(below)}" if below else ""


def require_trained(A: Tensor, B: Tensor, where: str) -> None:
    """Raise FactorFileError unless A and B are finite numbers that were trained. where: names them in the message."""
    for factor in (A, B):
        if factor.dtype not in FLOATS:
            kind = str(factor.dtype).removeprefix("torch.")
            raise FactorFileError(f"{where} is stored as {kind}; save A and B in float32, float16 or bfloat16")
        if not factor.isfinite().all():
            raise FactorFileError(f"{where} holds NaN or Inf; take an earlier checkpoint")


def write_adapter(folder: Path, adapter: Adapter, about: str) -> None:
    """Write an adapter into an existing folder, as this version of PEFT writes it, with a model card.

    about: what the card says of it, in Markdown.
    """
    known = {field.name for field in fields(LoraConfig)} - {"peft_type", "peft_version"}
    try:
        config = LoraConfig(**{name: value for name, value in adapter.config.items() if name in known})
    except (TypeError, ValueError) as error:
        raise FactorFileError(f"{CONFIG}: PEFT does not accept it ({error}); save the adapter again") from error
    for name in (
        "target_modules",
        "exclude_modules",
    ):  # PEFT has made sets of these, whose order differs from run to run
        if isinstance(getattr(config, name, None), set):
            setattr(config, name, sorted(getattr(config, name)))
    config.save_pretrained(str(folder), auto_mapping_dict=adapter.config.get("auto_mapping"))
    tensors = {}
    for module, (A, B) in adapter.factors.items():
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = A.contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = B.contiguous()
    save_tensors(folder / WEIGHTS, {**tensors, **adapter.others})
    pipeline = "text-generation" if config.task_type == "CAUSAL_LM" else None
    write_card(folder, config.base_model_name_or_path, about, pipeline=pipeline)


def write_card(folder: Path, base: str | None, about: str, pipeline: str | None = None) -> None:
    """Write the model card of an adapter, with the fields that PEFT's own cards have.

    base: the name or path of the model that it is for; a path means nothing elsewhere and is left out.
    about: in Markdown. pipeline: the hub's `pipeline_tag`.
    """
    on_hub = base if base is not None and not Path(base).is_absolute() else None
    tags = ["lora", "inilora", *([f"base_model:adapter:{on_hub}"] if on_hub else [])]
    data = ModelCardData(library_name="peft", tags=tags, base_model=on_hub, pipeline_tag=pipeline)
    (folder / "README.md").write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{about}\n")), encoding="utf-8")


def named_base(folder: Path) -> dict[str, str | None]:
    """How adapter_config.json names a model: its hub id and commit if this is the hub's cache, otherwise its full path.

    folder: the model's; what is no folder is taken for an id, "org/name" or "org/name@revision".

    >>> named_base(Path("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123abcd"))
    {'base_model_name_or_path': 'org/model', 'revision': '0123abcd'}
    """
    match = _HUB_CACHE.fullmatch(str(folder.absolute()))
    if match:
        name, revision = match["id"].replace("--", "/", 1), match["commit"]
        return {"base_model_name_or_path": name, "revision": revision}
    if is_there(folder) or folder.is_absolute():
        return {"base_model_name_or_path": str(absolute(folder)), "revision": None}
    name, _, revision = folder.as_posix().partition("@")
    return {"base_model_name_or_path": name, "revision": revision or None}
