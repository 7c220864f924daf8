"""What a trainer will do with exported folders, done once before they get their name: PEFT loads them and they run."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..errors import CheckpointError, TargetError, is_out_of_files, is_out_of_memory
from ..model.architecture import architectures
from ..model.aside import aside
from ..model.checkpoint import Checkpoint
from ..model.layout import variant_of
from ..suggestions import some
from .experts import name_of
from .folder import KEY_PREFIX, Adapter
from .live_model import require_called, require_called_by_kernels
from .plan import Plan, module_names

WITHOUT_PEFT = "train with `attach`, which needs no PEFT, and write what was learned by `inilora merge`"

# Loading and running a model of this size takes a second or two; of larger ones the structure alone is tried.
_LARGEST_RUN = 1 << 26

# Of what the adapters do to the output. R's rounding in bfloat16 is a thousandth of it; one adapter of a hundred that
# is not called makes a tenth.
_MOST_ERROR = 0.02


def require_peft_takes(plan: Plan, folder: Path) -> None:
    """Raise TargetError unless PEFT loads this folder as it is meant, and the model calls each module.

    `require_peft_loads`, `require_called`: on the meta device, so that it costs neither memory nor time, whatever the
    model's size.
    """
    if plan.architecture is None or not plan.architecture.layers:
        return
    model = plan.architecture.model
    instead = f"make the factors again without them, or {WITHOUT_PEFT}"
    experts = require_peft_loads(model, folder, plan.adapter, f"{plan.checkpoint.path}: ", instead)
    for require in (require_called, require_called_by_kernels):
        require(model, plan.adapter.factors.keys() - experts)


def require_peft_loads(model: nn.Module, folder: Path, adapter: Adapter, where: str, instead: str) -> set[str]:
    """Raise TargetError unless PEFT puts an adapter of this folder on each module that has factors, and on no other.

    PEFT refuses some modules (Mamba's out_proj), turns others into parameters of experts (DeepSeek's gate_proj), and
    goes on with a warning where it finds no module for a tensor.

    model: on the meta device; it stays as it is. adapter: what is in the folder. where: what messages begin with, and
    instead: what they say to do. Returns which of the adapter's names are parameters of experts.
    """
    where += type(model).__name__
    experts = {name for name, (A, _) in adapter.factors.items() if A.dim() == 3}
    with warnings.catch_warnings(record=True) as caught, aside():
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), torch_device="cpu")
        except Exception as error:  # PEFT raises many kinds
            _require_resources(error, folder)
            raise TargetError(
                f"{where}: PEFT does not take these modules ({' '.join(str(error).split())[:300]}); {instead}"
            ) from error
    layers = {name: layer for name, (_, layer) in _lora_layers(loaded.get_base_model()).items()}
    strange = sorted(
        name for name, layer in layers.items() if not isinstance(layer, ParamWrapper if name in experts else Linear)
    )
    lost = [module for module in adapter.factors if module not in layers]
    if strange or lost or len(layers) != len(adapter.factors):
        odd = [*strange, *lost, *sorted(layers.keys() - adapter.factors.keys())][0]
        raise TargetError(
            f"{where}: PEFT makes something else of these target_modules than a LoRA of each linear layer ({odd}): it "
            f"turns names that experts have too (gate, gate_proj, up_proj, down_proj) into parameters of the experts; "
            f"{instead}"
        )
    unfilled = next((str(one.message) for one in caught if "missing adapter keys" in str(one.message)), None)
    if unfilled:
        raise TargetError(f"{where}: PEFT does not fill all layers of this adapter ({unfilled[:300]}); {instead}")
    return experts


def require_converted_loads(checkpoint: Checkpoint, folder: Path, adapter: Adapter) -> None:
    """`require_peft_loads` for a plain LoRA of this checkpoint, on the first class of model that has all its names.

    Nothing where transformers knows no such class.
    """
    if not checkpoint.config:
        return
    names = {*adapter.factors, *(key.removeprefix(KEY_PREFIX).rpartition(".")[0] for key in adapter.others)}
    for architecture in architectures(checkpoint.config, module_names(checkpoint)):
        if names <= architecture.parameter_names.union(name for name, _ in architecture.model.named_modules()):
            instead = "`inilora merge` writes the full model with what was learned"
            require_peft_loads(architecture.model, folder, adapter, f"{checkpoint.path}: ", instead)
            return


def require_peft_reads_back(base: nn.Module, config: LoraConfig) -> None:
    """Raise TargetError if PEFT would not load again what it saves of this adapter of a live transformers model.

    It renames an adapter's keys by transformers' table of renamed modules, also where the model has the old names
    (Laguna's shared experts), and goes on with a fresh LoRA there. Tried on a copy on the meta device.
    """
    model = _renamed_on_loading(base)
    if model is None:
        return
    where = type(base).__name__
    with warnings.catch_warnings(), aside():
        warnings.simplefilter("ignore")
        try:
            again = get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=True)
        except Exception:  # PEFT has done the same to the live model, so it is the meta device's
            return
        try:
            saved = get_peft_model_state_dict(again, save_embedding_layers=False)
            result: Any = set_peft_model_state_dict(again, saved)
        except Exception as error:  # PEFT raises many kinds
            _require_resources(error, where)
            raise TargetError(
                f"{where}: PEFT does not load what it saves of these modules ({' '.join(str(error).split())[:300]}); "
                f"make the factors again without them, or {WITHOUT_PEFT}"
            ) from error
    paths = {key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in result.missing_keys if ".lora_" in key}
    layers = _lora_layers(again.get_base_model())
    lost = [name for name, (path, _) in layers.items() if path in paths]
    if lost and layers.keys() == _lora_layers(base).keys():
        raise TargetError(
            f"{where}: PEFT saves {some(lost)} under names that it loads into no module, so all that is learned there "
            f"would be lost; make the factors again without {'it' if len(lost) == 1 else 'them'}, or {WITHOUT_PEFT}"
        )


def _renamed_on_loading(base: nn.Module) -> Any:
    """The model once more, on the meta device; None where PEFT renames nothing in it, or nothing is known of it."""
    from transformers import PreTrainedModel

    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers 4
        return None
    renamed: Any = get_checkpoint_conversion_mapping
    if not isinstance(base, PreTrainedModel) or renamed(base.config.model_type) is None:
        return None
    build: Any = type(base)
    try:
        with torch.device("meta"), aside():
            return build(copy.deepcopy(base.config))
    except Exception as error:  # whatever a class raises on the meta device
        _require_resources(error, type(base).__name__)
        return None


def _lora_layers(base: nn.Module) -> dict[str, tuple[str, LoraLayer]]:
    """The paths and layers that have an adapter, by their names in the plain model; experts by the parameter's."""
    every = base.named_modules()
    return {name_of(layer, path): (path, layer) for path, layer in every if isinstance(layer, LoraLayer)}


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
        # ViTMAE draws what it masks, Reformer its hashes: the same in each run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
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
