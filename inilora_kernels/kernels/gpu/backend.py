"""The Triton backend: Adam on many matrices at a time, two launches a step, on a CUDA or ROCm GPU.

`waves` says which matrices step together, `wave` holds their state, `kernels` are the kernels, `device` the streams.
The step loop never waits for the device: blocks of steps are captured as graphs once for all waves of a layout and
replayed, and the host only looks at the results at the milestones. While a wave steps, a thread reads the next one's
weights and copies them to the device. The same problems on the same kind of GPU give the same bits, in any batch.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import BackendError
from ..backend import Batch, Sample, Stored, Visit
from .cost_model import Matrix
from .device import CudaDevice, Device, HostDevice
from .gpus import GPUS, Gpu, reported_gpu
from .tiles import RANKS, padded_rank
from .waves import PlannedWave, divide

try:
    import triton
    from triton.runtime.jit import JITFunction

    from . import kernels as triton_kernels
    from .gram_run import first_launch, visit_batches
    from .wave import Start, Wave, padded_view, rate_table, start_of
except ImportError as error:
    raise BackendError(
        'backend="triton" needs the triton package, which is for Linux: pip install "inilora-kernels[gpu]", '
        'or take backend="cpu"'
    ) from error

# Older versions refuse a product of eight columns, spill registers, or abort (docs/kernels.md, "Versions").
LEAST_TRITON = (3, 5)
GRAPH_STEPS = (100, 10, 1)  # in one replay; the longest hides the host and is short enough to answer Ctrl-C
REPLAYS_AHEAD = 4
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights of `dtype` are multiplied in."""
    return dtype if dtype in WEIGHT_DTYPES else torch.float32


def require_triton(version: str) -> None:
    """Raise BackendError for a triton below LEAST_TRITON."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        raise BackendError(
            f'backend="triton" needs triton {least} or newer, which comes with torch 2.9; triton {version} is '
            'installed; upgrade torch and triton together, or take backend="cpu"'
        )


@dataclass(frozen=True)
class TritonBackend:
    """Adam by the two kernels. Raises BackendError where there is no GPU that they can run on.

    Under TRITON_INTERPRET=1 the kernels are plain numpy, and the device must be the CPU: slow, for tests.
    """

    device: torch.device
    name: str = "triton"
    direct_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        require_triton(triton.__version__)
        if not isinstance(triton_kernels.adam_kernel, JITFunction):
            if self.device.type != "cpu":
                raise BackendError(f"TRITON_INTERPRET=1 runs kernels on the CPU, not on device {str(self.device)!r}")
            return
        if self.device.type != "cuda":
            raise BackendError(
                f'backend="triton" runs on a GPU, not on device {str(self.device)!r}; '
                'take device="cuda" or backend="cpu"'
            )
        if not torch.cuda.is_available():
            raise BackendError(
                f'backend="triton" found no GPU: torch {torch.__version__} sees no CUDA or ROCm device here; '
                'take backend="cpu", or check the driver and that torch was built for it'
            )
        count = torch.cuda.device_count()
        if self.device.index is not None and self.device.index >= count:
            raise BackendError(
                f"device={str(self.device)!r}: this process sees {count} GPU{'s' if count > 1 else ''}, counted from 0"
                f'; take device="cuda:{count - 1}", or check CUDA_VISIBLE_DEVICES'
            )
        if torch.version.hip is None and torch.cuda.get_device_capability(self.device) < (8, 0):
            raise BackendError(
                f'backend="triton" needs compute capability 8.0 or newer; {torch.cuda.get_device_name(self.device)} '
                f'has {".".join(map(str, torch.cuda.get_device_capability(self.device)))}; take backend="cpu"'
            )
        if self.device.index is None:
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))

    def require_adam(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
        """See `Backend.require_adam`: for a rank beyond the kernels', or a matrix beyond the device's free memory."""
        self._divided([(shape, dtype, rank)], self.place().free_memory())

    def adam(self, batch: Batch) -> None:
        """See `Backend.adam`. Takes the problems wave by wave, larger shapes first; each W is loaded for its wave.

        Raises BackendError, before anything is loaded, for a rank or a matrix that the device cannot take.
        """
        if not batch.problems or not batch.milestones:
            return
        with ExitStack() as scope:
            place = self.place()
            # A launch goes to the current device and stream, which need not be those whose tensors it is given.
            for context in _contexts(place):
                scope.enter_context(context)
            free = place.free_memory()
            planned = self._divided([(one.shape, one.dtype, one.rank) for one in batch.problems], free)
            rates = rate_table(batch.schedule, batch.milestones[-1]).to(self.device)
            run = _Run(place, batch, rates)
            run.waves(planned, overlapped=len(planned) > 1 and _fits_twice(planned, free))

    def gram_batches(self, matrices: Sequence[Stored], visit: Visit) -> None:
        """See `Backend.gram_batches`. Leaves out float64 weights, which the kernels cannot multiply as they are."""
        matrices = [one if one.dtype in WEIGHT_DTYPES else replace(one, vectors=0) for one in matrices]
        with ExitStack() as scope:
            place = self.place()
            for context in _contexts(place):
                scope.enter_context(context)
            try:
                visit_batches(place, self.gpu(), matrices, [kernel_dtype(one.dtype) for one in matrices], visit)
            finally:
                _rejoin(place)

    def _divided(self, wanted: Sequence[tuple[tuple[int, int], torch.dtype, int]], free: float) -> list[PlannedWave]:
        """The waves of matrices of these shapes, dtypes and ranks. free: bytes of memory."""
        for (d, k), _, rank in wanted:
            if not padded_rank(rank):
                raise BackendError(
                    f'backend="triton" takes ranks up to {RANKS[-1]}; a {d}×{k} matrix has rank {rank}; '
                    'take backend="cpu"'
                )
        dtypes = [kernel_dtype(dtype) for _, dtype, _ in wanted]
        matrices = [Matrix(shape, dtype.itemsize, rank) for (shape, _, rank), dtype in zip(wanted, dtypes, strict=True)]
        return divide(matrices, dtypes, self.gpu(), free)

    def place(self) -> Device:
        """The device and its streams."""
        return HostDevice() if self.device.type == "cpu" else CudaDevice(self.device)

    def gpu(self) -> Gpu:
        """The cost model's view of this device."""
        if self.device.type == "cpu":
            return GPUS["rtx4090"]
        return reported_gpu(torch.cuda.get_device_properties(self.device), hip=torch.version.hip is not None)


