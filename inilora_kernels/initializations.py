"""Every initialization of the paper's tables and figures: a function for each, and how it is computed.

To add one, write a function with its formula here, and a row of METHODS.

The convention for all: W (d×k) is the pretrained weight, B (d×r), A (r×k), float32, and the adapted layer computes
W x + s·(BA − B0A0) x with s = lora_alpha/r, where B0A0 is the product at the start. So the model's output at step 0 is
that of W for every method: what the start changes is the direction of training. (The residual form, R = W − s·B0A0 in
the base, is equal in exact arithmetic.) The paper trains with s = 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .errors import OptionError
from .factors import Factors
from .gauge import nearest
from .kernels.backend import Backend
from .kernels.dense import few
from .kernels.streaming import FEW_ELEMENTS, strips
from .options import Options
from .solvers.krylov import TOLERANCE, dense
from .solvers.run import (
    Choose,
    Pair,
    RandomStart,
    Shape,
    Solve,
    Task,
    against_optimum,
    against_triplets,
    by_adam,
    by_krylov,
    directly,
)
from .solvers.smallest import minor
from .solvers.triplets import Principal
from .suggestions import require_choice

# PiSSA promises more than the loss: the product BA of the full SVD itself. Its error is of the order of the square
# root of the excess, where the gap behind σ_r is small.
PISSA_TOLERANCE = 1e-11


def gaussian(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """IniLoRA's start, and the whole of IniLoRA with 0 steps: A and B ~ N(0, σ̄²), A drawn first.

    Source: paper, Eq. 2; with 0 steps, Table 7. shape: (d, k) of W. std: σ̄, the mean of the pretrained matrices'
    standard deviations. IniLoRA goes on from here by Adam on ||W − BA||_F² (Eq. 3). Scaling: s = 1.

    >>> A, B = gaussian((6, 4), rank=2, std=0.02, generator=torch.Generator().manual_seed(0))
    >>> A.shape, B.shape
    (torch.Size([2, 4]), torch.Size([6, 2]))
    """
    d, k = shape
    A = torch.randn(rank, k, generator=generator, dtype=torch.float32).mul_(std)
    B = torch.randn(d, rank, generator=generator, dtype=torch.float32).mul_(std)
    return A, B


def inilora_alpha(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """IniLoRA-α: A and B ~ N(0, σ_α²), σ_α = 0.5 in the paper, wider than the weights'; it does not approximate W.

    Source: paper, section 3.4 and Table 3; Figure 3 sweeps σ_α from 1e-4 upward. Scaling: s = 1. BA's entries have
    deviation σ_α²·√r, 0.7 at rank 8, some 35 times W's: in bfloat16 use the delta form, as W − BA rounds W away.

    >>> A, B = inilora_alpha((600, 400), rank=8, std=0.5, generator=torch.Generator().manual_seed(0))
    >>> round(float((B @ A).std()), 1)
    0.7
    """
    return gaussian(shape, rank, std, generator)


def inilora_beta_normal(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """IniLoRA-β, normal: Kaiming's normal distribution for both, A ~ N(0, 2/k), B ~ N(0, 2/r).

    Source: paper, section 3.4 and Table 3 (K-N), as torch.nn.init.kaiming_normal_ with a = 0 and fan_in on lora_A
    (fan-in k) and lora_B (fan-in r). std is not used. Scaling: s = 1.

    >>> A, B = inilora_beta_normal((600, 400), rank=8, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> round(float(B.std()), 1)
    0.5
    """
    return _filled(shape, rank, lambda x: torch.nn.init.kaiming_normal_(x, generator=generator))


def inilora_beta_uniform(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """IniLoRA-β, uniform: Kaiming's uniform distribution for both, A ~ U(±√(6/k)), B ~ U(±√(6/r)).

    Source: paper, section 3.4 and Table 3 (K-U), as torch.nn.init.kaiming_uniform_ with a = 0 and fan_in. std is not
    used. Scaling: s = 1.

    >>> A, B = inilora_beta_uniform((600, 400), rank=8, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> bool(A.abs().max() <= (6 / 400) ** 0.5)
    True
    """
    return _filled(shape, rank, lambda x: torch.nn.init.kaiming_uniform_(x, generator=generator))


def normal(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """A and B ~ N(0, σ²), σ = 0.01 unless set.  Source: paper, Figure 4.  Scaling: s = 1.

    >>> A, B = normal((6, 4), rank=2, std=0.01, generator=torch.Generator().manual_seed(0))
    >>> B.shape
    torch.Size([6, 2])
    """
    return gaussian(shape, rank, std, generator)


def uniform(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """A and B ~ U(−0.1, 0.1).  Source: paper, Figure 4. std is not used.  Scaling: s = 1.

    >>> A, B = uniform((6, 4), rank=2, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> bool(A.abs().max() <= 0.1)
    True
    """
    return _filled(shape, rank, lambda x: x.uniform_(-0.1, 0.1, generator=generator))


def xavier_normal(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """A ~ N(0, 2/(r+k)), B ~ N(0, 2/(d+r)).  Source: paper, Figure 4 (Glorot and Bengio 2010). std is not used.
    Scaling: s = 1.

    >>> A, B = xavier_normal((6, 4), rank=2, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> A.shape
    torch.Size([2, 4])
    """
    return _filled(shape, rank, lambda x: torch.nn.init.xavier_normal_(x, generator=generator))


def xavier_uniform(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """A ~ U(±√(6/(r+k))), B ~ U(±√(6/(d+r))).  Source: paper, Figure 4 (Glorot and Bengio 2010). std is not used.
    Scaling: s = 1.

    >>> A, B = xavier_uniform((6, 4), rank=2, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> bool(A.abs().max() <= 1.0)
    True
    """
    return _filled(shape, rank, lambda x: torch.nn.init.xavier_uniform_(x, generator=generator))


def orthogonal(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """AAᵀ = I and BᵀB = I, uniformly drawn.  Source: paper, Figure 4. std is not used.  Scaling: s = 1.

    >>> A, B = orthogonal((6, 4), rank=2, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
    True
    """
    return _filled(shape, rank, lambda x: torch.nn.init.orthogonal_(x, generator=generator))


def sparse(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """A and B ~ N(0, 0.01²) with half of each column's entries zero, as torch.nn.init.sparse_ has it (Martens 2010).

    Source: paper, Figure 4, which does not say how sparse; a half and 0.01 are the values in the authors' public code.
    std is not used. Scaling: s = 1.

    >>> A, B = sparse((60, 40), rank=10, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> round(float((B == 0).float().mean()), 1)
    0.5
    """

    def fill(x: Tensor) -> Tensor:
        # torch.nn.init.sparse_ draws the places of the zeros from the global stream, whatever generator it is given.
        places = torch.rand(x.shape, generator=generator, dtype=torch.float32).argsort(dim=0)[
            : math.ceil(0.5 * x.shape[0])
        ]
        return x.normal_(0.0, 0.01, generator=generator).scatter_(0, places, 0.0)

    return _filled(shape, rank, fill)


def constant(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """Every entry of A and B is 0.001; all r directions then train alike.  Source: paper, Figure 4. std and generator
    are not used.  Scaling: s = 1.

    >>> A, B = constant((6, 4), rank=2, std=0.0, generator=torch.Generator())
    >>> float(A.max()) == float(B.min())
    True
    """
    return _filled(shape, rank, lambda x: x.fill_(0.001))


def lora(shape: Shape, rank: int, std: float, generator: torch.Generator) -> Pair:
    """LoRA: A ~ U(±1/√k), B = 0, so BA = 0 and R = W.

    Source: Hu et al. 2022, as PEFT does it (kaiming_uniform_ with a = √5); the baseline of every table. std is not
    used. Scaling: s = lora_alpha/r as usual; the start does not depend on it.

    >>> A, B = lora((6, 4), rank=2, std=0.0, generator=torch.Generator().manual_seed(0))
    >>> float(B.abs().max()), bool(A.abs().max() <= 0.5)
    (0.0, True)
    """
    A = torch.nn.init.kaiming_uniform_(torch.empty(rank, shape[1], dtype=torch.float32), a=5**0.5, generator=generator)
    return A, torch.zeros(shape[0], rank, dtype=torch.float32)


def pissa(U: Tensor, S: Tensor, V: Tensor) -> Pair:
    """PiSSA: B = U√Σ, A = √ΣVᵀ of the r largest singular values; BA is the nearest rank-r matrix to W.

    Source: Meng et al. 2024, Tables 2 and 6 of the paper. U (d×r), S (r), V (k×r): the leading triplets of W, from a
    full SVD (solver="exact") or a Krylov space (solver="krylov"). Scaling: PEFT divides S by s, so that sBA is the
    same; `initialize_peft` does that for every method.

    >>> A, B = pissa(torch.eye(3, 1), torch.tensor([4.0]), torch.eye(2, 1))
    >>> B.T, A
    (tensor([[2., 0., 0.]]), tensor([[2., 0.]]))
    """
    if few(U.T, V.T) and U.dtype == S.dtype == V.dtype == torch.float64:
        from .kernels.cpu import few_rows

        B, A = few_rows.balanced(*(side.contiguous().numpy() for side in (U.T, S, V.T)))
        return torch.from_numpy(A), torch.from_numpy(B).T
    root = S.double().sqrt()
    return _scaled(V, root).T.contiguous(), _scaled(U, root)


def _scaled(columns: Tensor, factors: Tensor) -> Tensor:
    """Each column times its factor, in float32, a part at a time: whole they would be there in float64, too."""
    scaled = torch.empty_like(columns, dtype=torch.float32)
    for rows in strips(columns, FEW_ELEMENTS):
        scaled[rows] = columns[rows].double() * factors
    return scaled


def milora(U: Tensor, S: Tensor, V: Tensor) -> Pair:
    """MiLoRA: B = U√Σ, A = √ΣVᵀ of the r smallest singular values; the base keeps the principal part.

    Source: Wang et al. 2024, Tables 2 and 6 of the paper. U (d×r), S (r), V (k×r): the minor triplets of W. Scaling: as
    `pissa`; the product is so small that BA ≈ 0, as in LoRA.

    >>> A, B = milora(torch.eye(3, 1), torch.tensor([0.25]), torch.eye(2, 1))
    >>> float((B @ A).max())
    0.25
    """
    return pissa(U, S, V)


def _filled(shape: Shape, rank: int, fill: Callable[[Tensor], Tensor]) -> Pair:
    """A, then B, each filled by the same distribution."""
    A, B = torch.empty(rank, shape[1], dtype=torch.float32), torch.empty(shape[0], rank, dtype=torch.float32)
    return fill(A), fill(B)


@dataclass(frozen=True)
class Solver:
    """One way to compute an initialization. reads_gauge: whether `gauge` chooses among its factors."""

    solve: Solve
    reads_gauge: bool = False


@dataclass(frozen=True)
class Initialization:
    """A row of `inilora methods`.

    formula, source: as in its function above. solvers: what can compute it, the default first; "" is the name of a
    random start's. std: the deviation where init_std is not given: a number, or the mean of the
    weights' own, by "kind".
    """

    formula: str
    source: str
    solvers: Mapping[str, Solver]
    std: str | float = "kind"


def _drawn(draw: RandomStart) -> Mapping[str, Solver]:
    """A random start without any optimization."""

    def factorize(W: Tensor, task: Task, options: Options, backend: Backend) -> dict[int, Factors]:
        return against_optimum(W, task, {rank: task.random_start(draw, rank, options.seed) for rank in task.ranks})

    return {"": Solver(directly(factorize))}


def _pissa_pairs(found: Principal, task: Task, options: Options) -> dict[int, Pair]:
    return {rank: _leading(found, rank) for rank in task.ranks}


def _inilora_pairs(found: Principal, task: Task, options: Options) -> dict[int, Pair]:
    """The best product of the triplets, in the requested gauge."""
    pairs = _pissa_pairs(found, task, options)
    if options.gauge != "nearest":
        return pairs
    for rank, pair in pairs.items():
        A_start, B_start = task.random_start(gaussian, rank, options.seed)
        if task.start is not None:
            A_start, B_start = task.start.A, task.start.B
        pairs[rank] = nearest(*pair, A_start, B_start)
    return pairs


def _by_svd(choose: Choose) -> Solve:
    """From a full singular value decomposition."""

    def factorize(W: Tensor, task: Task, options: Options, backend: Backend) -> dict[int, Factors]:
        found = dense(W, task.ranks)
        return against_triplets(W, task, choose(found, task, options), found)

    return directly(factorize)


def _minor(W: Tensor, task: Task, options: Options, backend: Backend) -> dict[int, Factors]:
    U, S, V = minor(W, max(task.ranks))
    return against_optimum(W, task, {rank: milora(U[:, -rank:], S[-rank:], V[:, -rank:]) for rank in task.ranks})


def _leading(found: Principal, rank: int) -> Pair:
    return pissa(found.U[:, :rank], found.S[:rank], found.V[:, :rank])


METHODS: Mapping[str, Initialization] = {
    "inilora": Initialization(
        "B, A ~ N(0, σ̄²), then min ‖W − BA‖²; with --steps 0 the start alone",
        "Eq. 2 and 3; 0 steps: Table 7",
        {
            "adam": Solver(by_adam(gaussian)),
            "krylov": Solver(by_krylov(_inilora_pairs, TOLERANCE), reads_gauge=True),
            "exact": Solver(_by_svd(_inilora_pairs), reads_gauge=True),
        },
    ),
    "inilora-alpha": Initialization(
        "B, A ~ N(0, 0.5²); --init-std sets 0.5", "Table 3, Figure 3", _drawn(inilora_alpha), std=0.5
    ),
    "inilora-beta-normal": Initialization(
        "A ~ N(0, 2/k), B ~ N(0, 2/r)", "Table 3, Figure 4", _drawn(inilora_beta_normal)
    ),
    "inilora-beta-uniform": Initialization(
        "A ~ U(±√(6/k)), B ~ U(±√(6/r))", "Table 3, Figure 4", _drawn(inilora_beta_uniform)
    ),
    "lora": Initialization("A ~ U(±1/√k), B = 0", "Hu et al. 2022; all tables", _drawn(lora)),
    "pissa": Initialization(
        "B = U√Σ, A = √ΣVᵀ of the r largest σ",
        "Meng et al. 2024; Tables 2, 6",
        {"krylov": Solver(by_krylov(_pissa_pairs, PISSA_TOLERANCE)), "exact": Solver(_by_svd(_pissa_pairs))},
    ),
    "milora": Initialization(
        "B = U√Σ, A = √ΣVᵀ of the r smallest σ", "Wang et al. 2024; Tables 2, 6", {"exact": Solver(directly(_minor))}
    ),
    "normal": Initialization("B, A ~ N(0, 0.01²); --init-std sets 0.01", "Figure 4", _drawn(normal), std=0.01),
    "uniform": Initialization("B, A ~ U(±0.1)", "Figure 4", _drawn(uniform)),
    "xavier-normal": Initialization("A ~ N(0, 2/(r+k)), B ~ N(0, 2/(d+r))", "Figure 4", _drawn(xavier_normal)),
    "xavier-uniform": Initialization("A ~ U(±√(6/(r+k))), B ~ U(±√(6/(d+r)))", "Figure 4", _drawn(xavier_uniform)),
    "orthogonal": Initialization("AAᵀ = I, BᵀB = I", "Figure 4", _drawn(orthogonal)),
    "sparse": Initialization("B, A ~ N(0, 0.01²), half of each column 0", "Figure 4", _drawn(sparse)),
    "constant": Initialization("every entry 0.001", "Figure 4", _drawn(constant)),
}

_Options = TypeVar("_Options", bound=Options)


def settled(options: _Options) -> _Options:
    """The options with the method's own solver and σ̄ where none is given.

    Raises OptionError for an unknown method or solver, or a `start` that nothing would read.
    """
    require_choice("method", options.method, METHODS)
    method = METHODS[options.method]
    solver = next(iter(method.solvers)) if options.solver is None else options.solver
    if solver not in method.solvers and "" in method.solvers:
        raise OptionError(f"solver={solver!r}: method={options.method!r} needs no solver; leave solver out")
    require_choice("solver", solver, method.solvers, f"for method={options.method!r}")
    reads_start = method.solvers[solver].reads_gauge and options.gauge == "nearest"
    if options.start is not None and not reads_start:
        raise OptionError('start is what gauge="nearest" is near to: for method="inilora" by krylov or exact only')
    chosen = replace(options, solver=solver, init_std=method.std if options.init_std is None else options.init_std)
    unread = chosen.unread()
    if unread:
        reader = f"solver={solver!r}" if solver else f"method={options.method!r}"
        warnings.warn(
            f"{reader} does not read {', '.join(unread)}; leave {'it' if len(unread) == 1 else 'them'} out",
            stacklevel=4,
        )
    return chosen


def solver_of(options: Options) -> Solve:
    """The function that factorizes a batch of matrices with these settled options."""
    return METHODS[options.method].solvers[str(options.solver)].solve
