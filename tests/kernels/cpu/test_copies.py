"""Copies in compiled code, and that nothing there assigns an array to a slice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import inilora_kernels.kernels.cpu
from inilora_kernels.kernels.cpu.copies import copy_row, copy_rows

FOLDER = Path(inilora_kernels.kernels.cpu.__file__).parent


def test_a_copy_fills_its_target_and_nothing_else() -> None:
    source, target = np.arange(20.0).reshape(4, 5), np.zeros((4, 6))
    copy_rows(source, target[1:3, 2:6])
    expected = np.zeros((4, 6))
    expected[1:3, 2:6] = source[:2, :4]
    assert (target == expected).all()
    copy_rows(source.T, target[:, :3])
    assert (target[:, :3] == source.T[:4, :3]).all()
    row = np.zeros(3)
    copy_row(source[1], row)
    assert (row == source[1, :3]).all()


def slices_assigned(tree: ast.AST) -> Iterator[int]:
    """The lines of compiled functions where a slice is assigned what is no number."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any("njit" in ast.unparse(one) for one in function.decorator_list):
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assign) and not isinstance(statement.value, ast.Constant):
                    targets = [one for one in statement.targets if isinstance(one, ast.Subscript)]
                    if any(isinstance(part, ast.Slice) for one in targets for part in ast.walk(one.slice)):
                        yield statement.lineno


def test_no_compiled_function_assigns_an_array_to_a_slice() -> None:
    """The first run would compile numba's strings for it: Adam's took 17 s in place of 10."""
    found = {file.name: list(slices_assigned(ast.parse(file.read_text()))) for file in FOLDER.glob("*.py")}
    assert not {name: lines for name, lines in found.items() if lines}
    assert list(slices_assigned(ast.parse("@njit()\ndef f(a, b):\n    a[:2] = b\n    a[:] = 0"))) == [3]
