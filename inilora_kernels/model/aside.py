"""Models that we build for their structure or for a trial, aside from the user's own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

# Of a model, besides twenty for each weight in its checkpoint.
_MOST_MODULES = 20_000


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Build models within that the user did not ask for: without transformers' reports, and in one piece.

    In a script that trains under ZeRO-3, DeepSpeed shards every new model among the processes.
    """
    import transformers

    before = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _without_transformers_sharding(), _without_deepspeed_sharding():
            yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _without_transformers_sharding() -> Iterator[None]:
    """As if there were no HfDeepSpeedConfig, because of which transformers shards what it builds."""
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    config = None if reference is None else reference()
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


@contextlib.contextmanager
def _without_deepspeed_sharding() -> Iterator[None]:
    """Outside of the `deepspeed.zero.Init` around the caller, as deepspeed.initialize leaves it."""
    partitioning: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if not hasattr(partitioning, "restore_init_context"):
        yield
        return
    partitioning.shutdown_init_context()
    try:
        yield
    finally:
        partitioning.restore_init_context()


@contextlib.contextmanager
def modules_for(weights: int) -> Iterator[None]:
    """End the building of a model by an error once it has far more modules than weights: a config may ask for any."""
    count, most = 0, _MOST_MODULES + 20 * weights

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"config.json describes more than {most:,} modules, and there are {weights:,} weights")

    handle = torch.nn.modules.module.register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