def _contexts(place: Device) -> list[AbstractContextManager[object]]:
    if not isinstance(place, CudaDevice):
        return [nullcontext()]
    place.computing.wait_stream(torch.cuda.current_stream(place.device))
    return [torch.cuda.device(place.device), torch.cuda.stream(place.computing)]


def _rejoin(place: Device) -> None:
    """Let what the caller computes next, on its own stream, wait for what was computed here."""
    if isinstance(place, CudaDevice):
        place.computing.synchronize()


def _fits_twice(planned: Sequence[PlannedWave], free: float) -> bool:
    """Whether the next wave's weights fit next to any wave."""
    return max(wave.bytes for wave in planned) + max(wave.weight_bytes for wave in planned) <= free


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of `adam`: what does not change from wave to wave."""

    place: Device
    batch: Batch
    rates: Tensor

    def waves(self, planned: Sequence[PlannedWave], *, overlapped: bool) -> None:
        """Run the waves in order. overlapped: the next wave's weights are read and copied while one steps."""
        largest = max(wave.layout.weights * self._dtype(wave).itemsize for wave in planned)
        rows = max(
            place.rows * place.row_stride * self._dtype(wave).itemsize
            for wave in planned
            for place in wave.layout.places
        )
        staging = [self.place.staging(rows, torch.uint8) for _ in range(2)]
        arrivals = torch.zeros(largest if overlapped else 0, dtype=torch.uint8, device=self.place.device)
        # The copy stream must not overtake what fills the buffers with zeros.
        self.place.copying_waits()
        wave: Wave | None = None
        graphs: dict[int, Callable[[], None]] = {}
        with ThreadPoolExecutor(1) as reader:

            def read(wave: PlannedWave, target: Tensor | None = None) -> Future[Start]:
                dtype = self._dtype(wave)
                if target is None:
                    target = arrivals.view(dtype)[: wave.layout.weights]
                return reader.submit(self._read, wave, target, [buffer.view(dtype) for buffer in staging])

            coming = read(planned[0]) if overlapped else None
            for number, plan in enumerate(planned):
                dtype = self._dtype(plan)
                if wave is None or (wave.layout, wave.weights.dtype, wave.resident) != (
                    plan.layout,
                    dtype,
                    plan.resident,
                ):
                    # The old wave's memory and its graphs go before the new ones come.
                    graphs.clear()
                    wave = None
                    wave = Wave(plan.layout, dtype, self.rates, self.batch.schedule, resident=plan.resident)
                    graphs.update(self._graphs(wave))
                if coming is None:
                    self.place.copying_waits()
                    start = read(plan, wave.weights).result()
                    self.place.computing_waits()
                else:
                    start = coming.result()
                    self.place.computing_waits()
                    wave.weights.copy_(arrivals.view(dtype)[: plan.layout.weights])
                    self.place.copying_waits()
                    if number + 1 < len(planned):
                        coming = read(planned[number + 1])
                wave.begin(start.values)
                self._run(wave, plan.members, graphs)

    def _dtype(self, wave: PlannedWave) -> torch.dtype:
        return kernel_dtype(self.batch.problems[wave.members[0]].dtype)

    def _read(self, wave: PlannedWave, target: Tensor, staging: Sequence[Tensor]) -> Start:
        """Load a wave's weights into `target` on the device, by two host buffers in turns; in the reader's thread."""
        copied: list[object] = [None, None]
        norms = []
        problems = [self.batch.problems[index] for index in wave.members]
        for number, (problem, place) in enumerate(zip(problems, wave.layout.places, strict=True)):
            W = problem.load()
            if W.dtype != problem.dtype or tuple(W.shape) != problem.shape:
                raise BackendError(
                    f"a matrix announced as {problem.dtype} {problem.shape} was read as {W.dtype} {tuple(W.shape)}"
                )
            norms.append(float(torch.linalg.vector_norm(W, dtype=torch.float32)) if W.dtype == torch.float16 else 0.0)
            if copied[number % 2] is not None:
                self.place.wait(copied[number % 2])
            rows = staging[number % 2][: place.rows * place.row_stride].view(place.rows, place.row_stride)
            rows[:, : place.columns].copy_(W)
            rows[:, place.columns :].zero_()
            copied[number % 2] = self.place.copy(padded_view(target, place), rows)
        for ticket in copied:
            if ticket is not None:
                self.place.wait(ticket)
        return start_of(wave.layout, problems, self.batch.schedule, norms)

    def _graphs(self, wave: Wave) -> dict[int, Callable[[], None]]:
        """Blocks of steps as graphs; none for a short run or where they cannot be captured."""
        worth = self.place.captures and self.batch.milestones[-1] > 2 * GRAPH_STEPS[0]
        if worth or self.place.compiles:
            # Compiles and loads the kernels, which a capture must not do: on zeros, which `begin` puts in order again.
            first_launch(lambda: wave.advance(1))
            for wide in (True,) if len(self.batch.milestones) == 1 else (False, True):
                first_launch(lambda wide=wide: wave.judge(wide=wide))  # type: ignore[misc]
        found: dict[int, Callable[[], None]] = {}
        for steps in GRAPH_STEPS if worth else ():
            graph = self.place.captured(lambda steps=steps: wave.advance(steps))  # type: ignore[misc]
            if graph is None:
                break
            found[steps] = graph
        return found

    def _run(self, wave: Wave, indices: Sequence[int], graphs: dict[int, Callable[[], None]]) -> None:
        step = 0
        for milestone in self.batch.milestones:
            for done in self._steps(wave, graphs, milestone - step):
                self.batch.advanced(done * len(wave.active))
            step = milestone
            wave.judge(wide=step == self.batch.milestones[-1])
            going = []
            for member, (loss, A, B) in wave.sampled().items():
                if self.batch.observe(Sample(indices[member], step, loss, A, B)):
                    going.append(member)
            if len(going) < len(wave.active):
                wave.keep(going)
            if not going:
                return

    def _steps(self, wave: Wave, graphs: dict[int, Callable[[], None]], count: int) -> Iterator[int]:
        """Enqueue `count` steps; yields how many each time some are under way, never more than a few replays ahead."""
        marks: deque[object] = deque()
        while count > 0:
            block = next((steps for steps in GRAPH_STEPS if steps <= count), 1)
            if block in graphs:
                graphs[block]()
            else:
                wave.advance(block)
            count -= block
            marks.append(self.place.mark())
            if len(marks) > REPLAYS_AHEAD:
                self.place.wait(marks.popleft())
            yield block
