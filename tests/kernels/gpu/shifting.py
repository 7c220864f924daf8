"""Buffers that only 64-bit offsets find the way back to."""

from __future__ import annotations

import torch


class Shifted:
    """A buffer whose address is that of an element 2³³ before its first."""

    SHIFT = 2**33

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.dtype, self.device, self.shape = buffer.dtype, buffer.device, buffer.shape

    def data_ptr(self) -> int:
        return self.buffer.data_ptr() - self.SHIFT * self.buffer.element_size()
