"""The errors as a family: one parent, caught also by who knows only Python's own, and messages as they were written."""

from __future__ import annotations

import pickle

import pytest

from inilora_kernels import errors
from inilora_kernels.errors import InitializationError, OptionError, UnknownModuleError

FAMILY = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]


def test_every_error_has_the_one_parent_and_says_when_it_is_raised() -> None:
    assert len(FAMILY) > 8
    for one in FAMILY:
        assert issubclass(one, InitializationError)
        assert one.__doc__


@pytest.mark.parametrize("error", FAMILY)
def test_messages_are_shown_as_they_were_written_and_travel_between_processes(error: type[Exception]) -> None:
    """A KeyError would show the repr; torch.multiprocessing and pools pickle what a worker raised."""
    raised = error("model.safetensors: it's truncated")
    assert str(raised) == "model.safetensors: it's truncated"
    assert str(pickle.loads(pickle.dumps(raised))) == str(raised)


def test_pythons_own_are_among_the_parents_where_callers_expect_them() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(UnknownModuleError, KeyError)
