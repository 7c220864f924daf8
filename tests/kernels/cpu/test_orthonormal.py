"""A block made orthonormal against a basis, and what it says of one that has no new direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.cpu.orthonormal import orthonormal_against

# Some units in the last place of float32: of a unit vector's entries, and of inner products of 900 of them.
ERROR = 2e-6


def rows(count: int, n: int, seed: int) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def basis(count: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(rows(count, n, seed).double().T)[0].T.float().contiguous()


def against(Q: Tensor, fixed: Tensor | None, Z: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    return orthonormal_against(Q, fixed, Z, vanished=1e-6, spread=1e-6, long=0.5)


@pytest.mark.parametrize("width", [1, 3, 4, 8, 11])
@pytest.mark.parametrize(("held", "kept"), [(0, 0), (1, 0), (37, 0), (37, 21), (0, 6)])
def test_orthonormal_and_all_of_it(width: int, held: int, kept: int) -> None:
    n = 901
    whole = basis(held + kept, n, seed=1) if held + kept else torch.empty(0, n)
    Q, fixed = whole[:held], whole[held:].contiguous() if kept else None
    Z = rows(width, n, seed=2) + (30 * rows(width, held + kept, seed=3) @ whole if held + kept else 0)
    found = against(Q, fixed, Z)
    assert found is not None
    X, coupling, along = found
    wide = X.double()
    assert float((wide @ wide.T - torch.eye(width)).abs().max()) < ERROR
    if held + kept:
        assert float((wide @ whole.double().T).abs().max()) < ERROR
    again = coupling.T @ wide + along.T @ Q.double()
    if fixed is not None:
        again += (Z.double() @ fixed.double().T) @ fixed.double()
    assert float((again - Z.double()).norm() / Z.double().norm()) < ERROR
    assert torch.equal(coupling, coupling.triu())


def test_nothing_is_made_of_rounding() -> None:
    """A row within the basis, one that is a multiple of another, and a row of zeros are for the careful way."""
    Q = basis(20, 300, seed=1)
    inside = rows(4, 20, seed=2) @ Q
    twice = rows(4, 300, seed=3)
    twice[2] = 2 * twice[1]
    zero = rows(4, 300, seed=4)
    zero[3] = 0
    for Z in (inside, twice, zero):
        assert against(Q, None, Z) is None
    assert against(Q, None, rows(4, 300, seed=3)) is not None
