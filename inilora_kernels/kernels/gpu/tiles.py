"""Which tile each GPU family takes for each rank and weight size. Pure numbers: importable without triton or a GPU.

Every entry was compiled ahead for its family, spills nothing and fits the shared memory: test_compile.py in
tests/kernels/gpu holds that true. Hopper's are the fastest of some hundred on an H200; the others, which no GPU ran,
are the largest by rows: the P slots weigh 4·r/(rows·size) of W.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..rounding import round_up

RANKS = (8, 16, 32, 64, 128)
ALIGNMENT = 16  # elements: rows are padded to it, so that every load is 128 bits wide


@dataclass(frozen=True)
class StripTile:
    """The gradient kernel: a program's rows of W, the columns of one W tile, warps, and the pipeline.

    stages: tiles under way by asynchronous copies; 1: the next tile is loaded into registers ahead of its use instead
    (where the compiler would not copy asynchronously: Ampere, Hopper's float32, AMD).
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BlockTile:
    """The Adam kernel: columns of a factor a program updates, slots summed at a time, inner chunk of G·X, warps."""

    width: int
    slots: int
    inner: int
    warps: int


@dataclass(frozen=True)
class GramTile:
    """The direct solver's kernel: rows (or columns) of W a program owns, how many it goes through at a time.

    stages: tiles under way by asynchronous copies.
    """

    own: int
    inner: int
    warps: int
    stages: int
    precision: str
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Tiles:
    """All compile-time choices of a wave. rank: the compiled rank, one of RANKS. precision: of float32 products.

    sum_block, sum_width: entries of a Gram matrix that a sum program owns, and shares that it adds at a time.
    options: what the target's compiler is told besides.
    """

    rank: int
    strip: StripTile
    block: BlockTile
    precision: str
    sum_block: int
    sum_width: int
    options: tuple[tuple[str, int], ...] = ()


_STRIPS: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("ampere", 2): {
        8: (256, 64, 8, 1),
        16: (256, 64, 8, 1),
        32: (256, 16, 8, 1),
        64: (128, 16, 8, 1),
        128: (64, 32, 8, 1),
    },
    ("ampere", 4): {
        8: (128, 64, 8, 1),
        16: (64, 64, 8, 1),
        32: (64, 32, 8, 1),
        64: (32, 32, 4, 1),
        128: (32, 32, 8, 1),
    },
    ("hopper", 2): {
        8: (256, 64, 4, 3),
        16: (256, 64, 4, 4),
        32: (128, 64, 4, 4),
        64: (128, 64, 4, 2),
        128: (128, 64, 8, 3),
    },
    ("hopper", 4): {
        8: (64, 64, 4, 3),
        16: (64, 64, 4, 2),
        32: (64, 64, 4, 2),
        64: (32, 32, 4, 2),
        128: (32, 32, 8, 2),
    },
    ("blackwell", 2): {
        8: (256, 64, 8, 3),
        16: (256, 64, 8, 3),
        32: (256, 64, 8, 3),
        64: (128, 32, 8, 3),
        128: (128, 32, 8, 3),
    },
    ("blackwell", 4): {
        8: (128, 64, 8, 3),
        16: (128, 64, 8, 3),
        32: (64, 64, 8, 3),
        64: (64, 64, 8, 3),
        128: (32, 32, 8, 3),
    },
    ("cdna", 2): {
        8: (256, 64, 8, 1),
        16: (256, 64, 8, 1),
        32: (128, 64, 8, 1),
        64: (128, 64, 8, 1),
        128: (128, 64, 8, 1),
    },
    ("cdna", 4): {
        16: (128, 64, 8, 1),
        32: (128, 64, 4, 1),
        64: (128, 64, 8, 1),
        128: (128, 64, 4, 1),
    },
}

