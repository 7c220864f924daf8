"""Which backend a name and a device mean."""

from __future__ import annotations

import sys

import pytest
import torch

from inilora_kernels.errors import BackendError, OptionError
from inilora_kernels.kernels.loading import BACKENDS, load_backend


def test_an_unknown_name_or_device_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="choose one of auto, triton, cpu, reference"):
        load_backend("cuda")
    with pytest.raises(OptionError, match="device='gpu'"):
        load_backend("auto", "gpu")
    assert BACKENDS == ("triton", "cpu", "reference")


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_backend("auto").name == "cpu"
    assert load_backend("auto", "cpu").name == "cpu"


def test_auto_warns_and_takes_the_cpu_where_the_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 or V100: visible to torch, below what the kernels need."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match=r"the GPU is not used: .*Tesla T4 has 7\.5"):
        assert load_backend("auto").name == "cpu"
    # Asked for by name, it is an error.
    for arguments in (("triton", None), ("auto", "cuda")):
        with pytest.raises(BackendError, match=r"needs compute capability 8\.0"):
            load_backend(*arguments)


def test_auto_warns_and_takes_the_cpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [name for name in sys.modules if name.startswith("inilora_kernels.kernels.gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=r"the GPU is not used: .*needs the triton package"):
        assert load_backend("auto").name == "cpu"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_numba_that_does_not_start_is_named_with_its_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """NUMBA_NUM_THREADS=0 makes `import numba` raise a ValueError, and NUMBA_DISABLE_JIT makes kernels plain Python."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.raises(BackendError, match="unset NUMBA_DISABLE_JIT"):
        load_backend(name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r"numba does not start \(.*\); unset NUMBA_DISABLE_JIT"):
        load_backend(name)
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    with pytest.raises(BackendError, match="install a numba that fits"):
        load_backend(name)
