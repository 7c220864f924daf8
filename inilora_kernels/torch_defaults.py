"""What the caller has set as torch's defaults must not decide where or how numbers are computed here.

Everything that this library creates names its dtype. The device of what it creates on the host is the CPU, also in a
script that calls torch.set_default_device("cuda"); and factors can be trained, also where torch.inference_mode() was on
when they were computed, which holds for one thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Within: new tensors can be trained, and are on the CPU unless they name a device."""
    with trainable_tensors():
        if torch.get_default_device().type == "cpu":
            # Entering a device costs every call to torch a little, for nothing here.
            yield
            return
        with torch.device("cpu"):
            yield


@contextmanager
def trainable_tensors() -> Iterator[None]:
    """Within: new tensors can be trained. On the caller's device, which a model's own code may count on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
