"""What `import inilora_kernels` gives, and what it does not cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import inilora_kernels


def test_every_public_name_is_there() -> None:
    for name in inilora_kernels.__all__:
        assert getattr(inilora_kernels, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        inilora_kernels.nothing  # noqa: B018


def test_what_needs_peft_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "inilora_kernels.adapters.peft", raising=False)
    with pytest.raises(ImportError, match=r"initialize_peft needs peft: pip install 'inilora-kernels\[peft\]'"):
        inilora_kernels.initialize_peft  # noqa: B018


def test_importing_it_brings_no_heavy_library_along() -> None:
    program = "import json, sys, inilora_kernels; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert not {"transformers", "peft", "numba", "triton", "matplotlib", "huggingface_hub"} & set(loaded)
