"""Which of all factors with one product a training starts from: its loss at the start does not see the difference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .kernels.dense import few, inner_in_parts
from .kernels.streaming import FEW_ELEMENTS, strips
from .kernels.threads import both, one_torch_thread


def nearest(A: Tensor, B: Tensor, A_start: Tensor, B_start: Tensor) -> tuple[Tensor, Tensor]:
    """IniLoRA from a direct solver: of all balanced factors with the product BA, those nearest to (A_start, B_start).

    (GᵀA, BG) with G orthogonal (r×r) minimizing ||BG − B_start||² + ||GᵀA − A_start||²: the Procrustes rotation G = XYᵀ
    of the SVD BᵀB_start + A·A_startᵀ = XΣYᵀ. The loss does not see G; training does. Adam's own result is such a pair
    too, in another rotation that remembers more of its start. Scaling: s = 1.

    >>> A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0]])
    >>> nearest(A, B, -A, -B)
    (tensor([[-3.,  0.]]), tensor([[-3.]]))
    """
    sides = (B.T, A, B_start.T, A_start)
    if few(*sides) and all(side.dtype == torch.float32 for side in sides):
        from .kernels.cpu import few_rows

        near_B, near_A, found = few_rows.nearest(*(side.contiguous().numpy() for side in sides))
        if found:
            return torch.from_numpy(near_A), torch.from_numpy(near_B).T
    flops = 2 * A.numel() * len(A)
    # One thread for each side, so that the bits do not depend on how many there are.
    with one_torch_thread() as threads:
        of_B, of_A = both(partial(inner_in_parts, B.T, B_start.T), partial(inner_in_parts, A, A_start), threads, flops)
        left, _, right = torch.linalg.svd(of_B + of_A)
        G = left @ right
        B_near, A_near = both(partial(_turned, G, B.T), partial(_turned, G, A), threads, flops)
    return A_near, B_near.T


def _turned(G: Tensor, rows: Tensor) -> Tensor:
    """Gᵀ·rows (r×n) in float32, a part at a time."""
    turned = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part in strips(rows.T, FEW_ELEMENTS):
        turned[:, part] = G.T @ rows[:, part].double()
    return turned
