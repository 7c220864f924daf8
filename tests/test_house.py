"""What CONTRIBUTING.md promises: imports one way, short files, calls that name arguments, a test file for a module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import inilora_kernels
from inilora_kernels.options import ModelOptions

PACKAGE = Path(inilora_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parent
BENCH = sorted((TESTS.parent / "bench").rglob("*.py"))
MOST_LINES, MOST_LINES_OF_THE_MAIN_JOB, MOST_POSITIONAL = 400, 250, 6


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, names: set[str]) -> Iterator[str]:
    """The package's modules that a file imports, wherever the import stands, but for type checkers alone."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            if inner in names:
                yield inner
            elif source in names and source != module_of(file):
                yield source


def imports() -> dict[str, set[str]]:
    names = {module_of(file) for file in FILES}
    return {module_of(file): set(imported(file, names)) - {module_of(file)} for file in FILES}


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the folders of the package and the files next to them."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        if "." in module:
            room = module.split(".")[1]
            found.setdefault(room, set()).update({other.split(".")[1] for other in others if "." in other} - {room})
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The first path found that comes back to where it began; empty where there is none."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph[node]):
            if found := follow(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := follow(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_go_one_way() -> None:
    graph = imports()
    assert graph["inilora_kernels.approximate"] > {"inilora_kernels.options", "inilora_kernels.factors"}
    assert circle(graph) == []
    assert circle(rooms(graph)) == []
    for room, below in {"solvers": ("cli", "adapters"), "kernels": ("cli", "adapters", "solvers", "storage")}.items():
        for module, others in graph.items():
            if module.startswith(f"inilora_kernels.{room}."):
                assert not [other for other in others if other.split(".")[1] in below], module


def test_files_are_short() -> None:
    lengths = {
        file: len(file.read_text(encoding="utf-8").splitlines()) for file in [*FILES, *BENCH, *TESTS.rglob("*.py")]
    }
    assert lengths[PACKAGE / "approximate.py"] < MOST_LINES_OF_THE_MAIN_JOB
    assert {str(file): lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


# A test file of their own would only repeat them.
WITHOUT_A_TEST_FILE = {"__main__.py", "version.py"}


def test_every_module_has_a_test_file_of_its_name() -> None:
    """tests/ is the package's mirror: the tests of storage/cache.py are in tests/storage/test_cache.py."""
    missing = []
    for file in FILES:
        path = file.relative_to(PACKAGE)
        expected = TESTS / path.parent / f"test_{path.name}"
        if path.name != "__init__.py" and str(path) not in WITHOUT_A_TEST_FILE and not expected.is_file():
            missing.append(f"{expected.relative_to(TESTS.parent)} for {path}")
    assert missing == []


def test_calls_name_their_arguments() -> None:
    long = []
    for file in [*FILES, *BENCH]:
        # bench/plain_numba.py stands in for kernels.
        if PACKAGE / "kernels" in file.parents or file.name == "plain_numba.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                positional = [one.arg for one in [*node.args.posonlyargs, *node.args.args] if one.arg != "self"]
                if len(positional) > MOST_POSITIONAL:
                    long.append(f"{file}: {node.name}({', '.join(positional)})")
    assert long == []


def test_an_options_default_stands_in_one_place() -> None:
    """No signature but options.py's own gives an option's name the default that it has there."""
    defaults = {one.name: one.default for one in fields(ModelOptions) if one.default is not None}
    again = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or file.name == "options.py":
                continue
            positional = [*node.args.posonlyargs, *node.args.args]
            named = zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True)
            for argument, value in (*named, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)):
                if isinstance(value, ast.Constant) and (argument.arg, value.value) in defaults.items():
                    again.append(f"{module_of(file)}.{node.name}: {argument.arg}={value.value!r}")
    assert again == []


def test_what_holds_tensors_compares_by_identity() -> None:
    """A generated == would raise, as torch has no truth value for a comparison of several entries."""
    by_value = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            decorator = next((text for text in map(ast.unparse, node.decorator_list) if "dataclass" in text), None)
            kinds = [ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)]
            holds = any(re.search(r"\bTensor\b", kind) and "Callable" not in kind for kind in kinds)
            if decorator is not None and holds and "eq=False" not in decorator:
                by_value.append(f"{module_of(file)}.{node.name}")
    assert by_value == []


def test_the_package_shows_its_public_names_alone() -> None:
    code = "import inilora_kernels as package; print(sorted(dir(package)) == sorted([*package.__all__, '__version__']))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "True"
