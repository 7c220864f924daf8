"""The backend for a name and a device; each is imported when needed, since numba and triton take a second."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING

from ..errors import BackendError, OptionError
from ..suggestions import did_you_mean, require_choice
from .backend import Backend
from .gpu.gpus import Gpu

if TYPE_CHECKING:
    import torch

BACKENDS = ("triton", "cpu", "reference")


def load_backend(name: str, device: str | torch.device | None = None) -> Backend:
    """The backend of that name; "auto" is triton if there is a GPU that it runs on, otherwise cpu.

    If there is a GPU that triton cannot run on, "auto" warns with the reason and takes the CPU, unless a CUDA device
    was asked for. Raises BackendError or OptionError.
    """
    import torch

    require_choice("backend", name, ("auto", *BACKENDS))
    try:
        chosen = torch.device(device) if device is not None else None
    except (RuntimeError, TypeError) as error:
        kind = "cuda" if str(device).lower() == "gpu" else str(device).partition(":")[0]
        near = did_you_mean(kind, ("cpu", "cuda"))
        raise OptionError(f"device={device!r}: choose one of cpu, cuda, cuda:0, …{near}") from error
    if chosen is not None and chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device={str(device)!r}: torch {torch.__version__} finds no GPU here; leave device out")
    if name == "auto":
        name = "triton" if chosen is not None and chosen.type == "cuda" else "cpu"
        if chosen is None and torch.cuda.is_available():
            try:
                return load_backend("triton")
            except BackendError as error:
                warnings.warn(f"the GPU is not used: {error}", stacklevel=2)
    if name == "cpu" and chosen is not None and chosen.type != "cpu":
        raise BackendError(f'backend="cpu" does not run on device {str(chosen)!r}; leave device out')
    _require_numba()
    if name == "cpu":
        from .cpu.backend import CpuBackend

        return CpuBackend(threads=torch.get_num_threads())
    if name == "triton":
        from .gpu.backend import TritonBackend

        return TritonBackend(device=chosen or torch.device("cuda"))
    from .reference import ReferenceBackend

    return ReferenceBackend(device=chosen or torch.device("cpu"))


def card_of(name: str, device: str | torch.device | None) -> Gpu | None:
    """The cost model's view of the GPU that a backend, by its own name, runs on; None for a processor."""
    if name != "triton":
        return None
    import torch

    from .gpu.backend import TritonBackend

    return TritonBackend(device=torch.device(device or "cuda")).gpu()


def _require_numba() -> None:
    """Raise BackendError unless numba starts and compiles: f* needs its kernels, whatever the backend."""
    try:
        import numba
    except Exception as error:  # with NUMBA_NUM_THREADS=0 a ValueError, with a newer numpy than it knows an ImportError
        reason = f"numba does not start ({' '.join(str(error).split()) or type(error).__name__})"
        raise BackendError(f"{reason}; {_numba_settings() or 'install a numba that fits this numpy'}") from error
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise BackendError(f"numba is told not to compile, and the kernels are nothing else; {_numba_settings()}")
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if features and not all(re.fullmatch(r"[+-][\w.-]+", feature) for feature in features.split(",")):
        # LLVM would end the process.
        raise BackendError(f"NUMBA_CPU_FEATURES={features}: no list of features such as +avx2,-avx512f; unset it")


def _numba_settings() -> str:
    found = sorted(name for name in os.environ if name.startswith("NUMBA_"))
    return f"unset {', '.join(found)}" if found else ""
