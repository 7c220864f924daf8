"""GPTQ packed to its specification, and AWQ against compressed-tensors' own reader of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor

from .stored import assert_hashes_every_part, assert_reads, read_one, write

D, K, GROUP = 32, 64, 16


def config(method: str, bits: int = 4, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": bits, "group_size": GROUP, **settings}}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Integers packed along the first axis into 32-bit words, lowest bits first: (n·bits/32, columns)."""
    words = [[0] * codes.shape[1] for _ in range(codes.shape[0] * bits // 32)]
    for place, row in enumerate(codes.tolist()):
        word, shift = divmod(place * bits, 32)
        for column, code in enumerate(row):
            value = code << shift
            words[word][column] |= value & 0xFFFFFFFF
            if value >> 32:
                words[word + 1][column] |= value >> 32
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def gptq(bits: int, stored_less: int, group: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (K, D))
    zeros = torch.randint(1, 1 << bits, (K // GROUP, D))
    scales = (torch.rand(K // GROUP, D) * 0.1).half()
    tensors = {
        "q_proj.qweight": packed(codes, bits),
        "q_proj.qzeros": packed((zeros - stored_less).T, bits).T,
        "q_proj.scales": scales,
        "q_proj.g_idx": group.to(torch.int32),
    }
    return tensors, ((codes - zeros[group]) * scales[group].float()).half().T.contiguous()


IN_ORDER = torch.arange(K) // GROUP


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int) -> None:
    tensors, expected = gptq(bits, 1, IN_ORDER)
    assert_reads(read_one(write(tmp_path, tensors, config("gptq", bits))), expected)


def test_gptq_of_the_second_format(tmp_path: Path) -> None:
    tensors, expected = gptq(4, 0, IN_ORDER)
    assert_reads(read_one(write(tmp_path, tensors, config("gptq", checkpoint_format="gptq_v2"))), expected)


def test_gptq_in_order_of_activation(tmp_path: Path) -> None:
    tensors, expected = gptq(4, 1, IN_ORDER[torch.randperm(K)])
    assert_reads(read_one(write(tmp_path, tensors, config("gptq", desc_act=True))), expected)


def test_gptq_without_g_idx(tmp_path: Path) -> None:
    tensors, expected = gptq(4, 1, IN_ORDER)
    del tensors["q_proj.g_idx"]
    assert_reads(read_one(write(tmp_path, tensors, config("gptq"))), expected)


def test_symmetric_zero_point(tmp_path: Path) -> None:
    """AutoGPTQ stores 7 for the zero point 8; read as 7, every weight would be off by one step."""
    tensors, _ = gptq(4, 1, IN_ORDER)
    tensors["q_proj.qzeros"] = torch.full_like(tensors["q_proj.qzeros"], 0x77777777)
    tensors["q_proj.qweight"] = torch.full_like(tensors["q_proj.qweight"], -0x77777778)  # 8 everywhere
    assert not read_one(write(tmp_path, tensors, config("gptq"))).read().any()


def awq() -> dict[str, Tensor]:
    torch.manual_seed(0)
    words = torch.iinfo(torch.int32)
    return {
        "q_proj.qweight": torch.randint(words.min, words.max, (K, D // 8), dtype=torch.int32),
        "q_proj.qzeros": torch.randint(words.min, words.max, (K // GROUP, D // 8), dtype=torch.int32),
        "q_proj.scales": (torch.rand(K // GROUP, D) * 0.1).half(),
    }


def test_awq(tmp_path: Path) -> None:
    tensors = awq()
    converter = AutoAWQConverter(
        bits=4, group_size=GROUP, zero_point=True, version="gemm", ignore=[], targets=["Linear"]
    )
    converted = converter.process(dict(tensors))
    codes = unpack_from_int32(converted["q_proj.weight_packed"], 4, torch.Size((D, K))).int()
    zeros = unpack_from_int32(converted["q_proj.weight_zero_point"], 4, torch.Size((D, K // GROUP)), packed_dim=0).int()
    expected = (codes - zeros.repeat_interleave(GROUP, 1)) * converted["q_proj.weight_scale"].repeat_interleave(
        GROUP, 1
    )
    assert_reads(read_one(write(tmp_path, tensors, config("awq"))), expected)


def test_sha256_covers_every_part(tmp_path: Path) -> None:
    assert_hashes_every_part(tmp_path, gptq(4, 1, IN_ORDER)[0], config("gptq"), "q_proj")
    assert_hashes_every_part(tmp_path, awq(), config("awq"), "q_proj")


def test_sha256_tells_the_two_formats_of_gptq_apart(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 1, IN_ORDER)
    first = read_one(write(tmp_path, tensors, config("gptq"))).sha256()
    second = read_one(write(tmp_path, tensors, config("gptq", checkpoint_format="gptq_v2"))).sha256()
    assert first != second


@pytest.mark.parametrize("method", ["auto-round", "bitblas", None])
def test_other_methods_with_such_tensors_are_not_guessed(tmp_path: Path, method: str | None) -> None:
    weight = read_one(write(tmp_path, gptq(4, 1, IN_ORDER)[0], config("gptq") if method is None else config(method)))
    assert bool(weight.refusal) == (method is not None)


@pytest.mark.parametrize("version", ["gemv", "GEMV"])
def test_awq_by_rows(tmp_path: Path, version: str) -> None:
    """As AutoAWQ's WQLinear_GEMV packs: in order, and zero points and scales of 32 groups, most of them unused."""
    torch.manual_seed(0)
    codes, zeros = torch.randint(16, (D, K)), torch.zeros(D, 32, dtype=torch.long)
    zeros[:, : K // GROUP] = torch.randint(16, (D, K // GROUP))
    scales = torch.zeros(D, 32).half()
    scales[:, : K // GROUP] = torch.rand(D, K // GROUP) * 0.1
    tensors = {
        "q_proj.qweight": packed(codes.T, 4).T.contiguous(),
        "q_proj.qzeros": packed(zeros.T, 4).T.contiguous(),
        "q_proj.scales": scales,
    }
    group = torch.arange(K) // GROUP
    expected = ((codes - zeros[:, group]) * scales[:, group].float()).half()
    assert_reads(read_one(write(tmp_path, tensors, config("awq", version=version))), expected)
    short = {**tensors, "q_proj.scales": scales[:, :16].contiguous()}
    assert "version gemv" in read_one(write(tmp_path, short, config("awq", version=version))).refusal


def test_a_layout_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    tensors = awq()
    tensors["q_proj.qweight"] = tensors["q_proj.qweight"].T
    assert "layout" in read_one(write(tmp_path, tensors, config("awq", version="gemm"))).refusal
