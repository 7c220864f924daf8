"""Compiles what the launcher would launch, for GPUs that need not be here, and reads the result.

The arguments are recorded from the launcher itself, so what is compiled is what a GPU would run.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from inilora_kernels.kernels.gpu import gram as triton_gram
from inilora_kernels.kernels.gpu import gram_batch as triton_gram_batch
from inilora_kernels.kernels.gpu import kernels as triton_kernels
from inilora_kernels.kernels.gpu import loss as triton_loss
from inilora_kernels.kernels.gpu import wave as triton_wave
from inilora_kernels.kernels.gpu.gram_layout import gram_layout
from inilora_kernels.kernels.gpu.tiles import GramTile, Tiles, gram_tile, tiles

from .cases import CPU, make, make_wave

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have: CUDA programming guide, "Technical specifications per compute
# capability"; CDNA 3 white paper, LDS of a compute unit.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "matrix_instr_nonkdim")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its positional arguments by name, its compile-time constants, and the options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Recorder:
    """Stands in a kernel's place and keeps what it was launched with."""

    kernel: JITFunction
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            options = {name: constants.pop(name) for name in OPTIONS if name in constants}
            # The wave lies on the CPU here, where the launcher asks for the interpreter's form.
            if "INTERPRETED" in constants:
                constants["INTERPRETED"] = False
            names = self.kernel.arg_names[: len(arguments)]
            named = dict(zip(names, arguments, strict=True))
            self.launches.append(Launch(self.kernel, grid, named, constants, options))

        return launch


def recorded(wave: triton_wave.Wave) -> tuple[Launch, Launch, Launch, Launch]:
    """The two launches of a step of this wave, and those of its loss, float32 and float64."""
    launches: list[Launch] = []
    with (
        mock.patch.object(
            triton_wave,
            "gradient_products_kernel",
            Recorder(triton_kernels.gradient_products_kernel, launches),
        ),
        mock.patch.object(triton_wave, "adam_kernel", Recorder(triton_kernels.adam_kernel, launches)),
        mock.patch.object(triton_wave, "loss_kernel", Recorder(triton_loss.loss_kernel, launches)),
    ):
        wave.advance(1)
        for wide in (False, True):
            wave.judge(wide=wide)
    products, adam, loss, wide_loss = launches
    return products, adam, loss, wide_loss


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def compiled(launch: Launch, target: str) -> CompiledKernel:
    """The launch's kernel as triton would compile it there: pointers aligned to 16 bytes."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = {int: "i32", float: "fp32", type(None): "constexpr"}[type(value)]
            # Where it may, triton's launcher tells apart the integers that are multiples of 16.
            if isinstance(value, int) and value % 16 == 0 and name not in launch.kernel.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(launch.options))


@functools.cache
def launches(target: str, dtype: torch.dtype, rank: int) -> tuple[tuple[Launch, Launch, Launch, Launch], Tiles]:
    """The launches for one matrix of this dtype and rank on this target."""
    chosen = tiles(target, dtype.itemsize, rank)
    weights, problems = make([(300, 272)], [rank], dtype)
    return recorded(make_wave(weights, problems, chosen)), chosen


def gram_launches(target: str, dtype: torch.dtype) -> tuple[list[Launch], GramTile]:
    """Both launches of the direct solver's kernel, along the rows and along the columns."""
    tile = gram_tile(target, dtype.itemsize)
    batch = triton_gram_batch.GramBatch(gram_layout([(300, 272)], dtype.itemsize, tile, 1e9), dtype, CPU)
    launches: list[Launch] = []
    with mock.patch.object(triton_gram_batch, "gram_kernel", Recorder(triton_gram.gram_kernel, launches)):
        batch.launch()
    return launches, tile


@dataclass(frozen=True)
class Machine:
    """What a compiled kernel takes and does, as read from its binary.

    loop: the instructions of the innermost loop with a matrix product in it. spilled: bytes a thread, any kind.
    """

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]


MATRIX_PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma_\w+)")


def read(kernel: CompiledKernel) -> Machine:
    """Registers, spills and instructions, from the cubin by cuobjdump and nvdisasm, or from AMD's assembly."""
    if "cubin" not in kernel.asm:
        return _read_amd(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    lines = [line.split("//")[0].strip() for line in code.splitlines()]
    lines = [re.sub(r"^/\*\w+\*/\s*", "", line).rstrip(" ;") for line in lines]
    instructions = tuple(line for line in lines if line and not line.startswith((".section", ".align", "/*")))
    return Machine(
        int(found[1]),
        int(found[2]) + int(found[3]) + sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in instructions),
        kernel.metadata.shared,
        instructions,
        _product_loop(instructions, r"^(\.L_x_\d+):", r"BRA\S* .*`?\(?(\.L_x_\d+)"),
    )


def _read_amd(kernel: CompiledKernel) -> Machine:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"{re.escape(name)}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    instructions = tuple(line.split(";")[0].strip() for line in text.splitlines() if line.split(";")[0].strip())
    return Machine(
        number(".vgpr_count"),
        number(".vgpr_spill_count") + number(".sgpr_spill_count") + number(".private_segment_fixed_size"),
        kernel.metadata.shared,
        instructions,
        _product_loop(instructions, r"^(\.LBB\w+):", r"s_c?branch\w* (\.LBB\w+)"),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _product_loop(instructions: tuple[str, ...], label: str, branch: str) -> tuple[str, ...]:
    """The shortest stretch from a label to a branch back to it that holds a matrix product; empty without one."""
    found = min(
        (loop for loop in _loops(instructions, label, branch) if any(map(MATRIX_PRODUCT.search, loop))),
        key=len,
        default=(),
    )
    return tuple(found)


def _loops(instructions: tuple[str, ...], label: str, branch: str) -> Iterator[tuple[str, ...]]:
    starts: dict[str, int] = {}
    for place, line in enumerate(instructions):
        if at := re.search(label, line):
            starts[at[1]] = place
        if (back := re.search(branch, line)) and back[1] in starts:
            yield instructions[starts[back[1]] : place + 1]


def loaded_bytes(machine: Machine, width: int | None = None) -> int:
    """Bytes that one thread loads from global memory in the product loop; width: only by loads of this many bytes."""
    total = 0
    for line in machine.loop:
        nvidia = re.search(r"\b(LDG|LDGSTS)\.(\S+)", line)
        amd = re.search(r"\b(?:global|buffer)_load_(dwordx?\d?|ushort|ubyte|short_d16\w*)", line)
        if nvidia:
            wide = re.search(r"\b(128|64|U16|U8)\b", nvidia[2].replace(".", " "))
            size = {"128": 16, "64": 8, "U16": 2, "U8": 1}[wide[1]] if wide else 4
        elif amd:
            size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(amd[1], 2)
        else:
            continue
        total += size if width in (None, size) else 0
    return total
