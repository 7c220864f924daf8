"""Runs the Triton kernels as numpy inside an ordinary test run, by triton's own interpreter.

TRITON_INTERPRET=1 must be set before triton is imported, which a test run shared with others cannot promise. Wrapping
the very same functions in the interpreter's class does what the variable does, for these tests alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from inilora_kernels.kernels.gpu import gram as triton_gram
from inilora_kernels.kernels.gpu import gram_batch as triton_gram_batch
from inilora_kernels.kernels.gpu import kernels as triton_kernels
from inilora_kernels.kernels.gpu import loss as triton_loss
from inilora_kernels.kernels.gpu import wave as triton_wave

GRADIENT_PRODUCTS = InterpretedFunction(triton_kernels.gradient_products_kernel.fn)
ADAM = InterpretedFunction(triton_kernels.adam_kernel.fn)
LOSS = InterpretedFunction(triton_loss.loss_kernel.fn)
GRAM = InterpretedFunction(triton_gram.gram_kernel.fn)


class DeviceFunction(InterpretedFunction):
    """A function of triton's language that a kernel calls; it leaves the language as it found it.

    InterpretedFunction's own call patches it anew each time and for good, which slows every later call and would break
    whatever is compiled afterwards.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*arguments, **options)
        finally:
            scope.restore()


SUM = DeviceFunction(tl.sum.fn)


_convert_float = interpreter._convert_float


def _rounded(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Its conversion between float formats, but float32 to bfloat16 rounded to nearest, as GPUs do: it truncates."""
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(values.view(np.float32).copy()).bfloat16()
        return rounded.view(torch.uint16).numpy()
    return _convert_float(values, source, target, rounding)


@contextmanager
def interpreted(
    gradient_products: object = GRADIENT_PRODUCTS,
    adam: object = ADAM,
    seed: int | None = None,
    gram: object = GRAM,
) -> Iterator[None]:
    """Within: the kernels run interpreted, on CPU tensors. seed: run each launch's programs in a shuffled order."""
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx
    orders: dict[int, list[int]] = {}
    shuffle = random.Random(seed)

    def set_shuffled(x: int, y: int, z: int) -> None:
        count = builder.grid_dim[0]
        if x == 0:
            orders[count] = shuffle.sample(range(count), count)
        set_index(orders[count][x], y, z)

    with (
        mock.patch.object(triton_kernels, "gradient_products_kernel", gradient_products),
        mock.patch.object(triton_kernels, "adam_kernel", adam),
        mock.patch.object(triton_wave, "gradient_products_kernel", gradient_products),
        mock.patch.object(triton_wave, "adam_kernel", adam),
        mock.patch.object(triton_wave, "loss_kernel", LOSS),
        mock.patch.object(triton_gram_batch, "gram_kernel", gram),
        mock.patch.object(tl, "sum", SUM),
        mock.patch.object(interpreter, "_convert_float", _rounded),
        mock.patch.object(builder, "set_grid_idx", set_index if seed is None else set_shuffled),
    ):
        yield
