"""What reading a matrix costs in each format, next to bfloat16: time, with its hash, and peak memory.

    python -m bench.reading                    every format at 4096²                              (about 2 minutes)
    python -m bench.reading --format AWQ       one of them; repeat for more

A checkpoint of random bytes, one matrix, is read from the page cache into the dtype that the solver takes it in, in a
process of its own, on one thread, as where matrices are read side by side, and on all. Times are medians, but for all
threads' best: a virtual machine may run both on one core. The ratio is to bfloat16 in the same run, whose matrix, which
one thread reads, is read before each format's and in turns with it. "over" is the high-water mark of memory less the
matrix itself. The results are results/reading.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.formats.weight import StoredWeight

from .harness import PeakMemory, Row, in_own_process, publish, seconds

SIZE = 4096
TURNS = 15
_MODULE = "model.layers.0.self_attn.v_proj"

Stored = tuple[dict[str, Tensor], dict[str, Any]]


def _bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def _words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return _bytes(*shape[:-1], 4 * shape[-1]).view(dtype)


def _scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3).to(dtype)


def _fp8(n: int) -> Tensor:
    codes = _bytes(n, n)
    return torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)  # no NaN


def _bfloat16(n: int) -> Stored:
    return {"weight": torch.randn(n, n, dtype=torch.bfloat16)}, {}


def _block_fp8(n: int) -> Stored:
    blocks = -(-n // 128)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return {"weight": _fp8(n), "weight_scale_inv": _scales(blocks, blocks)}, config


def _channel_fp8(n: int) -> Stored:
    return {"weight": _fp8(n), "weight_scale": _scales(n, 1, dtype=torch.bfloat16)}, {}


def _int4(n: int) -> Stored:
    return {
        "weight_packed": _words(n, n // 8),
        "weight_scale": _scales(n, n // 128, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([n, n]),
    }, {}


def _nvfp4(n: int) -> Stored:
    scale = _scales(n, n // 16).mul_(1000).to(torch.float8_e4m3fn)
    return {"weight": _bytes(n, n // 2), "weight_scale": scale, "weight_scale_2": torch.tensor(1e-3)}, {}


def _mxfp4(n: int) -> Stored:
    return {"weight_packed": _bytes(n, n // 2), "weight_scale": 120 + _bytes(n, n // 32) % 8}, {}


def _nf4(n: int) -> Stored:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(torch.randn(n, n, dtype=torch.bfloat16), quant_type="nf4")
    return {"weight": packed, **{f"weight.{part}": one for part, one in state.as_dict(packed=True).items()}}, {}


def _gptq(n: int, *, shuffled: bool) -> Stored:
    groups = n // 128
    order = torch.randperm(n) if shuffled else torch.arange(n)
    return {
        "qweight": _words(n // 8, n),
        "qzeros": _words(groups, n // 8),
        "scales": _scales(groups, n, dtype=torch.float16),
        "g_idx": (order // 128).to(torch.int32),
    }, {"quant_method": "gptq", "bits": 4, "group_size": 128}


def _awq(n: int) -> Stored:
    groups = n // 128
    return {
        "qweight": _words(n, n // 8),
        "qzeros": _words(groups, n // 8),
        "scales": _scales(groups, n, dtype=torch.float16),
    }, {"quant_method": "awq", "bits": 4, "group_size": 128}


def _mlx(n: int) -> Stored:
    pair = {part: _scales(n, n // 64, dtype=torch.float16) for part in ("scales", "biases")}
    return {"weight": _words(n, n // 8, dtype=torch.uint32), **pair}, {"group_size": 64, "bits": 4}


SAFETENSORS: dict[str, Callable[[int], Stored]] = {
    "bfloat16": _bfloat16,
    "FP8, 128×128 blocks": _block_fp8,
    "compressed-tensors FP8": _channel_fp8,
    "compressed-tensors int4": _int4,
    "NVFP4": _nvfp4,
    "MXFP4": _mxfp4,
    "bitsandbytes nf4": _nf4,
    "GPTQ": lambda n: _gptq(n, shuffled=False),
    "GPTQ, desc_act": lambda n: _gptq(n, shuffled=True),
    "AWQ": _awq,
    "MLX 4 bits": _mlx,
}
# By GGML's names: where a block's float16 numbers are.
GGUF = {"GGUF Q8_0": (0,), "GGUF Q4_K": (0, 2), "GGUF Q6_K": (208,)}
FORMATS = (*SAFETENSORS, *GGUF)


def write(folder: Path, kind: str, n: int) -> StoredWeight:
    """A checkpoint of one n×n matrix in this format, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in GGUF:
        return open_checkpoint(_write_gguf(folder / "model.gguf", kind, n)).weights[f"{_MODULE}.weight"]
    tensors, quantization = SAFETENSORS[kind](n)
    save_file({f"{_MODULE}.{part}": one.contiguous() for part, one in tensors.items()}, folder / "model.safetensors")
    where = "quantization" if kind.startswith("MLX") else "quantization_config"
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", where: quantization}))
    return open_checkpoint(folder).weights[f"{_MODULE}.weight"]


