"""A batch of matrices multiplied in plain torch: what the GPU's does, for tests of the searches alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from inilora_kernels.kernels.backend import Captured, no_graph
from inilora_kernels.kernels.rounding import round_up


class TorchBatch:
    """See GramBatch of kernels/backend.py. products: how many there were. active: as `keep` was last told."""

    captured: Captured = staticmethod(no_graph)

    def __init__(self, weights: Sequence[Tensor], count: int = 4, length: int | None = None) -> None:
        self._weights = weights
        self._tall = [W if W.shape[0] >= W.shape[1] else W.T for W in weights]
        self.shape = (count, 16, length or round_up(max(self.sizes), 64))
        self.energies = torch.zeros(count, dtype=torch.float64)
        self.energies[: len(weights)] = torch.tensor(
            [float(W.double().square().sum()) for W in weights], dtype=torch.float64
        )
        self.active: set[int] = set(range(len(weights)))
        self.products = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(W.shape[1] for W in self._tall)

    def __call__(self, X: Tensor) -> Tensor:
        self.products += 1
        Z = torch.zeros(self.shape)
        for index in self.active:
            W = self._tall[index].float()
            Z[index, :, : W.shape[1]] = X[index, :, : W.shape[1]] @ W.T @ W
        return Z

    def keep(self, active: Collection[int]) -> None:
        self.active = set(active)

    def tall(self, index: int) -> Tensor:
        return self._tall[index]

    def stored(self, index: int) -> Tensor:
        return self._weights[index]
