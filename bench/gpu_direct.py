"""What bench.gpu measures of the direct solver on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inilora_kernels.kernels.backend import GramBatch as Batched
from inilora_kernels.kernels.backend import Stored
from inilora_kernels.kernels.gpu.backend import TritonBackend
from inilora_kernels.kernels.gpu.forecast import DirectWork, direct_seconds, pass_seconds
from inilora_kernels.kernels.gpu.gram_batch import GramBatch
from inilora_kernels.kernels.gpu.gram_layout import gram_layout_on
from inilora_kernels.kernels.streaming import losses
from inilora_kernels.solvers.krylov import TOLERANCE, principal
from inilora_kernels.solvers.krylov_batch import PRODUCT_UNIT, passes_expected, principals, room, start_of
from inilora_kernels.solvers.triplets import Principal

from .gpu_timing import distance, duration
from .harness import Row, seconds

# Shape, dtype and rank of the matrices of a batch.
Cell = tuple[tuple[int, int], torch.dtype, int]
CELLS: tuple[Cell, ...] = (
    ((4096, 4096), torch.bfloat16, 8),
    ((1024, 1024), torch.float32, 8),
    ((1024, 4096), torch.float16, 8),
    ((4096, 4096), torch.bfloat16, 32),
)


def gram_batch_of(weights: Sequence[Tensor], backend: TritonBackend) -> GramBatch:
    """The matrices as a batch on the backend's device."""
    shapes = [(W.shape[0], W.shape[1]) for W in weights]
    layout = gram_layout_on(backend.gpu(), shapes, weights[0].element_size())
    batch = GramBatch(layout, weights[0].dtype, backend.device)
    for index, W in enumerate(weights):
        batch.stored(index).copy_(W)
    batch.measure()
    return batch


def unit_blocks(batch: GramBatch) -> Tensor:
    """Random rows of unit length for each matrix, zero beyond its size."""
    X = torch.zeros(batch.shape)
    for index, n in enumerate(batch.sizes):
        X[index, :, :n] = torch.nn.functional.normalize(torch.randn(batch.shape[1], n), dim=1)
    return X.to(batch.energies.device)


def products(backend: TritonBackend, weights: Sequence[Tensor]) -> Row:
    """Relative errors of XWᵀ and XWᵀW, and the latter's as a share of what the certificate allows for."""
    batch = gram_batch_of(weights, backend)
    X = unit_blocks(batch)
    batch(X)
    first, second, units = [], [], []
    for index, W in enumerate(weights):
        tall = (W if W.shape[0] >= W.shape[1] else W.T).double()
        x = X[index, :, : tall.shape[1]].cpu().double()
        Y, Z = batch.Y[index, :, : len(tall)], batch.Z[index, :, : tall.shape[1]]
        image = x @ tall.T
        first.append(distance(Y, image, image))
        second.append(distance(Z, image @ tall, image @ tall))
        lost = (Z.cpu().double() - image @ tall).norm(dim=1).max()
        granted = PRODUCT_UNIT * torch.linalg.matrix_norm(tall, 2) * tall.norm()
        units.append(float(lost / granted))
    return {"products": str(weights[0].dtype), "XWᵀ": max(first), "XWᵀW": max(second), "of what is granted": max(units)}


def one_pass(backend: TritonBackend, weights: Sequence[Tensor], window: float) -> Row:
    """Both launches for every group of the batch, by graph and launch by launch."""
    batch, place = gram_batch_of(weights, backend), backend.place()
    batch(unit_blocks(batch))
    eager = duration(batch.launch, backend, window)
    graph = place.captured(batch.launch) if place.captures else None
    replayed = None if graph is None else duration(graph, backend, window)
    size = sum(W.numel() * W.element_size() for W in weights)
    model = pass_seconds(batch.layout, weights[0].element_size(), backend.gpu())
    return {
        "a pass": f"{len(weights)}×{weights[0].shape[0]}×{weights[0].shape[1]} {weights[0].dtype}",
        "in cache": batch.layout.resident,
        "graph µs": replayed and 1e6 * replayed,
        "launches µs": 1e6 * eager,
        "predicted µs": 1e6 * model,
        "measured / predicted": (replayed or eager) / model,
        "W's bytes / s / DRAM": size / (replayed or eager) / backend.gpu().dram,
    }


def whole_batch(backend: TritonBackend, weights: Sequence[Tensor], rank: int) -> Iterator[Row]:
    """The leading triplets of every matrix with their certificates; and by torch's own randomized SVD, one by one."""
    ranks, W = [rank], weights[0]
    shape = (W.shape[0], W.shape[1])
    vectors = room(min(shape), ranks)
    found: list[Principal | None] = []

    def visit(members: Sequence[int], batch: Batched) -> None:
        starts = [start_of(weights[index], torch.get_num_threads()) for index in members]
        found.extend(principals(batch, [ranks] * len(members), TOLERANCE, starts, vectors))

    def run() -> None:
        found.clear()
        matrices = [Stored(lambda W=W: W, shape, W.dtype, max(ranks), vectors) for W in weights]
        backend.gram_batches(matrices, visit)

    run()
    taken = seconds(run, backend.device.type)
    work = DirectWork(shape, W.element_size(), rank, vectors, passes_expected(rank, min(shape)))
    model = direct_seconds([work] * len(weights), backend.gpu(), factors=False)
    solved = [one for one in found if one is not None]
    name = f"{len(weights)}×{shape[0]}×{shape[1]} {W.dtype}, rank {rank}"
    yield {
        "solve": name,
        "s": taken,
        "predicted s": model,
        "measured / predicted": taken / model,
        "certified": len(solved),
        "excess": max((one.shortfalls[rank] / one.optimum(rank) for one in solved), default=None),
        "passes": max((one.passes for one in solved), default=None),
    }
    for q, iterations in ((rank, 16), (4 * rank, 8)):
        bases: list[Tensor] = []

        def peer(q: int = q, iterations: int = iterations, bases: list[Tensor] = bases) -> None:
            bases[:] = [
                torch.svd_lowrank(W.to(backend.device).float(), q=q, niter=iterations)[2][:, :rank] for W in weights
            ]

        peer()
        yield {
            "solve": f"{name}, torch.svd_lowrank of {q} columns, {iterations} iterations",
            "s": seconds(peer, backend.device.type),
            "excess": max(
                (_excess(W, V, one.optimum(rank)) for W, V, one in zip(weights, bases, found, strict=True) if one),
                default=None,
            ),
        }


def _excess(W: Tensor, V: Tensor, optimum: float) -> float:
    """f/f* − 1 of the best product with this row space (orthonormal columns V)."""
    W, wide = W.to(V.device), V.double()
    _, [loss] = losses(W, [(wide.T, W.double() @ wide)])
    return loss / optimum - 1.0


def on_the_processor(W: Tensor) -> Row:
    """The same for one matrix on the CPU."""
    return {
        "solve": f"one {W.shape[0]}×{W.shape[1]} {W.dtype} on the CPU, {torch.get_num_threads()} threads",
        "s": seconds(lambda: principal(W, [8])),
    }
