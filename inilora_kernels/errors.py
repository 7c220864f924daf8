"""Everything this library raises on purpose.

Each message says what was wrong, where (file, module, tensor) and what to do about it. The command line prints the
message alone and exits with status 2.
"""


class InitializationError(Exception):
    """Any failure this library foresaw; the parent of all the others.

    >>> issubclass(OptionError, InitializationError)
    True
    """


class OptionError(InitializationError, ValueError):
    """An argument is outside its range, or two arguments contradict each other."""


class CheckpointError(InitializationError):
    """A model file is missing, truncated, corrupt or of an unknown format."""


class TargetError(InitializationError):
    """`target_modules` selects nothing, or something that is no linear weight."""


class WeightError(InitializationError):
    """A weight matrix cannot be factorized: NaN or Inf, integer or quantized, or smaller than the rank."""


class FactorFileError(InitializationError):
    """A factor file is missing, corrupt, or was written by an incompatible version."""


class OutputError(InitializationError):
    """A result cannot be written where it was asked for."""


class BackendError(InitializationError):
    """A backend or device was asked for that this machine does not have."""


class UnknownModuleError(InitializationError, KeyError):
    """Factors were asked for by a name that they do not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the message's repr


class ProcessError(InitializationError):
    """Another process of the same run failed or ended; its own message says why."""