# Few warps: an H200 took four times as long with four at rank 8, for the exchange of layouts through shared memory.
_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    8: (128, 4, 2, 1),
    16: (32, 8, 16, 1),
    32: (32, 4, 16, 4),
    64: (16, 4, 16, 2),
    128: (32, 2, 16, 8),
}
# Ampere's and Ada's tensor cores take both operands from registers: half the width, or rank 128 spills; so does rank 64
# with a width of 32 (triton 3.6, sm_80).
_AMPERE_BLOCKS = {64: (16, 4, 16, 4), 128: (16, 2, 16, 8)}
# Else triton 3.9 spills.
_BLACKWELL_BLOCKS = {8: (64, 4, 8, 1)}
# Four of AMD's warps are 256 lanes.
_CDNA_BLOCKS = {8: (128, 8, 8, 4), 16: (64, 8, 16, 4), 64: (32, 4, 16, 8)}
# own, inner, warps, stages. 32 rows make 128 programs of a 4096² matrix, one a multiprocessor; Hopper's and Blackwell's
# asynchronous products want 64.
_GRAMS: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("ampere", 2): (32, 128, 4, 3),
    ("ampere", 4): (32, 64, 4, 3),
    ("hopper", 2): (64, 64, 4, 4),
    ("hopper", 4): (64, 64, 4, 3),
    ("blackwell", 2): (64, 64, 4, 3),
    ("blackwell", 4): (64, 64, 4, 3),
    ("cdna", 2): (32, 128, 4, 1),
    ("cdna", 4): (32, 64, 4, 1),
}


def family(architecture: str) -> str:
    """The tile family of a target: "sm_89" → ampere. Unknown NVIDIA chips take the smallest needs, ampere's.

    >>> family("sm_80"), family("sm_90"), family("sm_120"), family("gfx942")
    ('ampere', 'hopper', 'ampere', 'cdna')
    """
    if architecture.startswith("gfx"):
        return "cdna"
    return {"sm_90": "hopper", "sm_100": "blackwell", "sm_103": "blackwell"}.get(architecture, "ampere")


def padded_rank(rank: int) -> int:
    """The smallest rank a kernel is compiled for that holds `rank`; 0 if there is none.

    >>> padded_rank(1), padded_rank(8), padded_rank(9), padded_rank(128), padded_rank(129)
    (8, 8, 16, 128, 0)
    """
    return next((padded for padded in RANKS if rank <= padded), 0)


def tiles(architecture: str, itemsize: int, rank: int) -> Tiles:
    """The tiles for weights of `itemsize` bytes (2 or 4) and a rank of at most 128 on a target such as "sm_90"."""
    padded = padded_rank(rank)
    group = family(architecture)
    if group == "cdna" and itemsize == 4:
        # Eight columns alone would go to the 4×4 matrix instruction, at a quarter of the other ones' pace.
        padded = max(padded, 16)
    precision, options = _arithmetic(group)
    own_blocks = {"ampere": _AMPERE_BLOCKS, "blackwell": _BLACKWELL_BLOCKS, "cdna": _CDNA_BLOCKS}.get(group, {})
    block = own_blocks.get(padded, _BLOCKS[padded])
    return Tiles(
        rank=padded,
        strip=StripTile(*_STRIPS[group, itemsize][padded]),
        block=BlockTile(*block),
        precision=precision,
        sum_block=min(256, padded * padded),
        sum_width=2048 // min(256, padded * padded),
        options=options,
    )


def gram_tile(architecture: str, itemsize: int) -> GramTile:
    """The direct solver's tile for weights of `itemsize` bytes (2 or 4) on a target such as "sm_90"."""
    group = family(architecture)
    own, inner, warps, stages = _GRAMS[group, itemsize]
    return GramTile(own, inner, warps, stages, *_arithmetic(group))


def _arithmetic(group: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The float32 product of a family, and what its compiler is told besides."""
    # The 16×16 matrix instructions: no slower than the 32×32 ones that the compiler would take from rank 32 on,
    # with fewer accumulators a wave, and their layout is the one that an emulator has proven.
    return ("ieee", (("matrix_instr_nonkdim", 16),)) if group == "cdna" else ("tf32x3", ())


def aligned(count: int) -> int:
    """`count` elements rounded up to the alignment of a row.

    >>> aligned(1), aligned(16), aligned(17)
    (16, 16, 32)
    """
    return round_up(count, ALIGNMENT)
