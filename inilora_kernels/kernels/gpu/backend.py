"""The Triton backend: Adam on many matrices at a time, two launches a step, on a CUDA or ROCm GPU.

`cost_model` says how many matrices step together, `wave` holds their state, `kernels` are the kernels. The step
loop never waits for the device: blocks of steps are captured once in a CUDA graph and replayed, and the host only looks
at the results at the milestones. The same problems on the same kind of GPU give the same bits, in any batch.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import BackendError
from ..backend import Problem, Sample, Schedule
from ..reference import residual_loss
from .cost_model import Choice, Matrix, choose, even_wave
from .gpus import GPUS, Gpu, gpu_like
from .tiles import RANKS, padded_rank, tiles

try:
    from triton.runtime.jit import JITFunction

    from . import kernels as triton_kernels
    from .wave import Layout, Wave, lay_out, padded_weight, weight_bytes
except ImportError as error:
    raise BackendError(
        'backend="triton" needs the triton package, which is for Linux: pip install "inilora-kernels[gpu]", '
        'or take backend="cpu"'
    ) from error

GRAPH_STEPS = 100  # steps in one replay: long enough to hide the host, short enough to answer Ctrl-C
REPLAYS_AHEAD = 4
MEMORY_SHARE = 0.95  # of the free device memory that a wave may take
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Pending:
    """Matrices on the device that wait for their wave to fill."""

    indices: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    state_bytes: int = 0

    @property
    def fill(self) -> float:
        """The share of a full wave that is taken."""
        return sum(1 / choice.wave for choice in self.choices)


@dataclass(frozen=True)
class TritonBackend:
    """Adam by the two kernels. Raises BackendError where there is no GPU that they can run on.

    Under TRITON_INTERPRET=1 the kernels are plain numpy, and the device must be the CPU: slow, for tests.
    """

    device: torch.device
    name: str = "triton"
    direct_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
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
        if torch.version.hip is None and torch.cuda.get_device_capability(self.device) < (8, 0):
            raise BackendError(
                f'backend="triton" needs compute capability 8.0 or newer; {torch.cuda.get_device_name(self.device)} '
                f'has {".".join(map(str, torch.cuda.get_device_capability(self.device)))}; take backend="cpu"'
            )

    def adam(
        self,
        problems: Sequence[Problem],
        schedule: Schedule,
        milestones: Sequence[int],
        observe: Callable[[Sample], bool],
        advanced: Callable[[int], None],
    ) -> None:
        """See `Backend.adam`. Takes the problems wave by wave, larger shapes first; each W is loaded for its wave."""
        if not problems or not milestones:
            return
        for index, problem in enumerate(problems):
            if not padded_rank(problem.rank):
                raise BackendError(
                    f'backend="triton" takes ranks up to {RANKS[-1]}; matrix {index} of the batch, '
                    f'{problem.shape[0]}×{problem.shape[1]}, has rank {problem.rank}; take backend="cpu"'
                )
        # A launch goes to the current device, which need not be the one whose tensors it is given.
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            self._run_waves(problems, schedule, milestones, observe, advanced)

    def _run_waves(
        self,
        problems: Sequence[Problem],
        schedule: Schedule,
        milestones: Sequence[int],
        observe: Callable[[Sample], bool],
        advanced: Callable[[int], None],
    ) -> None:
        gpu = self.gpu()
        kinds = Counter((padded_rank(problem.rank), problem.shape) for problem in problems)
        order = sorted(
            range(len(problems)),
            key=lambda index: (padded_rank(problems[index].rank), problems[index].shape, index),
            reverse=True,
        )
        waiting: dict[tuple[torch.dtype, int, bool], _Pending] = {}

        def run(key: tuple[torch.dtype, int, bool]) -> None:
            pending = waiting.pop(key)
            members = [problems[index] for index in pending.indices]
            layout = _layout(members, [choice.parts for choice in pending.choices], key[0].itemsize, gpu)
            wave = Wave(layout, members, pending.weights, schedule, milestones[-1])
            self._run(wave, pending.indices, milestones, observe, advanced)

        for index in order:
            problem = problems[index]
            W = problem.load()
            if W.dtype not in WEIGHT_DTYPES:
                W = W.float()
            choice = choose(Matrix(problem.shape, W.element_size(), problem.rank), gpu)
            count = kinds[padded_rank(problem.rank), problem.shape]
            choice = replace(choice, wave=even_wave(count, choice.wave))
            key = (W.dtype, padded_rank(problem.rank), choice.resident)
            if key in waiting and waiting[key].fill + 1 / choice.wave > 1 + 1e-9:
                run(key)
            state = _layout([problem], [choice.parts], W.element_size(), gpu).state_bytes
            needed = weight_bytes(problem.shape, W.element_size()) + state
            # The weights that wait are on the device already; their states are still to come.
            if needed + sum(pending.state_bytes for pending in waiting.values()) > self.free_memory():
                for full in list(waiting):
                    run(full)
            if needed > self.free_memory():
                raise BackendError(
                    f"{gpu.name} has {self.free_memory() / 1e9:.2f} GB free for a wave, but matrix {index} of the "
                    f"batch, {problem.shape[0]}×{problem.shape[1]} at rank {problem.rank}, needs {needed / 1e9:.2f} "
                    'GB; free some device memory, or take backend="cpu"'
                )
            pending = waiting.setdefault(key, _Pending())
            pending.indices.append(index)
            pending.weights.append(padded_weight(W, self.device))
            pending.choices.append(choice)
            pending.state_bytes += state
            del W
        for key in list(waiting):
            run(key)

    def free_memory(self) -> float:
        """Bytes that a wave may take: a share of what the driver and torch's own cache have left."""
        if self.device.type == "cpu":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return MEMORY_SHARE * (free + cached)

    def gpu(self) -> Gpu:
        """The cost model's view of this device."""
        if self.device.type == "cpu":
            return GPUS["rtx4090"]
        properties = torch.cuda.get_device_properties(self.device)
        if torch.version.hip is not None:
            architecture = str(properties.gcnArchName).split(":")[0]
        else:
            architecture = f"sm_{properties.major}{properties.minor}"
        return gpu_like(
            architecture,
            properties.name,
            properties.multi_processor_count,
            int(getattr(properties, "L2_cache_size", 0)),
            properties.total_memory,
        )

    def _run(
        self,
        wave: Wave,
        indices: Sequence[int],
        milestones: Sequence[int],
        observe: Callable[[Sample], bool],
        advanced: Callable[[int], None],
    ) -> None:
        step = 0
        graph = None
        for milestone in milestones:
            if graph is None and milestone > step and milestones[-1] - step > 2 * GRAPH_STEPS:
                # Compiles and loads the kernels, which a capture must not do; then the capture itself runs nothing.
                wave.advance(1)
                advanced(len(wave.active))
                step += 1
                graph = _captured(wave)
            for done in _steps(wave, graph, milestone - step):
                advanced(done * len(wave.active))
            step = milestone
            going = [member for member in wave.active if observe(_sample(wave, member, indices[member], step))]
            if len(going) < len(wave.active):
                graph = None
                wave.keep(going)
            if not going:
                return