def _write_gguf(file: Path, kind: str, n: int) -> Path:
    """A LLaMA of one layer whose value projection has blocks of random bytes."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(n)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n)
    writer.add_head_count(n // 64)
    writer.add_head_count_kv(n // 64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(32)])
    writer.add_token_merges(["a b"])
    dtype = gguf.GGMLQuantizationType[kind.split()[1]]
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    raw = _bytes(n, n // block, size).numpy()
    for place in GGUF[kind]:
        raw[..., place : place + 2] = np.float16(0.01).reshape(1).view(np.uint8)
    writer.add_tensor("blk.0.attn_v.weight", raw.reshape(n, -1), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def measure(kind: str, n: int = SIZE, turns: int = TURNS) -> Row:
    """Milliseconds to read W, and to read and hash it, of this format and of bfloat16 in turns; MiB of memory."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        weight, plain = write(Path(folder, "it"), kind, n), write(Path(folder, "bfloat16"), "bfloat16", n)
        weight.read()
        memory = PeakMemory()
        W = weight.read()
        peak, held = memory.bytes(), W.nbytes
        dtype = str(W.dtype).removeprefix("torch.")
        del W
        taken: dict[str, list[float]] = {}
        for _ in range(turns):
            for name, one in (("", weight), ("bfloat16 ", plain)):
                torch.set_num_threads(1)
                taken.setdefault(f"{name}read", []).append(seconds(one.read))
                taken.setdefault(f"{name}hash", []).append(seconds(one.sha256))
                torch.set_num_threads(threads)
                taken.setdefault(f"{name}shared", []).append(seconds(one.read))
    read, own_hash, shared = (median(taken[name]) for name in ("read", "hash", "shared"))
    base, base_hash = median(taken["bfloat16 read"]), median(taken["bfloat16 hash"])
    return {
        "format": kind,
        "dtype": dtype,
        "read ms": 1e3 * read,
        "bfloat16 ms": 1e3 * base,
        "read / bfloat16": read / base,
        "all threads / bfloat16": shared / base,
        "best": min(taken["shared"]) / min(taken["bfloat16 read"]),
        "with sha256 ms": 1e3 * (read + own_hash),
        "with sha256 / bfloat16": (read + own_hash) / (base + base_hash),
        "W MiB": held / 2**20,
        "stored MiB": sum(_size(tensor) for tensor in weight.stored.values()) / 2**20,
        "over MiB": (peak - held) / 2**20,
    }


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "measure"), default="all")
    parser.add_argument("--format", action="append", choices=FORMATS, help="repeat for more; default: all")
    parser.add_argument("--size", type=int, default=SIZE, help="rows and columns of the matrix")
    options = parser.parse_args()
    if options.part == "measure":
        print(json.dumps(measure(options.format[0], options.size)))
        return
    rows = []
    for kind in options.format or FORMATS:
        Console(stderr=True).print(kind, highlight=False)
        rows.append(in_own_process("bench.reading", "measure", "--format", kind, "--size", str(options.size)))
    note = f"A {options.size}² matrix from the page cache into the solver's dtype; medians of {TURNS}."
    publish("reading", "formats", rows, " ".join(["python -m bench.reading", *sys.argv[1:]]), note=note)


if __name__ == "__main__":
    main()
