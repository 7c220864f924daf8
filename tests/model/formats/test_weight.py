"""What the formats share: codes of any width unpacked, scales applied, and values read in strips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.formats.weight import (
    LEAST_IN_STRIP,
    MOST_IN_STRIP,
    StoredWeight,
    codes,
    exponents,
    in_strips,
    nibbles,
    scaled,
)


def stream(values: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) as a dense stream of bytes, the lowest bits first: numpy's packing of the single bits."""
    single = (values.unsqueeze(-1) >> torch.arange(bits)) & 1
    return torch.from_numpy(np.packbits(single.view(len(values), -1).numpy().astype(bool), axis=1, bitorder="little"))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_codes_of_any_width(bits: int, count: int, seed: int) -> None:
    values = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(codes(stream(values, bits), bits, count), values.to(torch.uint8))
    if bits == 4 and count % 2 == 0:
        assert torch.equal(nibbles(stream(values, 4)), values.to(torch.uint8))


def test_a_scale_stands_for_a_group_of_columns() -> None:
    values, scale = torch.arange(24).view(2, 12), torch.tensor([[1.0, 2.0, 4.0], [0.5, 1.0, 0.0]])
    assert torch.equal(scaled(values, scale), values * scale.repeat_interleave(4, dim=1))


def test_bare_exponents_are_powers_of_two() -> None:
    assert exponents(torch.tensor([127, 128, 126, 0], dtype=torch.uint8)).tolist() == [1.0, 2.0, 0.5, 2.0**-127]
    assert exponents(torch.tensor([0.25], dtype=torch.bfloat16)).tolist() == [0.25]


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize("rows", [slice(0, 41), slice(3, 40), slice(4, 4)])
def test_strips_are_put_together_in_order(rows: slice, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    k = LEAST_IN_STRIP // 5
    whole = torch.randn(41, k)
    asked: list[slice] = []

    def fill(strip: slice, out: Tensor) -> None:
        asked.append(strip)
        out.copy_(whole[strip])

    values = in_strips(rows, k, torch.float32, fill)
    assert torch.equal(values, whole[rows])
    assert all((strip.stop - strip.start) * k <= MOST_IN_STRIP for strip in asked)
    assert sorted(row for strip in asked for row in range(strip.start, strip.stop)) == list(range(41))[rows]


def test_the_sha256_tells_formats_and_every_stored_tensor_apart(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    a, b = (open_checkpoint(tmp_path).tensors[name] for name in "ab")

    def weight(dequantization: str, **stored: object) -> StoredWeight:
        return StoredWeight("w", (2, 2), torch.float32, dequantization, stored, lambda rows: torch.ones(2, 2)[rows])  # type: ignore[arg-type]

    hashes = [
        weight("one kind", values=a, scales=b).sha256(),
        weight("one kind", values=b, scales=a).sha256(),
        weight("another kind", values=a, scales=b).sha256(),
        weight("one kind", values=a).sha256(),
    ]
    assert len(set(hashes)) == 4
    assert weight("one kind", scales=b, values=a).sha256() == hashes[0]
    plain = StoredWeight("w", (2, 2), torch.float32, "", {"values": a})
    assert plain.sha256() == a.sha256()
    assert torch.equal(plain.read(slice(1, 2)), torch.ones(1, 2))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")])
def test_a_lack_of_memory_is_not_called_a_damaged_file(error: Exception, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")

    def fail(rows: slice) -> torch.Tensor:
        raise error

    stored = {"values": open_checkpoint(tmp_path).tensors["a"]}
    with pytest.raises(CheckpointError, match="cannot read w: not enough memory") as caught:
        StoredWeight("w", (2, 2), torch.float32, "a kind", stored, fail).read()
    assert "download" not in str(caught.value)
