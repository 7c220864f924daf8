"""XWᵀ and XWᵀW for a block X of every matrix of a batch, of any shapes: the direct solver's kernel.

`gradient_products_kernel` is its sister, but here the second product needs the first one whole: Z = YW with Y = XWᵀ.
A strip of W would have to wait on the chip for its row of Y, and each strip would write a share of Z of 4·16 bytes a
column: an H100 holds 16 to 24 rows of a 4096² bfloat16 matrix a multiprocessor, whose shares would be 1.3 to 2 times
W's bytes. Reading W a second time is cheaper, writes nothing but the results, and comes from the cache wherever a
group of matrices fits into it: then W is read from memory once. So the kernel is launched twice for each group: its
programs own rows of W in the first launch and columns in the second.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from ..backend import WIDTH
from .gram_layout import GramField

GRAM_FIELDS = tl.constexpr(len(GramField))
GRAM_W_OFFSET = tl.constexpr(int(GramField.W_OFFSET))
GRAM_STRIDE = tl.constexpr(int(GramField.STRIDE))
GRAM_OWNED = tl.constexpr(int(GramField.OWNED))
GRAM_THROUGH = tl.constexpr(int(GramField.THROUGH))
GRAM_GIVEN_OFFSET = tl.constexpr(int(GramField.GIVEN_OFFSET))
GRAM_FOUND_OFFSET = tl.constexpr(int(GramField.FOUND_OFFSET))
GRAM_MATRIX = tl.constexpr(int(GramField.MATRIX))
GRAM_WIDTH = tl.constexpr(WIDTH)


@triton.jit(do_not_specialize=["first_program"])
def gram_kernel(
    weights,
    given,
    found,
    exponents,
    work,
    first_program,
    given_stride,
    found_stride,
    OWN: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    W_POLICY: tl.constexpr,
):
    """XWᵀ for OWN rows of W and the block `given`, X (16×n); or YW for OWN columns of W, where `given` is Y.

    A program walks along the other side of W in steps of INNER. Reads its OWN rows (columns) of W once and `given`
    once, 4·16·n bytes, from the cache; writes 4·16·OWN bytes. No program writes what another one reads or writes, and
    no sum crosses programs. FLOPs: 2·16 an entry of W and a part of `given`.

    SPLIT: 16-bit weights are exact in the tensor cores; `given` goes in as three 16-bit parts, which hold the 24 bits
    of float32, times a power of two, 2^exponents[matrix], that keeps float16's parts in its range. Otherwise PRECISION
    names the float32 product. Each step's product is a sum of its own, added in float32: what tensor cores round away
    in a sum does not grow with n.
    """
    row = work + (first_program + tl.program_id(0)).to(tl.int64) * GRAM_FIELDS
    W_offset = tl.multiple_of(tl.load(row + GRAM_W_OFFSET), 16)
    stride = tl.multiple_of(tl.load(row + GRAM_STRIDE).to(tl.int32), 16)
    # A column of W may reach beyond 2³¹ elements.
    far_stride = stride.to(tl.int64)
    owned = tl.load(row + GRAM_OWNED).to(tl.int32)
    through = tl.load(row + GRAM_THROUGH).to(tl.int32)
    given_offset = tl.multiple_of(tl.load(row + GRAM_GIVEN_OFFSET), 16)
    found_offset = tl.multiple_of(tl.load(row + GRAM_FOUND_OFFSET), 16)
    exponent = tl.load(exponents + tl.load(row + GRAM_MATRIX))
    scale = tl.exp2(exponent)
    unscale = tl.exp2(-exponent)

    own = tl.arange(0, OWN)
    vector = tl.arange(0, GRAM_WIDTH)
    # Padding is read and written like the rest, so that every load along a contiguous side is 128 bits wide. W's
    # columns are padded with zeros, and so are the results.
    padded_through = (through + 15) // 16 * 16
    inside_padded = own < (owned + 15) // 16 * 16
    total = tl.full((OWN, GRAM_WIDTH), 0.0, tl.float32)
    for start in tl.range(0, through, INNER, num_stages=STAGES):
        inner = tl.arange(0, INNER)
        inside = start + inner < padded_through
        if ALONG_ROWS:
            W_tile = tl.load(
                weights + W_offset + start + own[:, None] * stride + inner[None, :],
                mask=(own < owned)[:, None] & inside[None, :],
                other=0.0,
                eviction_policy=W_POLICY,
            )
        else:
            W_tile = tl.load(
                weights + W_offset + start * far_stride + inner[:, None] * stride + own[None, :],
                mask=(start + inner < through)[:, None] & inside_padded[None, :],
                other=0.0,
                eviction_policy=W_POLICY,
            )
        block = tl.load(
            given + given_offset + start + vector[None, :] * given_stride + inner[:, None],
            mask=inside[:, None],
            other=0.0,
        )
        if INTERPRETED:
            W_tile = W_tile.to(tl.float32)
        if not ALONG_ROWS:
            W_tile = tl.trans(W_tile)
        if SPLIT:
            block *= scale
            high = block.to(weights.dtype.element_ty)
            rest = block - high.to(tl.float32)
            middle = rest.to(weights.dtype.element_ty)
            low = (rest - middle.to(tl.float32)).to(weights.dtype.element_ty)
            if INTERPRETED:
                high = high.to(tl.float32)
                middle = middle.to(tl.float32)
                low = low.to(tl.float32)
            part = tl.dot(W_tile, low)
            part = tl.dot(W_tile, middle, part)
            part = tl.dot(W_tile, high, part)
        elif ALONG_ROWS:
            part = tl.dot(W_tile, block, input_precision=PRECISION)
        else:
            part = tl.trans(tl.dot(tl.trans(block), tl.trans(W_tile), input_precision=PRECISION))
        total += part
    if SPLIT:
        total *= unscale
    tl.store(
        found + found_offset + vector[None, :] * found_stride + own[:, None],
        total,
        mask=inside_padded[:, None],
    )
