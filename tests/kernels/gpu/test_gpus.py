"""Which chip's numbers a device's name takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from inilora_kernels.errors import OptionError
from inilora_kernels.kernels.gpu.gpus import GPUS, gpu_like, gpu_named, reported_gpu


@pytest.mark.parametrize(
    ("name", "architecture", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "sm_89", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100"),
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA B200", "sm_100", "b200"),
        ("AMD Instinct MI300X", "gfx942", "mi300x"),
    ],
)
def test_a_known_name_takes_its_chips_bandwidths(name: str, architecture: str, known: str) -> None:
    chip = GPUS[known]
    found = gpu_like(architecture, name, chip.multiprocessors, int(chip.cache), int(chip.memory))
    assert (found.dram, found.cache_bandwidth, found.half) == (chip.dram, chip.cache_bandwidth, chip.half)


@pytest.mark.parametrize(
    ("name", "architecture", "like"),
    [
        # Names that contain another chip's, and parts that share a desktop's name.
        ("NVIDIA RTX A1000", "sm_86", "rtx4090"),
        ("NVIDIA GH200 480GB", "sm_90", "h100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", "rtx4090"),
        ("NVIDIA H100 PCIe", "sm_90", "h100"),
    ],
)
def test_other_parts_are_scaled_and_keep_what_the_device_reports(name: str, architecture: str, like: str) -> None:
    found = gpu_like(architecture, name, GPUS[like].multiprocessors // 2, 10**7, 10**10, dram=5e11)
    assert found.half == pytest.approx(GPUS[like].half / 2, rel=0.02)
    assert (found.dram, found.cache, found.memory) == (5e11, 1e7, 1e10)


def reported(name: str, **numbers: object) -> SimpleNamespace:
    """As torch.cuda.get_device_properties would say it."""
    common = {"multi_processor_count": 128, "total_memory": 24 << 30, "L2_cache_size": 72 << 20}
    return SimpleNamespace(name=name, **{**common, **numbers})


def test_memory_bandwidth_follows_from_clock_and_width_on_cuda() -> None:
    clocks = {"memory_clock_rate": 10_501_000, "memory_bus_width": 384}
    card = reported("NVIDIA GeForce RTX 4090", major=8, minor=9, **clocks)
    found = reported_gpu(card, hip=False)
    assert (found.architecture, found.cache) == ("sm_89", 72 << 20)
    assert found.dram == pytest.approx(GPUS["rtx4090"].dram, rel=1e-3)
    # A torch that does not tell them.
    assert reported_gpu(reported("NVIDIA H100 80GB HBM3", major=9, minor=0), hip=False).dram == GPUS["h100"].dram


def test_hips_memory_clock_is_not_the_transfers() -> None:
    """openxla/xla#44746: 2 · 1.3 GHz · 8192 bits are half of an MI300X's 5.3 TB/s."""
    card = reported(
        "AMD Instinct MI300X",
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=304,
        L2_cache_size=4 << 20,
        memory_clock_rate=1_300_000,
        memory_bus_width=8192,
    )
    found, chip = reported_gpu(card, hip=True), GPUS["mi300x"]
    assert (found.architecture, found.dram, found.cache) == ("gfx942", chip.dram, chip.cache)


def test_names_on_the_command_line() -> None:
    assert gpu_named("RTX 4090") is GPUS["rtx4090"]
    with pytest.raises(OptionError, match="knows rtx4090, a100"):
        gpu_named("voodoo")
