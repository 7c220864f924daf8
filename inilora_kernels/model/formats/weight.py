"""What every kind of stored weight offers, and what the quantized kinds share."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, InitializationError, WeightError
from ...kernels.threads import share
from ...memory import empty
from ...storage.reading import reporting
from ..files.tensor import StoredTensor, reader

# Values dequantized at a time: no more than a few MiB of packed ones, but as many as that allows: between strips
# a thread waits for Python's lock, and some schedulers leave one that was waiting on a busy core for milliseconds.
LEAST_IN_STRIP, MOST_IN_STRIP = 1 << 19, 1 << 22
_STRIPS_A_THREAD = 2
# Two threads gain at most a third, and take several times as long where a machine runs both on one core for a while.
_LEAST_THREADS = 4


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
    def _first(self) -> StoredTensor:
        return next(iter(self.stored.values()))

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is `in_proj_weight` of torch's MultiheadAttention, which no layer has."""
        return self._first.name.endswith("in_proj_weight")

    @property
    def plain(self) -> StoredTensor | None:
        """The tensor that holds the values as they are; None where they have to be dequantized."""
        return self._first if self.dequantize is None else None

    @property
    def is_quantized(self) -> bool:
        return self.dequantization != ""

    def read(self, rows: slice = slice(None)) -> Tensor:
        """The values, or rows of them (no step), contiguous and in their own memory. Raises CheckpointError."""
        if self.dequantize is None:
            return self._first.read(rows)
        start, stop, _ = rows.indices(self.shape[0])
        file = self._first.file
        try:
            with reporting(file, part=self.name):
                return self.dequantize(slice(start, max(start, stop)))
        except InitializationError:
            raise
        except Exception as error:
            # Whatever a quantizer's library raises on tensors and descriptions that do not fit each other.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(
                f"{file}: {self.name} cannot be dequantized ({reason}); download it again, or use the original model"
            ) from error

    def sha256(self) -> str:
        """sha256 (hex) of the stored bytes.

        For a plain tensor, of its bytes. For a quantized weight, of its dequantization and of each tensor's name and
        sha256, one line each: equal hashes mean equal matrices.
        """
        if self.dequantize is None:
            return self._first.sha256()
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
    rows: slice, k: int, dtype: torch.dtype, fill: Callable[..., None], stored: Sequence[StoredTensor] = ()
) -> Tensor:
    """The values (rows, k), dequantized a strip of rows at a time, on torch's threads, each straight into its place.

    Nothing else of the result's size is in memory.

    fill: (rows, their place in the result, contiguous and of `dtype`, a function for each of `stored` that reads a
        range of its rows) ↦ writes their values there.
    """
    values = empty((rows.stop - rows.start, k), dtype)
    threads = torch.get_num_threads()
    threads = threads if threads >= _LEAST_THREADS else 1
    most = max(LEAST_IN_STRIP, min(MOST_IN_STRIP, values.numel() // (threads * _STRIPS_A_THREAD)))
    step = max(1, most // max(1, k))
    strips = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

    def filled(todo: Iterator[slice]) -> None:
        with contextlib.ExitStack() as files:
            reads = [files.enter_context(reader(tensor)) for tensor in stored]
            for strip in todo:
                fill(strip, values[strip.start - rows.start : strip.stop - rows.start], *reads)

    share(filled, strips, threads if len(strips) >= _STRIPS_A_THREAD * threads else 1)
    return values


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """values (rows, k) times scale (rows, groups), each of whose columns covers k/groups values; float32."""
    rows, k = values.shape
    product = values.to(torch.float32, copy=True).view(rows, scale.shape[1], -1)
    return product.mul_(scale.to(torch.float32).unsqueeze(-1)).view(rows, k)


def decode_bytes(values: Tensor, scale: Tensor, width: int, out: Tensor) -> None:
    """8-bit values (rows, k), floats or integers, times scale (rows, groups), each for `width` columns."""
    codes, factors = values.view(torch.uint8).numpy(), _float32(scale).numpy()
    with _rounding(out) as result:
        if values.dtype == torch.float8_e4m3fn:
            _kernels().decode_e4m3(codes, width, factors, result)
        else:
            table = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(torch.float32)
            _kernels().decode_bytes(codes, table.numpy(), width, factors, result)


def decode_floats(packed: Tensor, scale: Tensor, factors: Tensor, out: Tensor) -> None:
    """4-bit floats (E2M1), bytes (rows, k/2), low half first, times factors[scale].

    scale: uint8 (rows, groups). factors: (256,) float32, what each code of a scale stands for.
    """
    kernels = _kernels()
    with _rounding(out) as result:
        every = np.tile(np.arange(0, 256, 34, dtype=np.uint8) + 16, (256, 1))  # the codes 0 to 15
        table = np.empty((256, 16), result.dtype)
        kernels.decode_e2m1(every, 16, factors.view(256, 1).numpy(), table)
        planes = table.view(np.uint8).reshape(256, 16, -1).transpose(0, 2, 1).reshape(-1)
        kernels.decode_tables(packed.numpy(), scale.numpy(), planes, result)


def decode_integers(packed: Tensor, bits: int, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """(code − offset) · scale of codes of 4 bits (low half of a byte first) or 8.

    packed: bytes (rows, k · bits / 8). scale, offset: (rows, groups).
    """
    with _rounding(out) as result:
        less, factor = _float32(offset).numpy(), _float32(scale).numpy()
        _kernels().decode_integers(packed.numpy(), bits, less, factor, False, result)


def decode_columns(words: Tensor, first: int, group: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """(code − offset) · scale of 4-bit codes, transposed, in words of eight columns each.

    words: (k / 8, d). first: row of `out`. group: of each column. scale, offset: (groups, d).
    """
    with _rounding(out) as result:
        _kernels().decode_columns(
            words.numpy(), first, group.numpy(), _float32(offset).numpy(), _float32(scale).numpy(), result
        )


def decode_affine(packed: Tensor, bits: int, scale: Tensor, bias: Tensor, out: Tensor) -> None:
    """code · scale + bias, rounded to out's dtype after each step; parameters as in `decode_integers`."""
    if not _kernels().rounds_to(out.dtype):
        product = scaled(codes(packed, bits, out.shape[1]), scale).to(out.dtype)
        torch.add(product.view(*bias.shape, -1), bias.unsqueeze(-1), out=out.view(*bias.shape, -1))
        return
    with _rounding(out) as result:
        more, factor = _float32(bias).numpy(), _float32(scale).numpy()
        _kernels().decode_integers(packed.numpy(), bits, more, factor, True, result)


def decode_words(words: Tensor, shifts: Sequence[int], first: int, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """(code − offset) · scale of 4-bit codes, transposed, in words of eight rows, which begin at these bits of it.

    words: (k, d / 8). first: row of `out`. scale, offset: (rows, groups).
    """
    bits = torch.tensor(shifts, dtype=torch.int32).numpy()
    with _rounding(out) as result:
        _kernels().decode_words(words.numpy(), bits, first, _float32(offset).numpy(), _float32(scale).numpy(), result)


def decode_pairs(packed: Tensor, values: Tensor, width: int, scale: Tensor, out: Tensor) -> None:
    """values[code] · scale of 4-bit codes, bytes (rows, k/2), high half first.

    values: (16,). scale: (rows, groups), each for `width` columns, a multiple of 16.
    """
    with _rounding(out) as result:
        _kernels().decode_pairs(packed.numpy(), _float32(values).numpy(), width, _float32(scale).numpy(), result)


@contextlib.contextmanager
def _rounding(out: Tensor) -> Iterator[Any]:
    """`out` as the kernels write it, or, if they do not round to its dtype, float32 that is copied to it."""
    if _kernels().rounds_to(out.dtype):
        yield out.view({torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(out.dtype, out.dtype)).numpy()
        return
    exact = torch.empty(out.shape, dtype=torch.float32)
    yield exact.numpy()
    out.copy_(exact)


def _float32(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()


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
