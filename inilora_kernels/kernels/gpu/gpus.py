"""The GPUs that the cost model knows: the numbers of their makers' papers, and of those who measured them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import OptionError
from ...suggestions import did_you_mean


@dataclass(frozen=True)
class Gpu:
    """A chip's numbers: bytes, bytes a second, FLOP a second (dense), seconds.

    cache: the last-level cache. cache_usable: its share that one working set can keep to itself.
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
    launch: float


GPUS: dict[str, Gpu] = {
    # Multiprocessors, memory, DRAM bandwidth, cache and FLOPs: NVIDIA's whitepapers and data sheets ("NVIDIA Ada GPU
    # Architecture", appendix A; "NVIDIA A100", "NVIDIA H100 Tensor Core GPU Architecture"; data sheets of H200 and
    # Blackwell), AMD's data sheet and CDNA 3 white paper. half: bf16 with float32 accumulation; float32: a third of
    # tf32's peak, as tf32x3 takes three products (MI300X: its own float32 matrix peak).
    # cache_bandwidth: A100 5,120 bytes a clock at 1.41 GHz (whitepaper); MI300X's Infinity Cache 17.2 TB/s (its own).
    # No maker states the others': Ada about 5 TB/s and H100 about 5.6 TB/s are what Chips and Cheese's measurements
    # suggest ("Microbenchmarking Nvidia's RTX 4090"; "Nvidia's H100: Funny L2, and Tons of Bandwidth"); B200 twice
    # H100's, for its two dies. Unchecked by us: what Table 5's prediction owes to them stands in docs/kernels.md.
    # cache_usable: one L2 on Ada; A100, H100, H200 and B200 have two partitions that may both hold a line: half.
    # launch: an assumption; a little over 1 µs from node to node of a straight graph is what NVIDIA's blog reports
    # ("Constant Time Launch for Straight-Line CUDA Graphs and Other Performance Enhancements").
    "rtx4090": Gpu("RTX 4090", "sm_89", 128, 24e9, 1.008e12, 72e6, 0.85, 5.0e12, 165.2e12, 82.6e12 / 3, 2e-6),
    "a100": Gpu("A100 80GB", "sm_80", 108, 80e9, 2.039e12, 40e6, 0.45, 7.2e12, 312e12, 156e12 / 3, 2e-6),
    "h100": Gpu("H100 SXM", "sm_90", 132, 80e9, 3.35e12, 50e6, 0.45, 5.6e12, 989e12, 494e12 / 3, 2e-6),
    "h200": Gpu("H200", "sm_90", 132, 141e9, 4.8e12, 50e6, 0.45, 5.6e12, 989e12, 494e12 / 3, 2e-6),
    "b200": Gpu("B200", "sm_100", 148, 180e9, 8.0e12, 126e6, 0.45, 11.2e12, 2250e12, 1125e12 / 3, 2e-6),
    "mi300x": Gpu("MI300X", "gfx942", 304, 192e9, 5.3e12, 256e6, 0.8, 17.2e12, 1307e12, 163.4e12, 5e-6),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises OptionError for one that the model does not know.

    >>> gpu_named("rtx4090").name
    'RTX 4090'
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in GPUS:
        raise OptionError(f"gpu={name!r}: the cost model knows {', '.join(GPUS)}{did_you_mean(key, GPUS)}")
    return GPUS[key]


def gpu_like(architecture: str, name: str, multiprocessors: int, cache: int, memory: int) -> Gpu:
    """The nearest known GPU, with the sizes that the device itself reports.

    A known name wins; otherwise the architecture's; bandwidths stay those of the known chip, scaled by multiprocessors.
    """
    flat = name.lower().replace(" ", "")
    known = next((gpu for key, gpu in GPUS.items() if key in flat), None)
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
        cache=size,
        cache_bandwidth=known.cache_bandwidth * scale,
        half=known.half * scale,
        float32=known.float32 * scale,
    )
