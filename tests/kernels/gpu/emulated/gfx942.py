"""A launcher of our own: runs what triton compiled for gfx942 (MI300X) on the AMD emulator of tinygrad's repository.

It does what a driver does: places the code object's segments in memory, packs the arguments, and fills the registers
that the kernel's descriptor asks for (LLVM, "User Guide for AMDGPU Backend": code object, kernel descriptor, initial
kernel execution state). The emulator reads and writes this process's memory, so CPU tensors serve as device buffers.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from test.mockgpu.amd import emu
from tinygrad.device import BufferSpec
from triton.compiler import CompiledKernel

from inilora_kernels.kernels.gpu import gram as triton_gram
from inilora_kernels.kernels.gpu import gram_batch as triton_gram_batch
from inilora_kernels.kernels.gpu import kernels as triton_kernels
from inilora_kernels.kernels.gpu import loss as triton_loss
from inilora_kernels.kernels.gpu import wave as triton_wave

from ..compiled import OPTIONS, Launch, compiled

PAGE = 4096
LOADED_SEGMENT, SYMBOL_TABLE = 1, 2
# Scalar registers for each bit of the descriptor's kernel_code_properties, before those of preloaded arguments.
REGISTERS_OF_BIT = (4, 2, 2, 2, 2, 2, 1)
ARGUMENTS_BIT = 3
LDS_GRANULE, LDS_SHIFT = 512, 15
VOP1, DPP = 0x3F, 0xFA
V_MOV_B32, V_CVT_F16_F32, V_CVT_F32_F16 = 1, 10, 11


# The emulator lets lanes that are switched off load from local memory, and store there what they loaded, at whatever
# address their register holds. So local memory lies at the start of all that 32 bits can address, reserved, not taken.
_LOCAL_MEMORY = mmap.mmap(-1, (1 << 32) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass(frozen=True)
class Code:
    """A code object in memory: its first instruction, and its kernel's descriptor of 64 bytes."""

    memory: Any
    entry: int
    descriptor: bytes

    def field(self, offset: int, form: str) -> int:
        return int(struct.unpack_from("<" + form, self.descriptor, offset)[0])


