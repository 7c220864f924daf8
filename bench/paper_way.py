"""The paper's way, as a user would write it: layer by layer, with autograd, torch.optim.Adam and StepLR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PaperWay:
    """Layers in training: each has its own factors, optimizer and scheduler, as in the paper."""

    def __init__(self, matrices: Sequence[Tensor], rank: int, *, fused: bool) -> None:
        self.matrices = matrices
        self.layers = []
        for W in matrices:
            d, k = W.shape
            A = (torch.randn(rank, k, device=W.device) * 0.02).requires_grad_()
            B = (torch.randn(d, rank, device=W.device) * 0.02).requires_grad_()
            optimizer = torch.optim.Adam([A, B], lr=5e-4, fused=fused)
            self.layers.append((A, B, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5000, 0.9)))

    def steps(self, count: int) -> None:
        """`count` steps of every layer, one layer after the other, so that W stays in cache as far as it can."""
        for W, (A, B, optimizer, scheduler) in zip(self.matrices, self.layers, strict=True):
            for _ in range(count):
                optimizer.zero_grad()
                loss = ((B @ A - W) ** 2).mean()
                loss.backward()
                optimizer.step()
                scheduler.step()
