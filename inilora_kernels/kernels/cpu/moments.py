"""What a survey asks of all entries of a matrix, from one reading of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gram import stored
from .jit import njit
from .plain_products import SUMS
from .simd import LOADS_FLOAT16, entry

# By bytes of an entry: the integers that its bits are, without the sign, in the order of what they stand for.
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Moments:
    """Of all entries: the largest magnitude, infinite or NaN if one is; their sum, and that of their squares."""

    largest: float
    total: float
    squares: float


NOTHING = Moments(0.0, 0.0, 0.0)


def moments(W: Tensor, above: Moments = NOTHING) -> Moments:
    """The moments of W (d×k), of any float dtype, on the CPU, summed in float64.

    above: of the rows above W's, to be counted as well: the same bits as if all of them were given at once.

    >>> moments(torch.tensor([[1.0, -3.0], [0.5, 0.0]]))
    Moments(largest=3.0, total=-1.5, squares=10.25)
    """
    if W.shape[1] == 1:
        # However far torch says that its columns are apart: rows of one entry, as in a part of it.
        W = W.as_strided(W.shape, (W.stride(0), 1))
    W = W if 1 in W.stride() else W.contiguous()
    if W.dtype == torch.float16 and not LOADS_FLOAT16:
        W = W.float()
    flat, stride, (m, n) = stored(W)
    kind = _BITS[flat.itemsize]
    largest, total, squares = _moments(flat, flat.view(kind), stride, m, n, above.total, above.squares)
    entry = torch.from_numpy(np.array([largest], dtype=kind)).view(W.dtype)
    larger = above.largest if float(entry) <= above.largest or math.isnan(above.largest) else float(entry)
    return Moments(larger, float(total), float(squares))


@njit(cache=True, nogil=True, fastmath=SUMS)
def _moments(W: Any, bits: Any, stride: int, m: int, n: int, total: float, squares: float) -> Any:
    """The largest bits without the sign of the stored m×n matrix, and Σ W and Σ W² added to the sums. Reads W once."""
    kind = bits.dtype.type
    # A numpy scalar as an argument would take numba longer than a small matrix.
    all_but_sign = kind((1 << (8 * bits.itemsize - 1)) - 1)
    largest = kind(0)
    for i in range(m):
        row, its_bits = W[i * stride : i * stride + n], bits[i * stride : i * stride + n]
        part, square = 0.0, 0.0
        for j in range(n):
            wide = np.float64(entry(row, j))
            part += wide
            square += wide * wide
        total += part
        squares += square
        for j in range(n):
            largest = max(largest, kind(its_bits[j] & all_but_sign))
    return largest, total, squares
