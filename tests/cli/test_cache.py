"""`inilora cache`, as a user runs it, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inilora_kernels import Certificate, Factors
from inilora_kernels.cli.cache import cache_application
from inilora_kernels.errors import InitializationError
from inilora_kernels.storage import cache

KEYS = ["aa" * 32, "bb" * 32, "cc" * 32]


@pytest.fixture(autouse=True)
def three_entries() -> list[Path]:
    """Used 1, 2 and 3 days ago, the first one longest ago."""
    paths = []
    for number, key in enumerate(KEYS):
        one = Factors(A=torch.ones(1, 2), B=torch.ones(3, 1), certificate=Certificate(1, 1, 2, 0), source_sha256=key)
        cache.keep(key, one)
        path = cache.entry_path(key)
        assert path is not None
        used = path.stat().st_mtime - 86_400 * (3 - number)
        os.utime(path, (used, used))
        paths.append(path)
    return paths


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cache_application, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_where_size_and_list(own_cache: Path) -> None:
    assert run("where").strip() == str(own_cache)
    assert run("size").startswith("3 entries, ")
    assert [line.split()[0] for line in run("list").splitlines()] == KEYS
    assert json.loads(run("list", "--json"))[0]["key"] == KEYS[0]


def test_prune_and_clear() -> None:
    assert run("prune", "--older-than", "36h").startswith("2 entries, ")
    assert run("prune", "--to-size", "1GB").startswith("0 entries, ")
    assert run("clear").startswith("1 entry, ")
    assert json.loads(run("size", "--json"))["entries"] == 0


def test_verify(three_entries: list[Path]) -> None:
    assert run("verify").startswith("0 entries, 0 B, damaged")
    three_entries[1].write_bytes(three_entries[1].read_bytes()[:-1])
    with pytest.raises(InitializationError, match=KEYS[1]):
        run("verify")
    assert run("verify", "--remove").startswith("1 entry, ")
    assert run("size").startswith("2 entries, ")


@pytest.mark.parametrize("arguments", [["prune"], ["prune", "--older-than", "soon"], ["prune", "--to-size", "-1GB"]])
def test_what_is_no_age_or_size_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InitializationError, match=r"--older-than|--to-size"):
        run(*arguments)
    assert run("size").startswith("3 entries, ")
