"""The GPUs that the cost model knows: numbers from their makers, and from independent measurements."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...errors import OptionError
from ...suggestions import did_you_mean


@dataclass(frozen=True)
class Gpu:
    """A chip's numbers: bytes, bytes a second, FLOP a second (dense), seconds.

    half, float32: matrix products; vector, double: float32 and float64 outside of the tensor cores.
    cache: the last-level cache. cache_usable: the share of it that one working set can keep to itself.
    launch: from one kernel's end to the next one's start inside a CUDA (HIP) graph.
    """

    name: str
    architecture: str
    multiprocessors: int
    memory: float
    dram: float
    cache: float
    cache_usable: float
    cache_bandwidth: float
    half: float
    float32: float
    vector: float
    double: float
    launch: float


GPUS: dict[str, Gpu] = {
    # Multiprocessors, memory, DRAM bandwidth, cache and FLOPs: NVIDIA's whitepapers and data sheets ("NVIDIA Ada GPU
    # Architecture", appendix A; "NVIDIA A100", "NVIDIA H100 Tensor Core GPU Architecture"; data sheets of H200 and
    # Blackwell), AMD's data sheet and CDNA 3 white paper. half: bf16 with float32 accumulation; float32: a third of
    # tf32's peak, as tf32x3 takes three products (MI300X: its own float32 matrix peak).
    # cache_bandwidth: A100 5,120 bytes a clock at 1.41 GHz (whitepaper); MI300X's Infinity Cache 17.2 TB/s (its own).
    # No maker states the others': Ada about 5 TB/s and H100 about 5.6 TB/s are what Chips and Cheese's measurements
    # suggest ("Microbenchmarking Nvidia's RTX 4090"; "Nvidia's H100: Funny L2, and Tons of Bandwidth"); B200 twice
    # H100's, for its two dies. Unchecked: docs/kernels.md says how much Table 5's prediction depends on them. H200's
    # cache is what the chip itself reports.
    # cache_usable: one L2 on Ada; A100, H100, H200 and B200 have two partitions that may both hold a line: half.
    # launch: an assumption; a little over 1 µs from node to node of a straight graph is what NVIDIA's blog reports
    # ("Constant Time Launch for Straight-Line CUDA Graphs and Other Performance Enhancements").
    "rtx4090": Gpu(
        name="RTX 4090",
        architecture="sm_89",
        multiprocessors=128,
        memory=24e9,
        dram=1.008e12,
        cache=72e6,
        cache_usable=0.85,
        cache_bandwidth=5.0e12,
        half=165.2e12,
        float32=82.6e12 / 3,
        vector=82.6e12,
        double=1.29e12,
        launch=2e-6,
    ),
    "a100": Gpu(
        name="A100 80GB",
        architecture="sm_80",
        multiprocessors=108,
        memory=80e9,
        dram=2.039e12,
        cache=40e6,
        cache_usable=0.45,
        cache_bandwidth=7.2e12,
        half=312e12,
        float32=156e12 / 3,
        vector=19.5e12,
        double=9.7e12,
        launch=2e-6,
    ),
    "h100": Gpu(
        name="H100 SXM",
        architecture="sm_90",
        multiprocessors=132,
        memory=80e9,
        dram=3.35e12,
        cache=50e6,
        cache_usable=0.45,
        cache_bandwidth=5.6e12,
        half=989e12,
        float32=494e12 / 3,
        vector=66.9e12,
        double=33.5e12,
        launch=2e-6,
    ),
    "h200": Gpu(
        name="H200",
        architecture="sm_90",
        multiprocessors=132,
        memory=141e9,
        dram=4.8e12,
        cache=60e6,
        cache_usable=0.45,
        cache_bandwidth=5.6e12,
        half=989e12,
        float32=494e12 / 3,
        vector=66.9e12,
        double=33.5e12,
        launch=2e-6,
    ),
    "b200": Gpu(
        name="B200",
        architecture="sm_100",
        multiprocessors=148,
        memory=180e9,
        dram=8.0e12,
        cache=126e6,
        cache_usable=0.45,
        cache_bandwidth=11.2e12,
        half=2250e12,
        float32=1125e12 / 3,
        vector=75e12,
        double=37e12,
        launch=2e-6,
    ),
    "mi300x": Gpu(
        name="MI300X",
        architecture="gfx942",
        multiprocessors=304,
        memory=192e9,
        dram=5.3e12,
        cache=256e6,
        cache_usable=0.8,
        cache_bandwidth=17.2e12,
        half=1307e12,
        float32=163.4e12,
        vector=163.4e12,
        double=81.7e12,
        launch=5e-6,
    ),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises OptionError for one that the cost model does not know.

    >>> gpu_named("rtx4090").name
    'RTX 4090'
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in GPUS:
        raise OptionError(f"gpu={name!r}: the cost model knows {', '.join(GPUS)}{did_you_mean(key, GPUS)}")
    return GPUS[key]


def gpu_like(
    architecture: str, name: str, multiprocessors: int, cache: int, memory: int, dram: float | None = None
) -> Gpu:
    """The most similar known GPU, with the sizes that the device itself reports.

    A chip's very name wins; the parts of a laptop, PCIe cards and other chips take their architecture's, scaled by
    multiprocessors. cache, memory: bytes. dram: bytes a second from memory clock and bus width; None: the known chip's.
    """
    known = next((gpu for key, gpu in GPUS.items() if _is_named(name, key)), None)
    if known is None:
        by_architecture = {gpu.architecture: gpu for gpu in reversed(GPUS.values())}
        known = by_architecture.get(architecture, GPUS["rtx4090"])
    scale = multiprocessors / known.multiprocessors
    # AMD reports a multiprocessor's share of L2, not the Infinity Cache behind it.
    size = known.cache if architecture.startswith("gfx") or cache <= 0 else float(cache)
    return replace(
        known,
        name=name,
        architecture=architecture,
        multiprocessors=multiprocessors,
        memory=float(memory),
        dram=dram or known.dram,
        cache=size,
        cache_bandwidth=known.cache_bandwidth * scale,
        half=known.half * scale,
        float32=known.float32 * scale,
        vector=known.vector * scale,
        double=known.double * scale,
    )


def reported_gpu(properties: Any, *, hip: bool) -> Gpu:
    """The GPU that torch.cuda.get_device_properties describes. hip: as ROCm's torch does."""
    size = int(getattr(properties, "L2_cache_size", 0))
    if hip:
        # HIP's memory clock is the controller's, at a half or a quarter of the transfers of HBM3 and GDDR6
        # (github.com/openxla/xla/pull/44746); its name's architecture carries features: "gfx942:sramecc+:xnack-".
        architecture, dram = str(properties.gcnArchName).split(":")[0], None
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
        # kHz and bits; two transfers a clock. Older torch does not tell.
        clock, width = (int(getattr(properties, name, 0)) for name in ("memory_clock_rate", "memory_bus_width"))
        dram = 2 * 1e3 * clock * width / 8 or None
    return gpu_like(
        architecture, properties.name, properties.multi_processor_count, size, properties.total_memory, dram
    )


def _is_named(name: str, key: str) -> bool:
    """Whether a device's name is that chip's: "RTX A1000" is no A100, "GH200" no H200, and a laptop's 4090 another."""
    words = re.split(r"[\s\-_]+", name.lower())
    if {"laptop", "pcie", "max", "d", "nvl"} & set(words):
        return False
    return key in words or any(one + two == key for one, two in pairwise(words))
