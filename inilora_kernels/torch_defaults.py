"""What the caller has set as torch's defaults must not decide where or how numbers are computed here.

Everything that this library creates names its dtype. The device of what it creates on the host is the CPU, also in a
script that calls torch.set_default_device("cuda").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def created_on_the_cpu() -> Iterator[None]:
    """Within: new tensors are on the CPU unless they name a device."""
    if torch.get_default_device().type == "cpu":
        # Entering a device costs every call to torch a little, for nothing here.
        yield
        return
    with torch.device("cpu"):
        yield
