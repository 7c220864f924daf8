"""What every kind of stored weight offers, and what the quantized kinds share."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import WeightError
from ..files.tensor import StoredTensor

# Values dequantized at a time: few enough for a core's cache, together with everything else the arithmetic needs.
STRIP_VALUES = 1 << 18
# Above this many values torch starts threads, and waiting for them takes longer than the arithmetic on a strip.
SERIAL_VALUES = 1 << 15


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a module as a checkpoint stores it, and how to read its values.

    name: of the parameter in the model ("layers.0.self_attn.q_proj.weight").
    shape: of the parameter's values, usually (out_features, in_features).
    dtype: of what `read` returns.
    dequantization: names the format and whatever else its arithmetic depends on besides the stored tensors; "" where
        the values are stored as they are.
    stored: the tensors that make it up, by their names within the module; the values come first.
    dequantize: the values of a range of rows, from the stored tensors. None where they are stored as they are. A
        quantized weight's are (out_features, in_features) whatever the module's class; quantizers ensure that.
    refusal: why it cannot be read; "" where it can.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dequantization: str
    stored: Mapping[str, StoredTensor]
    dequantize: Callable[[slice], Tensor] | None = None
    refusal: str = ""

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is `in_proj_weight` of torch's MultiheadAttention, which no layer has."""
        return next(iter(self.stored.values())).name.endswith("in_proj_weight")

    @property
    def is_quantized(self) -> bool:
        return self.dequantization != ""

    def read(self, rows: slice = slice(None)) -> Tensor:
        """The values, or rows of them (no step), contiguous and in their own memory. Raises CheckpointError."""
        if self.dequantize is None:
            return next(iter(self.stored.values())).read(rows)
        start, stop, _ = rows.indices(self.shape[0])
        return self.dequantize(slice(start, max(start, stop)))

    def sha256(self) -> str:
        """sha256 (hex) of the stored bytes.

        For a plain tensor, of its bytes. For a quantized weight, of its dequantization and of each tensor's name and
        sha256, one line each: equal hashes mean equal matrices.
        """
        if self.dequantize is None:
            return next(iter(self.stored.values())).sha256()
        lines = [self.dequantization, *(f"{part} {tensor.sha256()}" for part, tensor in sorted(self.stored.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class StoredModule:
    """The stored tensors of one module, by their names in it ("weight", "weight_scale"), and what config.json says.

    quantization: config.json's `quantization_config`, or MLX's `quantization`; empty if there is none.
    metadata: the weight file's own.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    quantization: Mapping[str, Any]
    dtype: torch.dtype
    metadata: Mapping[str, str]

    def has(self, *parts: str) -> bool:
        return all(part in self.tensors for part in parts)


# A format: returns the weight of a module that is stored in it, None for any other module. Raises WeightError for a
# variant that cannot be read.
Format: TypeAlias = Callable[[StoredModule], "StoredWeight | None"]


def in_strips(
    shape: tuple[int, int], dtype: torch.dtype, dequantize: Callable[[slice], Tensor], most: int = STRIP_VALUES
) -> Callable[[slice], Tensor]:
    """Dequantize rows into the result a strip at a time, so that nothing else of its size is in memory.

    most: the values of a strip.
    """
    step = max(1, most // max(1, shape[1]))
    serial = max(1, SERIAL_VALUES // max(1, shape[1]))

    def read(rows: slice) -> Tensor:
        values = torch.empty(rows.stop - rows.start, shape[1], dtype=dtype)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            strip = dequantize(slice(start, stop))
            for first in range(0, len(strip), serial):
                part = strip[first : first + serial]
                place = start - rows.start + first
                values[place : place + len(part)] = part
        return values

    return read


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """values (rows, k) times scale (rows, groups), each of whose columns covers k/groups values; float32."""
    rows, k = values.shape
    product = values.to(torch.float32, copy=True).view(rows, scale.shape[1], -1)
    return product.mul_(scale.to(torch.float32).unsqueeze(-1)).view(rows, k)


def decode_bytes(values: Tensor, scale: Tensor, width: int) -> Tensor:
    """8-bit values (rows, k), floats or integers, times scale (rows, groups), each for `width` columns; float32."""
    every = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(torch.float32)
    out = torch.empty(values.shape, dtype=torch.float32)
    _kernels().decode_bytes(
        values.view(torch.uint8).numpy(),
        every.numpy(),
        scale.to(torch.float32).contiguous().numpy(),
        width,
        out.numpy(),
    )
    return out


def decode_nibbles(packed: Tensor, table: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(table[code] − offset) · scale of 4-bit codes, bytes (rows, k/2), low half first; float32 (rows, k).

    table: the value of each of the 16 codes. scale, offset: (rows, groups); None for no offset.
    """
    scale = scale.to(torch.float32).contiguous()
    offset = torch.zeros_like(scale) if offset is None else offset.to(torch.float32).contiguous()
    out = torch.empty(packed.shape[0], 2 * packed.shape[1])
    _kernels().decode_nibbles(packed.contiguous().numpy(), table.numpy(), offset.numpy(), scale.numpy(), out.numpy())
    return out


def decode_transposed(
    words: Tensor, scale: Tensor, offset: Tensor, group: Tensor, shifts: Sequence[int] | None = None
) -> Tensor:
    """(code − offset) · scale of 4-bit codes that are stored transposed; float32 (columns, k).

    words: int32, 8 codes each. scale, offset: (groups, columns) float32. group: of each of the k rows of codes.
    shifts: the bits at which a word's codes begin, if they are neighbours along the columns; None if along k.
    """
    out = torch.empty(scale.shape[1], len(group))
    arrays = [array.contiguous().numpy() for array in (words, offset, scale, group)]
    if shifts is None:
        _kernels().decode_words_along_k(*arrays, out.numpy())
    else:
        _kernels().decode_words_along_columns(*arrays, torch.tensor(shifts).numpy(), out.numpy())
    return out


def _kernels() -> Any:
    """The kernels that numba compiles; a checkpoint of plain weights does without them."""
    return importlib.import_module("...kernels.cpu.dequantize", __package__)


def nibbles(packed: Tensor) -> Tensor:
    """The 4-bit codes of bytes (rows, n) as uint8 (rows, 2n), the low half of each byte first."""
    codes = torch.empty(*packed.shape, 2, dtype=torch.uint8)
    torch.bitwise_and(packed, 0x0F, out=codes[..., 0])
    torch.bitwise_right_shift(packed, 4, out=codes[..., 1])
    return codes.view(packed.shape[0], -1)


def codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of bytes (rows, n), a dense stream with the lowest bits first; uint8."""
    if bits == 4:
        return nibbles(packed)[:, :count]
    if bits == 8:
        return packed[:, :count]
    first = torch.arange(count) * bits
    place, shift = first // 8, (first % 8).to(torch.int32)
    padded = torch.nn.functional.pad(packed, (0, 1)).to(torch.int32)
    return ((padded[:, place] | padded[:, place + 1] << 8) >> shift & (1 << bits) - 1).to(torch.uint8)


def as_bytes(packed: Tensor) -> Tensor:
    """Packed words (rows, n) as bytes (rows, 4n), in the order of a little-endian machine."""
    return packed.contiguous().view(torch.uint8)


def exponents(scale: Tensor) -> Tensor:
    """A scale as float32; one stored as a bare exponent (uint8, E8M0) is 2^(byte − 127)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def library(name: str, module: StoredModule) -> Any:
    """The library, or a module of it, that defines a format. Raises WeightError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise WeightError(
            f"{module.name}: stored by {package}, which is needed to read it; pip install {package}"
        ) from error


def unreadable(module: StoredModule, reason: str) -> StoredWeight:
    """A weight that exists but cannot be read."""
    tensors = module.tensors
    return StoredWeight(f"{module.name}.weight", (), torch.uint8, "unreadable", tensors, refusal=reason)
