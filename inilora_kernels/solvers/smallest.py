"""The smallest singular triplets of W, for MiLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.threads import one_torch_thread


def minor(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d×r), S (r, descending), V (k×r), float64: the triplets of the r smallest of W's min(d, k) singular values.

    By a full singular value decomposition in float64. The smallest singular values of a weight lie close together and
    near zero, where the inverse of a Gram matrix has lost half the digits and an iteration converges to a mixture of
    hundreds of vectors: the product BA would have the right size and be wrong. A full decomposition is always right. It
    costs about 20·min(d, k)²·max(d, k) operations on one thread, so that the bits do not depend on how many there are,
    and the memory of four matrices of 8·d·k bytes.

    >>> U, S, V = minor(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    >>> round(float(S), 9)
    1.0
    """
    with one_torch_thread():
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, -rank:], S[-rank:], Vh[-rank:].T
