"""Factors of a live model compared with those of its folder."""

from __future__ import annotations

from typing import Any

import torch

from inilora_kernels import FactorSet

GIVEN: dict[str, Any] = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}


def same(one: FactorSet, other: FactorSet) -> bool:
    """A, B and the sha256; a prefix of the names may differ."""
    pairs = list(zip(one.values(), other.values(), strict=True))
    return all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.source_sha256 == b.source_sha256 for a, b in pairs)