def load(code_object: bytes, name: str) -> Code:
    """Place the segments of an ELF file as its program headers say, and find the kernel's descriptor by its symbol."""
    programs_at, sections_at = struct.unpack_from("<QQ", code_object, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", code_object, 54)
    segments = []
    for place in range(programs):
        kind, _, offset, address, _, length, room = struct.unpack_from(
            "<IIQQQQQ", code_object, programs_at + place * program_size
        )
        if kind == LOADED_SEGMENT:
            segments.append((offset, address, length, room))
    memory = ctypes.create_string_buffer(max(address + room for _, address, _, room in segments) + PAGE)
    base = -(-ctypes.addressof(memory) // PAGE) * PAGE
    for offset, address, length, _ in segments:
        ctypes.memmove(base + address, code_object[offset : offset + length], length)
    for place in range(sections):
        header = struct.unpack_from("<IIQQQQIIQQ", code_object, sections_at + place * section_size)
        if header[1] != SYMBOL_TABLE:
            continue
        start, length, link, entry_size = header[4], header[5], header[6], header[9]
        names_at = struct.unpack_from("<Q", code_object, sections_at + link * section_size + 24)[0]
        for symbol in range(start, start + length, entry_size):
            name_at, _, _, _, address, _ = struct.unpack_from("<IBBHQQ", code_object, symbol)
            if code_object[names_at + name_at :].startswith(f"{name}.kd\0".encode()):
                descriptor = ctypes.string_at(base + address, 64)
                entry = base + address + struct.unpack_from("<q", descriptor, 16)[0]
                return Code(memory, entry, descriptor)
    raise LookupError(f"no kernel {name} in the code object")


def packed(launch: Launch) -> bytes:
    """The kernel's arguments, each at its own alignment, and triton's two scratch pointers, which these do not use."""
    values = [launch.arguments[name] for name in launch.kernel.arg_names if name in launch.arguments]
    content = b""
    for value in [*values, None, None]:
        if isinstance(value, torch.Tensor):
            piece = struct.pack("<Q", value.data_ptr())
        else:
            piece = struct.pack({int: "<i", float: "<f", type(None): "<Q"}[type(value)], value or 0)
        content += b"\0" * (-len(content) % len(piece)) + piece
    return content


def run(launch: Launch, kernel: CompiledKernel) -> None:
    """Run every program of the launch, one after the other."""
    code = load(kernel.asm["hsaco"], kernel.metadata.name)
    arguments = packed(launch)
    assert len(arguments) == code.field(8, "I"), "the arguments are not what the kernel was compiled for"
    buffer = ctypes.create_string_buffer(arguments)
    pointer = ctypes.addressof(buffer)
    properties, preload = code.field(56, "H"), code.field(58, "H")
    registers: list[int] = []
    for bit, count in enumerate(REGISTERS_OF_BIT):
        if properties >> bit & 1:
            registers += [pointer & 0xFFFFFFFF, pointer >> 32] if bit == ARGUMENTS_BIT else [0] * count
    words = struct.unpack(f"<{len(arguments) // 4}I", arguments)
    registers += words[preload >> 7 :][: preload & 0x7F]
    granules = -(-kernel.metadata.shared // LDS_GRANULE)
    threads = launch.options["num_warps"] * 64
    with _local_memory_reserved(), mock.patch.object(emu, "_decode_at", _decoded):
        emu.run_asm(
            code.entry,
            len(kernel.asm["hsaco"]),
            *(*launch.grid, 1, 1)[:3],
            threads,
            1,
            1,
            pointer,
            rsrc2=code.field(52, "I") | granules << LDS_SHIFT,
            scratch_size=code.field(4, "I"),
            arch="cdna",
            user_data=registers,
        )


@contextmanager
def _local_memory_reserved() -> Iterator[None]:
    """Within: the second buffer that the emulator asks for, local memory, is the reserved one."""
    real, asked = emu.Buffer, 0

    def buffer(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            address = ctypes.addressof(ctypes.c_char.from_buffer(_LOCAL_MEMORY))
            options["options"] = BufferSpec(external_ptr=address)
        return real(*arguments, **options)

    with mock.patch.object(emu, "Buffer", buffer):
        yield


_decode_at = emu._decode_at
Lanes = np.ndarray[Any, np.dtype[np.uint32]]


def _decoded(program_counter: int, architecture: str) -> Any:
    """The emulator's own decoding, but for two things that it does otherwise than CDNA 3, which are done here.

    A move between lanes (DPP) whose source is its destination: the emulator goes lane by lane and would read what it
    has just written; hardware reads all lanes first. And conversions to and from float16 in a register from v128 on,
    which the emulator takes for the upper half of another register, as RDNA 3 does.
    Encodings: AMD, "CDNA3 Instruction Set Architecture", VOP1 and DPP in chapter 13.
    """
    word, control = struct.unpack("<II", ctypes.string_at(program_counter, 8))
    destination, operation, source = word >> 17 & 0xFF, word >> 9 & 0xFF, word & 0x1FF
    size = 4
    if word >> 25 != VOP1:
        return _decode_at(program_counter, architecture)
    if operation == V_MOV_B32 and source == DPP and destination == control & 0xFF:
        assert control >> 24 == 0xFF, "rows or banks switched off, which no reduction of triton's does"
        size, source = 8, 256 + destination
        from_lane = np.array(_lane_map(control >> 8 & 0x1FF))

        def result(lanes: Lanes, on: Any) -> Lanes:
            return np.where(on[from_lane], lanes[from_lane], 0)
    elif operation == V_CVT_F16_F32 and source >= 256 and destination >= 128:

        def result(lanes: Lanes, on: Any) -> Lanes:
            return lanes.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)
    elif operation == V_CVT_F32_F16 and source >= 256 + 128:

        def result(lanes: Lanes, on: Any) -> Lanes:
            return lanes.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    else:
        return _decode_at(program_counter, architecture)

    def execute(scalars: ctypes.c_uint64, vectors: ctypes.c_uint64) -> None:
        scalar = (ctypes.c_uint32 * emu.SGPR_COUNT).from_address(scalars.value)
        registers = np.ctypeslib.as_array((ctypes.c_uint32 * (256 * 64)).from_address(vectors.value)).reshape(256, 64)
        mask = scalar[emu.EXEC_LO.offset] | scalar[emu.EXEC_LO.offset + 1] << 32
        on = np.array([bool(mask >> lane & 1) for lane in range(64)])
        new = result(registers[source - 256].copy(), on)
        registers[destination] = np.where(on, new, registers[destination])
        counter = (scalar[emu.PC_LO_IDX] | scalar[emu.PC_HI_IDX] << 32) + size
        scalar[emu.PC_LO_IDX], scalar[emu.PC_HI_IDX] = counter & 0xFFFFFFFF, counter >> 32

    _, instruction = _decode_at(program_counter, architecture)
    return (SimpleNamespace(arg=SimpleNamespace(globals=[0, 1])), SimpleNamespace(fxn=execute)), instruction


def _lane_map(control: int) -> list[int]:
    """For each lane the lane that a DPP control reads."""
    lanes = range(64)
    if control < 0x100:
        return [lane & ~3 | control >> 2 * (lane & 3) & 3 for lane in lanes]
    if 0x121 <= control <= 0x12F:
        return [lane & ~15 | (lane - (control & 15)) % 16 for lane in lanes]
    if control == 0x141:
        return [lane ^ 7 for lane in lanes]
    raise NotImplementedError(f"DPP control {control:#x}")


class Emulated:
    """Stands in a kernel's place: compiles it for gfx942 at the first launch and runs it on the emulator."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            options = {name: constants.pop(name) for name in OPTIONS if name in constants}
            if "INTERPRETED" in constants:
                constants["INTERPRETED"] = False
            names = self.kernel.arg_names[: len(arguments)]
            one = Launch(self.kernel, grid, dict(zip(names, arguments, strict=True)), constants, options)
            key = (*constants.values(), *options.values(), arguments[0].dtype)
            if key not in self.compiled:
                self.compiled[key] = compiled(one, "gfx942")
            run(one, self.compiled[key])

        return launch


GRADIENT_PRODUCTS = Emulated(triton_kernels.gradient_products_kernel)
ADAM = Emulated(triton_kernels.adam_kernel)
LOSS = Emulated(triton_loss.loss_kernel)
GRAM = Emulated(triton_gram.gram_kernel)


@contextmanager
def emulated() -> Iterator[None]:
    """Within: the kernels run as compiled for gfx942, on CPU tensors."""
    with (
        mock.patch.object(triton_wave, "gradient_products_kernel", GRADIENT_PRODUCTS),
        mock.patch.object(triton_wave, "adam_kernel", ADAM),
        mock.patch.object(triton_wave, "loss_kernel", LOSS),
        mock.patch.object(triton_gram_batch, "gram_kernel", GRAM),
    ):
        yield
