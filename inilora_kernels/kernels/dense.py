"""The float64 algebra of few long vectors, rows of a matrix, by torch: a run of their columns at a time.

On a CPU threads share the runs, which depend on the shape alone, each with one thread of torch's; so the bits do not
depend on how many there are. On a device all columns are one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from ..memory import returned
from .rounding import round_up
from .streaming import FEW_ELEMENTS, strips
from .threads import share, worth

# At most so many runs, of at least so many columns, a multiple of a cache line's.
_MOST_RUNS, _LEAST_COLUMNS, _LINE = 8, 256, 8
# Up to so many rows, and products of two numbers.
_FEW_ROWS, _FEW_PRODUCTS = 16, 1 << 19

Result = TypeVar("Result")


def combine(rows: Tensor, coefficients: Tensor, threads: int) -> Tensor:
    """The combinations of orthonormal rows (m×n) with these coefficients (s×m), orthonormal too (s×n), in float64.

    They are summed in the rows' own precision, and then made orthonormal, so that they are as accurate as the rows are.
    All NaN where the coefficients' rows are not independent.

    >>> combine(torch.eye(2, 3), torch.tensor([[0.6, 0.8]], dtype=torch.float64), threads=1)
    tensor([[0.6000, 0.8000, 0.0000]], dtype=torch.float64)
    """
    weights = coefficients.to(rows.device, rows.dtype, copy=True)
    X = returned((len(weights), rows.shape[1]), torch.float64, rows.device)

    def combine_run(run: slice) -> None:
        X[:, run] = weights @ rows[:, run].clone()

    _by_runs(combine_run, rows, len(weights) * len(rows), threads)
    # The rows are orthonormal to float32's rounding, so that one Cholesky QR makes the combinations so to float64's.
    triangle, failed = torch.linalg.cholesky_ex(inner(X, X, threads))
    # Nothing can be proven by rows that are not independent.
    triangle = triangle.masked_fill(failed > 0, torch.nan)
    identity = torch.eye(len(X), dtype=X.dtype, device=X.device)
    return turn(X, torch.linalg.solve_triangular(triangle, identity, upper=False), threads)


def inner(left: Tensor, right: Tensor, threads: int) -> Tensor:
    """left·rightᵀ of two sets of rows.

    >>> inner(torch.ones(1, 3).double(), torch.ones(2, 3).double(), threads=1)
    tensor([[3., 3.]], dtype=torch.float64)
    """
    return _sum_of_runs(lambda run: left[:, run] @ right[:, run].T, left, len(left) * len(right), threads)


def inner_in_parts(left: Tensor, right: Tensor) -> Tensor:
    """left·rightᵀ of two sets of rows (r×n) of any dtype, in float64 on the left's device, a part at a time.

    Whole they might take half of W's bytes. On one thread of torch's the bits depend on the shape alone.

    >>> inner_in_parts(torch.ones(1, 3), torch.ones(2, 3))
    tensor([[3., 3.]], dtype=torch.float64)
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for columns in strips(left.T, FEW_ELEMENTS):
        part = left[:, columns].double()
        total.addmm_(part, right[:, columns].to(part).T)
    return total


def few(*rows: Tensor) -> bool:
    """Whether these are so few rows, of float32 or float64 on the CPU, that few_rows.py's calls take less time."""
    for one in rows:
        r, n = one.shape
        if r > _FEW_ROWS or r * r * n > _FEW_PRODUCTS or one.requires_grad:
            return False
        if one.device.type != "cpu" or one.dtype not in (torch.float32, torch.float64):
            return False
    return True


def residual_gram(X: Tensor, image: Tensor, form: Tensor, threads: int) -> Tensor:
    """RRᵀ (s×s) of R = image − form·X, rows (s×n), of an image in any dtype.

    >>> residual_gram(torch.eye(1, 2).double(), torch.ones(1, 2).double(), torch.eye(1).double(), threads=1)
    tensor([[1.]], dtype=torch.float64)
    """

    def of_run(run: slice) -> Tensor:
        R = torch.addmm(image[:, run].to(X.dtype), form, X[:, run], alpha=-1)
        return R @ R.T

    return _sum_of_runs(of_run, X, 2 * len(X) ** 2, threads)


def turn(rows: Tensor, coefficients: Tensor, threads: int) -> Tensor:
    """The first s of m rows (m×n), which become coefficients (s×m) times all of them.

    >>> turn(torch.eye(2).double(), torch.tensor([[0.0, 2.0]], dtype=torch.float64), threads=1)
    tensor([[0., 2.]], dtype=torch.float64)
    """
    s, weights = len(coefficients), coefficients.to(rows.device).clone()

    def turn_run(run: slice) -> None:
        rows[:s, run] = weights @ rows[:, run]

    _by_runs(turn_run, rows, s * len(rows), threads)
    return rows[:s]


def _by_runs(work: Callable[[slice], Result], rows: Tensor, products: int, threads: int) -> list[Result]:
    """What `work` gives for each run of the rows' columns, in order, of which a column takes so many products."""
    runs = _runs(rows, products)
    found: dict[int, Result] = {}

    def several(left: Iterator[slice]) -> None:
        for run in left:
            found[run.start] = work(run)

    share(several, runs, min(threads, len(runs)))
    return [found[run.start] for run in runs]


def _sum_of_runs(work: Callable[[slice], Tensor], rows: Tensor, products: int, threads: int) -> Tensor:
    first, *others = _by_runs(work, rows, products, threads)
    for part in others:
        first += part
    return first


def _runs(rows: Tensor, products: int) -> list[slice]:
    """One where the work is worth no second thread, or is a device's."""
    n = rows.shape[1]
    shared = rows.device.type == "cpu" and worth(2, 2 * n * products) > 1
    count = max(1, min(_MOST_RUNS, n // _LEAST_COLUMNS)) if shared else 1
    step = round_up(ceil(n / count), _LINE)
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]
