"""What pyproject.toml says of versions is what is installed where the tests run: the lowest, and the newest."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # in the standard library from Python 3.11 on

ROOT = Path(__file__).parents[1]

# PyPI has no torch of that age without CUDA: 2.13 stands for all of them.
UNTRIED = {"torch"}


def declared() -> dict[str, Requirement]:
    """What a user installs: the dependencies, and the extras that the main path, the adapters and the plots need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["peft"], *extras["plot"]]
    return {one.name: one for one in map(Requirement, lines)}


def pinned(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {package: Version(version) for package, version in pairs}


def test_the_lowest_versions_are_the_declared_ones() -> None:
    lowest = pinned("constraints-lowest.txt")
    for name, requirement in declared().items():
        (floor,) = requirement.specifier
        assert floor.operator == ">=", requirement
        if name not in UNTRIED:
            # Zeros at the end count for nothing: 13 is 13.0.0.
            assert lowest[name] == Version(floor.version), requirement


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_every_pinned_version_is_allowed(name: str) -> None:
    pins = pinned(name)
    for package, requirement in declared().items():
        assert pins[package] in requirement.specifier, f"{name}: {package}"


def test_every_extra_names_the_same_floor_for_a_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors: dict[str, set[str]] = {}
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, lines):
            if requirement.specifier:
                floors.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: different for name, different in floors.items() if len(different) > 1} == {}
