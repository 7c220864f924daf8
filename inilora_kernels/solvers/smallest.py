"""The smallest singular triplets of W, for MiLoRA: without a full SVD where W is large."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.streaming import strips

_DENSE_SIZE = 1024
_OVERSAMPLING = 8
_MOST_ROUNDS = 100


def minor(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d×r), S (r, descending), V (k×r), float64: the triplets of the r smallest of W's min(d, k) singular values.

    Up to 1,024 by a full SVD in float64. Beyond, by subspace iteration with (G + μI)⁻¹ of the float64 Gram matrix G of
    the smaller side, from one Cholesky factorization, until the values stand still to 1e-13: a quarter of the
    operations of G's tridiagonalization. μ = 2⁻⁵²·trace keeps a singular W factorizable. Takes two matrices of
    8·min(d, k)² bytes.

    >>> U, S, V = minor(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    >>> round(float(S), 9)
    1.0
    """
    tall = W if W.shape[0] >= W.shape[1] else W.T
    size = tall.shape[1]
    if size <= _DENSE_SIZE:
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        return U[:, -rank:], S[-rank:], Vh[-rank:].T
    gram = torch.zeros(size, size, dtype=torch.float64, device=W.device)
    for rows in strips(tall):
        strip = tall[rows].double()
        gram.addmm_(strip.T, strip)
    gram.diagonal().add_(2.0**-52 * gram.trace())
    factor = torch.linalg.cholesky(gram)
    del gram
    start = torch.randn(size, min(size, rank + _OVERSAMPLING), generator=torch.Generator().manual_seed(0))
    X = torch.linalg.qr(start.to(W.device, torch.float64)).Q
    last = torch.zeros(rank, dtype=torch.float64, device=W.device)
    for _ in range(_MOST_ROUNDS):
        X = torch.linalg.qr(torch.cholesky_solve(X, factor)).Q
        U, S, Vh = torch.linalg.svd(_times(tall, X), full_matrices=False)
        X = X @ Vh.T
        if torch.allclose(S[-rank:], last, rtol=1e-13, atol=1e-14 * float(S[0])):
            break
        last = S[-rank:]
    U, S, V = U[:, -rank:], S[-rank:], X[:, -rank:]
    return (U, S, V) if tall is W else (V, S, U)


def _times(W: Tensor, X: Tensor) -> Tensor:
    return torch.cat([W[rows].double() @ X for rows in strips(W)])
