"""`inilora methods`."""

from __future__ import annotations

import json

from .commands import Inilora


def test_methods_are_listed(inilora: Inilora) -> None:
    assert "inilora-beta-uniform" in inilora("methods").stdout
    listed = json.loads(inilora("methods", "--json").stdout)
    assert listed["pissa"]["solvers"] == ["krylov", "exact"]
