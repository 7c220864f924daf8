"""`inilora plan`: what its flags must be, before any model is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from inilora_kernels.cli.plan import plan
from inilora_kernels.errors import OptionError

NOWHERE = Path("no/such/model")


def test_flags_are_checked_before_the_model_is_looked_for() -> None:
    with pytest.raises(OptionError, match="rank=0"):
        plan(NOWHERE, rank=0)
    with pytest.raises(OptionError, match="steps=-1"):
        plan(NOWHERE, steps=-1)
    with pytest.raises(OptionError, match="gpus=0"):
        plan(NOWHERE, gpu="h100", gpus=0)


def test_what_needs_a_gpu_names_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"--gpus 2: of which kind\? Give --gpu too: .*rtx4090"):
        plan(NOWHERE, gpus=2)
    with pytest.raises(OptionError, match=r"--kernels .*; give --gpu too: .*h100"):
        plan(NOWHERE, kernels=True)
