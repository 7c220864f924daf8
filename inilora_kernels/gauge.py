"""Which of all factors with one product a training starts from: its loss at the start does not see the difference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

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
    # One thread for each side, so that the bits do not depend on how many there are.
    with one_torch_thread() as threads:
        of_B, of_A = both(partial(_cross, B, B_start), partial(_cross, A.T, A_start.T), threads, 2 * A.numel() * len(A))
        left, _, right = torch.linalg.svd(of_B + of_A)
        G = left @ right
        B_near, A_near = both(partial(_turned, B, G), partial(_turned, A.T, G), threads, 2 * A.numel() * len(A))
    return A_near.T.contiguous(), B_near


def _cross(factor: Tensor, start: Tensor) -> Tensor:
    """factorᵀ·start (r×r) of two n×r matrices, in float64 a part at a time: whole they might take half of W's bytes."""
    first, *others = strips(factor, FEW_ELEMENTS)
    cross = factor[first].double().T @ start[first].to(factor.device, torch.float64)
    for rows in others:
        cross.addmm_(factor[rows].double().T, start[rows].to(cross))
    return cross


def _turned(factor: Tensor, G: Tensor) -> Tensor:
    """factor·G (n×r) in float32, a part at a time."""
    parts = [(factor[rows].double() @ G).float() for rows in strips(factor, FEW_ELEMENTS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
