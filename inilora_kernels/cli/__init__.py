"""The command line: `inilora`."""

from .main import main

__all__ = ["main"]
