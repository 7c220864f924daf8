"""What one pass over W computes, against float64, for matrices of several strips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels import streaming
from inilora_kernels.kernels.streaming import energy, gram_multiplier, gram_product, losses, products, strips
from inilora_kernels.kernels.threads import one_torch_thread

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 8 to 64 rows of 97, so that a small matrix has many."""
    monkeypatch.setattr(streaming, "_STRIP_ELEMENTS", 64 * 97)


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(301, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("elements", [1, 97, 500, 10**6])
def test_strips_are_every_row_once(elements: int) -> None:
    W = matrix()
    assert torch.equal(torch.cat([W[rows] for rows in strips(W, elements)]), W)
    assert max(len(W[rows]) for rows in strips(W, elements)) * 97 <= max(97, elements)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_the_gram_matrix(dtype: torch.dtype) -> None:
    W, X = matrix(dtype), torch.randn(5, 97, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = X @ W.double().T, X @ W.double().T @ W.double()
    for found, true in zip(gram_product(W, X), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-11)
    # float32 sums of at most 301 products, each rounded once: below 301·2⁻²⁴ of the norm.
    for found, true in zip(gram_multiplier(W, torch.float32, threads=2)(X.float()), expected, strict=True):
        assert float((found.double() - true).norm() / true.norm()) < 301 * 2.0**-24


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("image", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 16, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_any_number_of_rows(
    dtype: torch.dtype, rows: int, image: torch.dtype, upright: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in float64, the other at least in `image`; the same bits on two threads, from a W that begins anywhere."""
    monkeypatch.setattr(streaming, "_PART_BYTES", 8 * 64 * 97)
    W = matrix(dtype)
    W = W if upright else W.T.contiguous().T
    X = torch.linalg.qr(torch.randn(97, rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q.T
    X, wide = X.contiguous(), W.double()
    elsewhere = torch.empty(W.numel() + 3, dtype=dtype)[3:].view(W.T.shape if not upright else W.shape)
    elsewhere = elsewhere if upright else elsewhere.T
    elsewhere.copy_(W)
    with one_torch_thread():
        found, again = products(W, X, 1, image), products(elsewhere, X, 2, image)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])
    torch.testing.assert_close(found[0], X @ wide.T, rtol=1e-12, atol=1e-11)
    # Sums of 301 products, each rounded once.
    unit = torch.finfo(image).eps
    assert float((found[1].double() - X @ wide.T @ wide).norm()) < 301 * unit * float(wide.norm()) ** 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_energy_are_those_of_the_stored_values(dtype: torch.dtype) -> None:
    W = matrix(dtype)
    pairs = [(torch.randn(rank, 97), torch.randn(301, rank)) for rank in (1, 4)]
    whole, reached = losses(W, pairs)
    assert whole == pytest.approx(float(W.double().square().sum()), rel=1e-12)
    assert energy(W) == pytest.approx(whole, rel=1e-12)
    for loss, (A, B) in zip(reached, pairs, strict=True):
        assert loss == pytest.approx(float((W.double() - B.double() @ A.double()).square().sum()), rel=1e-12)


def test_losses_have_the_same_bits_for_any_number_of_threads() -> None:
    pair = (torch.randn(3, 97), torch.randn(301, 3))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(losses(matrix(), [pair]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
