"""What a trainer will do with exported folders, done once before they get their name: PEFT loads them and they run."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from torch import Tensor

from ..errors import CheckpointError, TargetError, is_out_of_files, is_out_of_memory
from ..model.aside import aside
from ..model.checkpoint import Checkpoint
from ..model.layout import variant_of
from .experts import name_of
from .live_model import require_called, require_called_by_kernels
from .plan import Plan

# Loading and running a model of this size takes a second or two; of larger ones the structure alone is tried.
_LARGEST_RUN = 1 << 26

# Of what the adapters do to the output. R's rounding in bfloat16 is a thousandth of it; one adapter of a hundred that
# is not called makes a tenth.
_MOST_ERROR = 0.02


def require_peft_takes(plan: Plan, folder: Path) -> None:
    """Raise TargetError unless PEFT puts an adapter of this folder on each module that has factors, and on no other.

    PEFT refuses some modules (Mamba's out_proj), turns others into parameters of experts (DeepSeek's gate_proj), and
    goes on with a warning where it finds no module for a tensor. The model has to call each module too:
    `require_called`. All this on the meta device, so that it costs neither memory nor time, whatever the model's size.
    """
    if plan.architecture is None or not plan.architecture.layers:
        return
    experts = {name for name, (A, _) in plan.adapter.factors.items() if A.dim() == 3}
    model = copy.deepcopy(plan.architecture.model)
    where = f"{plan.checkpoint.path}: {type(model).__name__}"
    with warnings.catch_warnings(record=True) as caught, aside():
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        except Exception as error:  # PEFT raises many kinds
            _require_resources(error, folder)
            raise TargetError(
                f"{where}: PEFT does not take these modules ({' '.join(str(error).split())[:300]}); make the factors "
                f"again without them, or train with `attach`, which needs no PEFT"
            ) from error
    for require in (require_called, require_called_by_kernels):
        require(plan.architecture.model, plan.adapter.factors.keys() - experts)
    layers = {
        name_of(layer, name): layer
        for name, layer in loaded.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    strange = sorted(
        name for name, layer in layers.items() if not isinstance(layer, ParamWrapper if name in experts else Linear)
    )
    lost = [module for module in plan.adapter.factors if module not in layers]
    if strange or lost or len(layers) != len(plan.adapter.factors):
        odd = [*strange, *lost, *sorted(layers.keys() - plan.adapter.factors.keys())][0]
        raise TargetError(
            f"{where}: PEFT makes something else of these target_modules than a LoRA of each linear layer ({odd}): it "
            f"turns names that experts have too into parameters of the experts; make the factors again without gate, "
            f"gate_proj, up_proj and down_proj, or train with `attach`, which needs no PEFT"
        )
    unfilled = next((str(one.message) for one in caught if "missing adapter keys" in str(one.message)), None)
    if unfilled:
        raise TargetError(f"{where}: PEFT does not fill all layers of this adapter ({unfilled[:300]}); use `attach`")


def require_same_start(plan: Plan, base: Path | None, adapter: Path) -> None:
    """Raise TargetError if a small model, loaded by transformers and PEFT, has not the original's output at step 0.

    base: the folder of the model to load, None for the original, which may be stored as transformers alone does not
        load it; adapter: the one to put on it. Both models are run in float32 on the same random input. The error is
        compared with what the adapter does, which of the delta form is nothing.
    """
    tensors = plan.checkpoint.tensors.values()
    size = 4 * sum(math.prod(entry.shape) for entry in tensors)
    if plan.architecture is None or plan.checkpoint.absent or size > _LARGEST_RUN:
        return
    # Running these may take a GPU's kernels, and the delta form, the only one of them, adds exactly 0.
    if any(weight.is_quantized for weight in plan.checkpoint.weights.values()):
        return
    model_class = type(plan.architecture.model)
    config = plan.architecture.config
    with warnings.catch_warnings(), aside():
        warnings.simplefilter("ignore")
        original = _load(model_class, plan.checkpoint, None, config)
        expected = _output(original)
        if expected is None:
            return
        loaded = original if base is None else _load(model_class, plan.checkpoint, base, config)
        model: Any = PeftModel.from_pretrained(loaded, str(adapter), torch_device="cpu").eval()
        started = _output(model.get_base_model())
        with model.disable_adapter():  # R's output, in the residual form
            off = _output(model.get_base_model())
    if started is None or off is None:
        raise TargetError(
            f"{plan.checkpoint.path}: {model_class.__name__} does not run with these adapters, so one of these modules "
            f"is no linear layer; make the factors again without it"
        )
    error, effect = float((started - expected).norm()), float((off - expected).norm())
    if not error <= max(_MOST_ERROR * effect, 1e-6 * float(expected.norm())):
        raise TargetError(
            f"{plan.checkpoint.path}: {model_class.__name__}, loaded from these folders, would start "
            f"{error / float(expected.norm()):.1%} off the original's output on random input, so it does not call each "
            f"of these modules as a linear layer; make the factors again without those that it does not"
        )


def _load(model_class: Any, checkpoint: Checkpoint, folder: Path | None, config: Any) -> Any:
    """The checkpoint, however it is stored; with a folder, that one, as its user loads it."""
    config = copy.deepcopy(config)
    try:
        # transformers before 4.56 has another name for the argument dtype.
        if folder is None:
            tensors = {name: checkpoint.tensors[name].read() for name in checkpoint.tensors}
            return model_class.from_pretrained(None, config=config, state_dict=tensors).float().eval()
        return model_class.from_pretrained(folder, config=config, variant=variant_of(folder)).float().eval()
    except Exception as error:  # whatever transformers raises on a folder
        _require_resources(error, folder or checkpoint.path)
        raise CheckpointError(
            f"{folder or checkpoint.path}: transformers does not load it ({' '.join(str(error).split())[:300]}); "
            f"config.json and weights do not belong together"
        ) from error


def _require_resources(error: Exception, what: Path | str) -> None:
    """Raise CheckpointError for an error that says nothing of the model: there is no memory, or no more open files."""
    if is_out_of_memory(error) or is_out_of_files(error):
        raise CheckpointError(
            f"{what}: cannot be loaded and run as its user will ({' '.join(str(error).split())[:300]}); free some "
            f"memory, or raise the limits of this process (ulimit)"
        ) from error


@torch.no_grad()
def _output(model: Any) -> Tensor | None:
    """Its first output on random input, float64; None where it cannot be run on what can be guessed of its inputs."""
    try:
        output = model(**_inputs(model))
    except Exception as error:  # whatever a model raises on input that is not meant for it
        _require_resources(error, "the model")
        return None
    first = next((value for value in output.values() if isinstance(value, Tensor)), None)
    return None if first is None or not first.is_floating_point() else first.double()


def _inputs(model: Any) -> dict[str, Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    name = model.main_input_name
    if name == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = vision.image_size if isinstance(vision.image_size, int) else max(vision.image_size)
        return {name: torch.randn(1, getattr(vision, "num_channels", 3), size, size, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(1, 8000, generator=generator)}
    ids = torch.randint(config.get_text_config().vocab_size, (2, 7), generator=generator)
    return {name: ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
