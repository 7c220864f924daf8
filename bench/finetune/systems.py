"""The systems that are compared: a pretrained model prepared for training, by the method's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from inilora_kernels import approximate_model
from inilora_kernels.adapters.attach import attach

from .run import Run

# Names that transformers gives to the head that a classifier adds to a pretrained model; it is new, so it trains.
HEADS = ("classifier", "score")

# The adapters of Table 1, in the terms of AdapterHub's `adapters`: Houlsby et al. (2019) after attention and after
# the feed-forward layer, Pfeiffer et al. (2021) after the feed-forward layer, Rücklé et al. (2021) the same but not in
# the first five layers, and Lin et al. (2020) after the layer norm that follows, with one of its own.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("DoubleSeqBnConfig", {}),
    "pfeiffer": ("SeqBnConfig", {}),
    "adapterdrop": ("SeqBnConfig", {"leave_out": [0, 1, 2, 3, 4]}),
    "lin": (
        "SeqBnConfig",
        {"ln_before": True, "original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
    ),
}


def prepare(run: Run, model: Path, labels: int) -> tuple[nn.Module, dict[str, float]]:
    """The model with its trainable parameters, in float32, and what is to be recorded of its factors.

    labels: of the head; 0: a language model, which has none.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, run.dtype)}
    if run.dropout is not None:
        options |= {"hidden_dropout_prob": run.dropout, "attention_probs_dropout_prob": run.dropout}
    if run.attention is not None:
        options["attn_implementation"] = run.attention
    # The head's random start is the same for every method: nothing random comes before it.
    torch.manual_seed(run.seed)
    if labels:
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, **options)
    else:
        network = AutoModelForCausalLM.from_pretrained(model, **options)
    found: dict[str, float] = {}
    if run.method == "full":
        network.requires_grad_(True)
    elif run.method == "bitfit":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))
    elif run.method in ADAPTERS:
        _add_adapter(network, run.method, run.rank)
    else:
        found = _attach_factors(network, run, model)
    for name in HEADS:
        if isinstance(head := getattr(network, name, None), nn.Module):
            head.requires_grad_(True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network, found


def _attach_factors(network: nn.Module, run: Run, model: Path) -> dict[str, float]:
    targets = None
    if run.first_layer:
        layers = range(run.first_layer, network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        targets = rf".*\.({'|'.join(map(str, layers))})\.self_attn\.(q_proj|v_proj)"
    factors = approximate_model(
        model,
        rank=run.rank,
        target_modules=targets,
        method=run.method,
        solver=run.solver,
        steps=run.steps,
        init_std=run.init_std,
        seed=run.seed if run.factors_seed is None else run.factors_seed,
        progress=False,
    )
    attach(network, factors, form=run.form)  # type: ignore[arg-type]
    certificates = [one.certificate for one in factors.values()]
    loss = sum(certificate.loss for certificate in certificates)
    optimum = sum(certificate.optimum for certificate in certificates)
    return {
        "loss": loss,
        "kept": 1 - loss / sum(certificate.energy for certificate in certificates),
        "excess": loss / optimum - 1,
    }


def _add_adapter(network: Any, method: str, width: int) -> None:
    try:
        import adapters
    except ImportError as error:
        raise SystemExit(
            f"{method}: AdapterHub's `adapters` is not installed. Its releases need transformers 4, so it has an "
            "environment of its own: make bench-finetune-adapters"
        ) from error
    name, options = ADAPTERS[method]
    adapters.init(network)
    factor = network.config.hidden_size / width
    network.add_adapter("task", config=getattr(adapters, name)(reduction_factor=factor, **options))
    network.train_adapter("task")
