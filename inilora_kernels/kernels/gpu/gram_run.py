"""The direct solver's batches on a GPU: each is read and copied by threads while the one before it is solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

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
# Matrices that are read at once, each through a buffer of its own: one thread reads some 2 GB/s, a GPU takes 50.
# And at most so many bytes of buffers, or one: they are pinned, and each reader holds a matrix beside its own.
_READERS, _BUFFER_BYTES = 4, 1 << 27


def visit_batches(
    place: Device, gpu: Gpu, matrices: Sequence[Stored], dtypes: Sequence[torch.dtype], visit: Visit
) -> None:
    """Call `visit` with each batch of the matrices that may take vectors and fit in memory. See `Backend`."""
    taken = [index for index, one in enumerate(matrices) if one.vectors]
    wanted = [Wanted(matrices[i].shape, dtypes[i].itemsize, matrices[i].rank, matrices[i].vectors) for i in taken]
    found = batches(wanted, [dtypes[i] for i in taken], _SHARE * place.free_memory())
    planned = [tuple(taken[index] for index in members) for members in found]
    if not planned:
        return
    largest = max(_padded_bytes(matrices[i].shape, dtypes[i]) for i in taken)
    staging: SimpleQueue[Tensor] = SimpleQueue()
    readers = max(1, min(_READERS, max(map(len, planned)), _BUFFER_BYTES // largest))
    for _ in range(readers):
        staging.put(place.staging(largest, torch.uint8))
    with ThreadPoolExecutor(readers) as reader:

        def coming(number: int) -> tuple[GramBatch, list[Future[None]]]:
            members = planned[number]
            dtype = dtypes[members[0]]
            layout = gram_layout_on(gpu, [matrices[i].shape for i in members], dtype.itemsize)
            batch = GramBatch(layout, dtype, place.device, place.captured_with_libraries)
            # The copies must not overtake what fills the batch with zeros.
            place.copying_waits()
            return batch, [
                reader.submit(_read, place, batch, index, matrices[i], staging) for index, i in enumerate(members)
            ]

        following = coming(0)
        try:
            for number, members in enumerate(planned):
                batch, reads = following
                for read in reads:
                    read.result()
                place.computing_waits()
                if number + 1 < len(planned):
                    following = coming(number + 1)
                batch.measure()
                first_launch(batch.launch)
                visit(members, batch)
        except BaseException:
            # Nobody wants what is not begun yet.
            reader.shutdown(wait=False, cancel_futures=True)
            raise


def _padded_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    place = gram_layout([shape], dtype.itemsize, gram_tile("", dtype.itemsize), 0.0).places[0]
    return place.rows * place.stride * dtype.itemsize


def _read(place: Device, batch: GramBatch, index: int, matrix: Stored, staging: SimpleQueue[Tensor]) -> None:
    """Load one of a batch's weights onto the device through a buffer on the host; runs in a reader's thread."""
    W = matrix.load()
    if W.dtype != matrix.dtype or tuple(W.shape) != matrix.shape:
        raise BackendError(
            f"a matrix announced as {matrix.dtype} {matrix.shape} was read as {W.dtype} {tuple(W.shape)}"
        )
    target, columns, buffer = batch.padded(index), batch.sizes[index], staging.get()
    try:
        rows = buffer.view(target.dtype)[: target.numel()].view(target.shape)
        rows[:, :columns].copy_(W if W.shape[0] >= W.shape[1] else W.T)
        rows[:, columns:].zero_()
        place.wait(place.copy(target, rows))
    finally:
        staging.put(buffer)


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
