"""The direct solver's batches on a GPU: each is read and copied by a thread while the one before it is solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from ...errors import BackendError
from ..backend import Stored, Visit
from .device import Device
from .gpus import Gpu
from .gram_batch import GramBatch
from .gram_layout import Wanted, batches, gram_layout, gram_layout_on
from .tiles import gram_tile

# Two batches may be on the device at once.
_SHARE = 0.5


def visit_batches(
    place: Device, gpu: Gpu, matrices: Sequence[Stored], dtypes: Sequence[torch.dtype], visit: Visit
) -> None:
    """Call `visit` with each batch of the matrices that may take vectors and fit in memory. See `Backend`."""
    taken = [index for index, one in enumerate(matrices) if one.vectors]
    wanted = [Wanted(matrices[i].shape, dtypes[i].itemsize, matrices[i].vectors) for i in taken]
    found = batches(wanted, [dtypes[i] for i in taken], _SHARE * place.free_memory())
    planned = [tuple(taken[index] for index in members) for members in found]
    if not planned:
        return
    largest = max(_padded_bytes(matrices[i].shape, dtypes[i]) for i in taken)
    staging = [place.staging(largest, torch.uint8) for _ in range(2)]
    with ThreadPoolExecutor(1) as reader:

        def coming(number: int) -> tuple[GramBatch, Future[None]]:
            members = planned[number]
            dtype = dtypes[members[0]]
            layout = gram_layout_on(gpu, [matrices[i].shape for i in members], dtype.itemsize)
            batch = GramBatch(layout, dtype, place.device)
            # The copies must not overtake what fills the batch with zeros.
            place.copying_waits()
            return batch, reader.submit(_read, place, batch, [matrices[i] for i in members], staging)

        following = coming(0)
        for number, members in enumerate(planned):
            batch, read = following
            read.result()
            place.computing_waits()
            if number + 1 < len(planned):
                following = coming(number + 1)
            batch.measure()
            launched = _launched(place, batch)
            batch.run = launched
            visit(members, batch)


def _padded_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    place = gram_layout([shape], dtype.itemsize, gram_tile("", dtype.itemsize), 0.0).places[0]
    return place.rows * place.stride * dtype.itemsize


def _read(place: Device, batch: GramBatch, matrices: Sequence[Stored], staging: Sequence[Tensor]) -> None:
    """Load a batch's weights onto the device through two host buffers in turn; runs in the reader's thread."""
    copied: list[object] = [None, None]
    for number, matrix in enumerate(matrices):
        W = matrix.load()
        if W.dtype != matrix.dtype or tuple(W.shape) != matrix.shape:
            raise BackendError(
                f"a matrix announced as {matrix.dtype} {matrix.shape} was read as {W.dtype} {tuple(W.shape)}"
            )
        if copied[number % 2] is not None:
            place.wait(copied[number % 2])
        target = batch.padded(number)
        rows = staging[number % 2].view(target.dtype)[: target.numel()].view(target.shape)
        columns = batch.sizes[number]
        rows[:, :columns].copy_(W if W.shape[0] >= W.shape[1] else W.T)
        rows[:, columns:].zero_()
        copied[number % 2] = place.copy(target, rows)
    for ticket in copied:
        if ticket is not None:
            place.wait(ticket)


def _launched(place: Device, batch: GramBatch) -> Callable[[], None]:
    """The batch's launches, compiled; as a graph where they can be captured."""
    first_launch(batch.launch)
    return (place.captured(batch.launch) if place.captures else None) or batch.launch


def first_launch(launch: Callable[[], None]) -> None:
    """Launch kernels for the first time. Raises BackendError where triton cannot build them or their launcher."""
    try:
        launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BackendError(
            f"triton {triton.__version__} could not compile and launch the kernels: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}; it needs a C compiler (gcc) and "
            'Python\'s headers (python3-dev) on this machine; or take backend="cpu"'
        ) from error
