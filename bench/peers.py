"""The solvers that a user would otherwise take, each as its own documentation calls it: W (d×k) to (A, B)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from inilora_kernels import approximate

# A (r×k) and B (d×r).
Product = tuple[Tensor, Tensor]
Solver = Callable[[Tensor, int], Product]

# Where a peer takes a tolerance: one whose product has an excess of about 1e-10, as its default of full precision does
# in scipy's, for which a looser one saves no time. PRIMME's own default takes a tenth more.
_TOLERANCE = 1e-4


def ours(W: Tensor, rank: int) -> Product:
    """The method that a LoRA starts from, with its certificate."""
    factors = approximate(W, rank, solver="krylov")
    return factors.A, factors.B


def ours_together(matrices: list[Tensor], rank: int) -> list[Product]:
    """The same of several matrices, in one call."""
    return [(one.A, one.B) for one in approximate(matrices, rank, solver="krylov")]


def _split(U: Tensor, S: Tensor, V: Tensor, rank: int) -> Product:
    """(A, B) of the leading triplets."""
    return (V[:, :rank] * S[:rank]).T, U[:, :rank]


def _of_arrays(U: np.ndarray, S: np.ndarray, Vh: np.ndarray, rank: int) -> Product:
    return _split(*(torch.from_numpy(part.copy()) for part in (U, S, Vh.T)), rank)


def linear(W: Tensor) -> nn.Linear:
    """A frozen layer that holds W itself."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W, requires_grad=False)
    return layer


def _peft(init: str) -> Solver:
    def solve(W: Tensor, rank: int) -> Product:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=init)
        # PEFT overwrites the weight that it is given.
        layer = get_peft_model(nn.Sequential(linear(W.clone())), config).base_model.model[0]
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    return solve


def _lowrank(W: Tensor, rank: int) -> Product:
    return _split(*torch.svd_lowrank(W.float(), q=rank, niter=16), rank)


def _randomized(rounds: int) -> Solver:
    def solve(W: Tensor, rank: int) -> Product:
        from sklearn.utils.extmath import randomized_svd

        return _of_arrays(*randomized_svd(W.float().numpy(), rank, n_iter=rounds, random_state=0), rank)

    return solve


def _svds(solver: str) -> Solver:
    def solve(W: Tensor, rank: int) -> Product:
        from scipy.sparse.linalg import svds

        return _of_arrays(*svds(W.float().numpy(), rank, solver=solver, rng=0, tol=_TOLERANCE), rank)

    return solve


def _primme(W: Tensor, rank: int) -> Product:
    import primme

    return _of_arrays(*primme.svds(W.float().numpy(), rank, tol=_TOLERANCE), rank)


PEERS: dict[str, Solver] = {
    "PROPACK": _svds("propack"),
    "ARPACK": _svds("arpack"),
    "PRIMME": _primme,
    "pissa_niter_4": _peft("pissa_niter_4"),
    "pissa_niter_16": _peft("pissa_niter_16"),
    "svd_lowrank(niter=16)": _lowrank,
    "randomized_svd(n_iter=4)": _randomized(4),
    "randomized_svd(n_iter=16)": _randomized(16),
}
# PyPI has its source alone, which needs BLAS's headers to build.
if find_spec("primme") is None:
    del PEERS["PRIMME"]