def _layout(members: Sequence[Problem], parts: Sequence[int], itemsize: int, gpu: Gpu) -> Layout:
    chosen = tiles(gpu.architecture, itemsize, max(problem.rank for problem in members))
    return lay_out([problem.shape for problem in members], [problem.rank for problem in members], parts, chosen)


def _sample(wave: Wave, member: int, index: int, step: int) -> Sample:
    A, B = (factor.contiguous() for factor in wave.pair(member))
    loss = residual_loss(wave.weight(member), A, B)
    # A clone on the CPU, so that the sample does not change with the state it was taken from.
    return Sample(index, step, loss, A.cpu().clone(), B.cpu().clone())


def _captured(wave: Wave) -> torch.cuda.CUDAGraph | None:
    """GRAPH_STEPS steps as a CUDA graph; None where capture is not to be had, which costs launches, not correctness."""
    if wave.factors.device.type == "cpu":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(wave.factors.device)
        with torch.cuda.graph(graph):
            wave.advance(GRAPH_STEPS)
    except RuntimeError:
        return None
    return graph


def _steps(wave: Wave, graph: torch.cuda.CUDAGraph | None, count: int) -> Iterator[int]:
    """Enqueue `count` steps; yields how many each time some are under way, never more than a few replays ahead."""
    events: deque[torch.cuda.Event] = deque()
    while count > 0:
        block = min(GRAPH_STEPS, count)
        if graph is not None and block == GRAPH_STEPS:
            graph.replay()
        else:
            wave.advance(block)
        count -= block
        if wave.factors.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(wave.factors.device))
            events.append(event)
            if len(events) > REPLAYS_AHEAD:
                events.popleft().synchronize()
        yield block
