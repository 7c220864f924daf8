"""The package's version, as pyproject.toml and every factor file have it."""

__version__ = "0.1.0"
