"""The results of a run: the factors A and B of each matrix, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Factors are stored in float32, so a product BA cannot be closer to W than half a unit in float32's last place of
# each entry. An optimum below this share of ||W||² is zero for every float32 result.
FLOAT32_FLOOR = 2.0**-48


@dataclass(frozen=True)
class Certificate:
    """How good one matrix's factors are: f = ||W − BA||_F² against the least that rank r allows (Eckart–Young).

    loss: f, summed in float64 from the residual itself.
    optimum: f* = Σ_{i>r} σ_i², or a proven lower bound on it, so that the excess is never understated.
    energy: ||W||_F².
    steps: optimizer steps taken, 0 for methods without any.
    certified: whether the bound is within 1e-8 of f* (or of float32's resolution). False where W's spectrum did not
        allow that; the excess is then still never understated, but may be far overstated.

    >>> certificate = Certificate(loss=1.5, optimum=1.0, energy=10.0, steps=100)
    >>> certificate.excess, certificate.kept
    (0.5, 0.85)
    """

    loss: float
    optimum: float
    energy: float
    steps: int
    certified: bool = True

    @property
    def excess(self) -> float:
        """f/f* − 1: 0 at the minimum.

        Where f* is below float32's resolution of W (an exactly low-rank W), the excess is measured in units of that
        resolution, 2⁻⁴⁸·||W||², instead of dividing by zero.
        """
        if self.energy == 0.0:
            return 0.0 if self.loss == 0.0 else float("inf")
        return (self.loss - self.optimum) / max(self.optimum, FLOAT32_FLOOR * self.energy)

    @property
    def kept(self) -> float:
        """Share of W's energy that BA keeps: 1 − f/||W||²."""
        return 1.0 - self.loss / self.energy if self.energy else 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Factors:
    """Factors of one matrix W (d×k): B (d×r) and A (r×k), float32 on the CPU, with BA ≈ W.

    source_sha256: of the bytes of the source tensor, as stored in the checkpoint.
    rows: for a part of a fused weight, the rows of W (in out_features) that it covers: [start, stop), or [start, stop,
        period) for the same rows of every period, in architectures that mix heads; None for all.
    transposed: the checkpoint stores W as (in_features, out_features), as GPT-2's Conv1D does.
    dequantization: how the source was dequantized, where it is stored quantized; "" otherwise.
    history: (step, loss) pairs in order, as sampled during the run.
    checkpoints: (A, B) kept at earlier steps, by step.
    singular_values: W's leading ones, descending, as many as are known (64 at most); none in files of version 0.1.0.

    Two are equal only if they are the same object: compare A and B by torch.equal.
    """

    A: Tensor
    B: Tensor
    certificate: Certificate
    source_sha256: str
    _: KW_ONLY
    rows: tuple[int, int] | tuple[int, int, int] | None = None
    transposed: bool = False
    dequantization: str = ""
    history: tuple[tuple[int, float], ...] = ()
    checkpoints: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    singular_values: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def product(self) -> Tensor:
        """BA (d×k), float32."""
        return self.B @ self.A

    def __repr__(self) -> str:
        d, k = self.B.shape[0], self.A.shape[1]
        quality = f"keeps {self.certificate.kept:.2%} of the energy, excess {self.certificate.excess:.1e}"
        if math.isnan(self.certificate.energy):
            quality = "not certified"
        return f"Factors({d}×{k}, rank {self.rank}, {quality})"
