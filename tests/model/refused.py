"""What find_targets raises, which names the folder or the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets


def refusal(folder: Path, kind: type[Exception], target_modules: Any = None) -> str:
    with pytest.raises(kind) as error:
        find_targets(open_checkpoint(folder), target_modules)
    assert str(folder) in str(error.value) or "target_modules" in str(error.value)
    return str(error.value)
