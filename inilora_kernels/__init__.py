"""LoRA factors that start from the pretrained weights: B·A ≈ W for every target matrix, with a certificate.

from inilora_kernels import approximate_model
factors = approximate_model("path/to/model", rank=8)
factors.save("factors.safetensors")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .suggestions import did_you_mean
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters.attach import (
        adapter_state_dict,
        attach,
        detach,
        load_adapter_state_dict,
        merge,
        trainable_parameters,
        unmerge,
    )
    from .adapters.convert import convert, export_merged
    from .adapters.export import export_delta, export_residual, save_adapter
    from .adapters.peft import initialize_peft, load_delta, load_residual
    from .approximate import approximate, approximate_model, approximate_ranks
    from .errors import InitializationError
    from .factor_set import FactorSet
    from .factors import Certificate, Factors
    from .lora_start import lora_config_of, lora_model
    from .storage.authors_folder import save_inilora_pt

__all__ = [
    "Certificate",
    "FactorSet",
    "Factors",
    "InitializationError",
    "adapter_state_dict",
    "approximate",
    "approximate_model",
    "approximate_ranks",
    "attach",
    "convert",
    "detach",
    "export_delta",
    "export_merged",
    "export_residual",
    "initialize_peft",
    "load_adapter_state_dict",
    "load_delta",
    "load_residual",
    "lora_config_of",
    "lora_model",
    "merge",
    "save_adapter",
    "save_inilora_pt",
    "trainable_parameters",
    "unmerge",
]

# Imported when first used: torch, transformers and peft take seconds, and --help needs none of them.
_MODULES = {
    "Certificate": "factors",
    "FactorSet": "factor_set",
    "Factors": "factors",
    "InitializationError": "errors",
    "approximate": "approximate",
    "approximate_model": "approximate",
    "approximate_ranks": "approximate",
    "adapter_state_dict": "adapters.attach",
    "attach": "adapters.attach",
    "convert": "adapters.convert",
    "detach": "adapters.attach",
    "export_delta": "adapters.export",
    "export_merged": "adapters.convert",
    "export_residual": "adapters.export",
    "initialize_peft": "adapters.peft",
    "load_adapter_state_dict": "adapters.attach",
    "load_delta": "adapters.peft",
    "load_residual": "adapters.peft",
    "lora_config_of": "lora_start",
    "lora_model": "lora_start",
    "merge": "adapters.attach",
    "save_adapter": "adapters.export",
    "save_inilora_pt": "storage.authors_folder",
    "trainable_parameters": "adapters.attach",
    "unmerge": "adapters.attach",
}


class _Package(ModuleType):
    """`approximate` is the function: importing the module of that name must not put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "approximate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, _MODULES)}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(f"{name} needs peft: pip install 'inilora-kernels[peft]'") from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
