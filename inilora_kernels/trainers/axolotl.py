"""Axolotl's plugin: a few lines of YAML start its LoRA from factors.

    plugins:
      - inilora_kernels.trainers.axolotl.FactorsPlugin
    inilora_factors: factors.safetensors

Axolotl asks a plugin for callbacks once the model is loaded, patched and adapted. The start is such a callback: it
sees the PeftModel even where TRL makes it (DPO, IPO, KTO), and merging, inference and `axolotl chat`, which load the
trained adapter without a trainer, are left alone.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from ..errors import OptionError
from .callback import StartFromFactors

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class FactorsArguments(BaseModel):
    """What the plugin reads from Axolotl's YAML.

    inilora_factors: the factor file. inilora_form: "delta", or "residual", which goes with Axolotl's LoRA kernels.
    """

    inilora_factors: str
    inilora_form: Literal["delta", "residual"] = "delta"


class FactorsPlugin(BasePlugin):  # type: ignore[misc]
    """Starts Axolotl's LoRA from factors; see the module's docstring.

    Raises OptionError before the model is loaded for what cannot be right: no LoRA, an adapter to go on from
    (`lora_model_dir`), ReLoRA, FSDP's loading on one process alone, and kernels that bypass PEFT's forward pass where
    the form is delta. What `initialize_peft` refuses is refused before the first step.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Turn off the LoRA kernels that Axolotl turns on by itself where the form is delta and none is asked for."""
        if cfg.get("inilora_form", "delta") == "delta" and all(cfg.get(name) is None for name in KERNELS):
            cfg.update(dict.fromkeys(KERNELS, False))

    def get_input_args(self) -> str:
        return f"{__name__}.{FactorsArguments.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.merge_lora or cfg.inference:
            return  # of the trained adapter, which is a plain LoRA for the original model
        if cfg.adapter not in ("lora", "qlora"):
            raise OptionError(f"adapter: {cfg.adapter}: factors start a LoRA; set adapter: lora or qlora")
        if cfg.lora_model_dir:
            raise OptionError(
                f"lora_model_dir: {cfg.lora_model_dir} and inilora_factors: the factors would overwrite that adapter; "
                f"leave lora_model_dir out (resume_from_checkpoint resumes a run), or leave this plugin out"
            )
        if cfg.relora:
            raise OptionError("relora: its restarts would drop the factors' start; leave it out")
        if (cfg.fsdp_config or {}).get("cpu_ram_efficient_loading"):
            raise OptionError(
                "fsdp_config: cpu_ram_efficient_loading gives the weights to one process alone, and each must start "
                "its LoRA; set it to false"
            )
        kernels = [name for name in KERNELS if cfg[name]]
        if kernels and cfg.inilora_form == "delta":
            raise OptionError(
                f"{', '.join(kernels)}: these kernels read A and B alone and would add BAx without subtracting B0A0x; "
                f"set them to false, or inilora_form: residual"
            )

        self.start = StartFromFactors(cfg.inilora_factors, cfg.inilora_form)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        return [self.start]
