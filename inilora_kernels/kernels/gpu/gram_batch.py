"""A batch of matrices on the GPU, which the direct solver multiplies with blocks of vectors, two launches a group."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..backend import WIDTH, Captured, no_graph
from .gram import gram_kernel
from .gram_layout import BATCH, GramField, GramLayout

# float16 ends at 2¹⁶: unit vectors, and their images of norm at most ||W||, are scaled to just below that.
_FLOAT16_EXPONENT = 14


class GramBatch:
    """W (d×n, tall) of each matrix of a batch, and X ↦ XWᵀW for a block of vectors of each.

    energies: ||W||_F² of each, float64, after `measure`. X, Z (BATCH, WIDTH, N) and Y (BATCH, WIDTH, D), float32: the
        blocks given, XWᵀW and XWᵀ; zero beyond each matrix's own sizes and beyond the batch's matrices.
    captured: as GramBatch of kernels/backend.py has it.
    """

    def __init__(
        self, layout: GramLayout, dtype: torch.dtype, device: torch.device, captured: Captured = no_graph
    ) -> None:
        self.layout, self.captured = layout, captured

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.weights = zeros(layout.weights, dtype=dtype)
        self.energies = zeros(BATCH, dtype=torch.float64)
        self.exponents = zeros(2, BATCH)
        self.X, self.Z = zeros(BATCH, WIDTH, layout.N), zeros(BATCH, WIDTH, layout.N)
        self.Y = zeros(BATCH, WIDTH, layout.D)
        self._active = set(range(len(layout.places)))
        self._whole = [layout.work(along_rows=along_rows) for along_rows in (True, False)]
        self._work = [torch.tensor(work, device=device) for work, _ in self._whole]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the blocks that it takes."""
        return BATCH, WIDTH, self.layout.N

    @property
    def sizes(self) -> tuple[int, ...]:
        """n of each matrix."""
        return tuple(place.columns for place in self.layout.places)

    def padded(self, index: int) -> Tensor:
        """One tall W with the zeros that its rows are padded with: a view."""
        place = self.layout.places[index]
        return self.weights[place.W_offset :][: place.rows * place.stride].view(place.rows, place.stride)

    def tall(self, index: int) -> Tensor:
        """One W (d×n), d ≥ n: a view."""
        return self.padded(index)[:, : self.layout.places[index].columns]

    def stored(self, index: int) -> Tensor:
        """One W as it was given, tall or wide: a view."""
        return self.tall(index).T if self.layout.places[index].transposed else self.tall(index)

    def measure(self) -> None:
        """Compute ||W||_F² of every matrix, all of which are in place by now, without waiting for the device."""
        for index in range(len(self.layout.places)):
            self.energies[index] = torch.linalg.vector_norm(self.padded(index), dtype=torch.float64).square()
        if self.weights.dtype == torch.float16:
            self.exponents[0] = _FLOAT16_EXPONENT
            norms = self.energies.sqrt().clamp(min=2.0**-40)
            self.exponents[1] = (_FLOAT16_EXPONENT - norms.log2().ceil()).clamp(-60, 60)

    def keep(self, active: Collection[int]) -> None:
        """Go on with these matrices alone; the grid stays the same, so that a captured graph stays valid."""
        if self._active == set(active):
            return
        self._active = set(active)
        for (work, _), buffer in zip(self._whole, self._work, strict=True):
            rest = work.copy()
            idle = [index for index in range(len(self.layout.places)) if index not in active]
            finished = torch.isin(torch.from_numpy(rest[:, GramField.MATRIX]), torch.tensor(idle)).numpy()
            rest[finished, GramField.OWNED] = rest[finished, GramField.THROUGH] = 0
            buffer.copy_(torch.from_numpy(rest))

    def __call__(self, X: Tensor) -> Tensor:
        """XWᵀW (BATCH, WIDTH, N), which the next call overwrites, for vectors X of at most unit length."""
        self.X.copy_(X)
        self.launch()
        return self.Z

    def launch(self) -> None:
        """Both products of every group, group by group."""
        for group in range(len(self.layout.groups)):
            self._product(group, self.X, self.Y, along_rows=True)
            self._product(group, self.Y, self.Z, along_rows=False)

    def _product(self, group: int, given: Tensor, found: Tensor, *, along_rows: bool) -> None:
        tile, which = self.layout.tile, 0 if along_rows else 1
        _, starts = self._whole[which]
        first, last = starts[group], starts[group + 1]
        gram_kernel[(last - first,)](
            self.weights,
            given,
            found,
            self.exponents[which],
            self._work[which],
            first,
            given.shape[2],
            found.shape[2],
            OWN=tile.own,
            INNER=tile.inner,
            STAGES=tile.stages,
            ALONG_ROWS=along_rows,
            SPLIT=self.weights.dtype != torch.float32,
            PRECISION=tile.precision,
            INTERPRETED=self.X.device.type == "cpu",
            # Read again by the second launch where the group fits the cache, and then not before the next block.
            W_POLICY="evict_last" if along_rows and self.layout.resident else "evict_first",
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **dict(tile.options),
        )
