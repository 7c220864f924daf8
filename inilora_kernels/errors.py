"""Everything this library raises on purpose.

Each message says what was wrong, where (file, module, tensor) and what to do about it. The command line prints the
message alone and exits with status 2.
"""

import errno


class InitializationError(Exception):
    """Any failure that this library foresees; the parent of all the others.

    >>> issubclass(OptionError, InitializationError)
    True
    """


class OptionError(InitializationError, ValueError):
    """An argument is outside its range, or two arguments contradict each other."""


class CheckpointError(InitializationError):
    """A model file is missing, truncated, corrupt or of an unknown format."""


class TargetError(InitializationError):
    """`target_modules` selects nothing, or something other than a linear layer's weight."""


class WeightError(InitializationError):
    """A weight matrix cannot be factorized: it holds NaN or Inf, is an integer matrix, or is smaller than the rank."""


class FactorFileError(InitializationError):
    """A factor file is missing, corrupt, or was written by an incompatible version."""


class OutputError(InitializationError):
    """A result cannot be written where it should go."""


class BackendError(InitializationError):
    """This machine does not have the requested backend or device."""


class UnknownModuleError(InitializationError, KeyError):
    """No factors have the requested name."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the message's repr


class ProcessError(InitializationError):
    """Another process of the same run failed or ended; its own message says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch, a GPU or the operating system refused memory.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, MemoryError) or any(one in str(error) for one in ("allocate memory", "out of memory"))


def is_out_of_files(error: BaseException) -> bool:
    """Whether the operating system lets this process, or all of them, open no more files.

    >>> is_out_of_files(OSError(errno.EMFILE, "Too many open files")), is_out_of_files(OSError("no such file"))
    (True, False)
    """
    number = error.errno if isinstance(error, OSError) else None
    # safetensors' errors have the system's words alone.
    return number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error)
