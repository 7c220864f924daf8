"""Whether a result is right for what the files say, by torch, safetensors and PEFT, not by the code under test."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from inilora_kernels import FactorSet


def tensors_of(out: Path) -> dict[str, Tensor]:
    """All tensors of an output, of whichever files, by file and name."""
    found: dict[str, Tensor] = {}
    for file in [out] if out.is_file() else sorted(out.rglob("*")):
        if file.suffix == ".pt":
            content = torch.load(file, weights_only=True)
            found |= {f"{file.name} {key}": value for key, value in content.items() if isinstance(value, Tensor)}
        elif file.is_file() and (file == out or file.suffix == ".safetensors"):
            found |= {f"{file.relative_to(out)} {key}": value for key, value in load_file(file).items()}
    return found


def finite(out: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in tensors_of(out).values() if tensor.is_floating_point())


def values(out: Path) -> list[tuple[tuple[int, ...], str]]:
    """The shapes and bytes of an output's tensors, by whatever names: a config decides those."""
    return sorted((tuple(one.shape), sha256(one)) for one in tensors_of(out).values())


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def explained(reader: str, folder: Path, out: Path, originals: Path) -> str:
    """ "explained" if a result other than the unspoiled input's is right for what the files say now."""
    try:
        right = _JUDGES[reader](folder, out, originals)
    except (SafetensorError, KeyError) as error:
        return f"wrong: {type(error).__name__} {error}"
    return "explained" if right else "wrong"


def _factors_are_of_these_weights(folder: Path, out: Path, originals: Path) -> bool:
    """Each record's sha256 is that of the weight that is there, and its loss is ||W - BA||² of it."""
    weights, factors = load_file(folder / "model/model.safetensors"), FactorSet.load(out)
    for name, part in factors.items():
        W = weights[f"{name}.weight"].double()
        loss = float((W - part.B.double() @ part.A.double()).square().sum())
        if sha256(weights[f"{name}.weight"]) != part.source_sha256 or abs(loss / part.certificate.loss - 1) > 1e-4:
            return False
    return factors.keys() == FactorSet.load(originals / "factors.safetensors").keys()


def _model_is_changed_in_its_targets_alone(folder: Path, out: Path, originals: Path) -> bool:
    """Every tensor that is no target is that of the model that was read; targets are those of the unspoiled model."""
    base = out / "base" if (out / "base").is_dir() else out
    read, written = load_file(folder / "model/model.safetensors"), load_file(base / "model.safetensors")
    targets = {f"{name}.weight" for name in FactorSet.load(originals / "factors.safetensors")}
    whole = load_file(originals / "model/model.safetensors")
    return read.keys() == written.keys() and all(
        sha256(read[name]) == sha256(whole[name] if name in targets else written[name]) for name in read
    )


def _update_is_what_peft_makes_of_it(folder: Path, out: Path, originals: Path) -> bool:
    """s·BA, by PEFT's own reading of what was trained, is the plain LoRA's update, or W' - W."""
    trained = updates(originals / "model", folder / "delta/adapter")
    whole = load_file(originals / "model/model.safetensors")
    if (out / "adapter_config.json").is_file():
        written = updates(originals / "model", out)
    else:
        merged = load_file(out / "model.safetensors")
        written = {name: merged[f"{name}.weight"] - whole[f"{name}.weight"] for name in trained}
    for name, update in trained.items():
        error = (written[name] - update).norm()
        # W' is rounded to float32 at the size of W.
        if not error <= 1e-5 * (update.norm() + whole[f"{name}.weight"].norm()):
            return False
    return written.keys() == trained.keys()


def updates(model: Path, adapter: Path) -> Mapping[str, Tensor]:
    """s·BA of each layer, as PEFT loads the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(adapter)).get_base_model()
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }


def _never(folder: Path, out: Path, originals: Path) -> bool:
    """What these read is checked by sha256, so that nothing but the unspoiled result is right."""
    return False


_JUDGES = {
    "approximate": _factors_are_of_these_weights,
    "approximate by adam": _factors_are_of_these_weights,
    "start": _factors_are_of_these_weights,
    "residual": _model_is_changed_in_its_targets_alone,
    "delta": _never,
    "inspect": _never,
    "authors' files": _never,
    "convert": _update_is_what_peft_makes_of_it,
    "merge": lambda *folders: (
        _update_is_what_peft_makes_of_it(*folders) and _model_is_changed_in_its_targets_alone(*folders)
    ),
    "convert a residual": _never,
}
