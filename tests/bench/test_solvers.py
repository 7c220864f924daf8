from __future__ import annotations

from pathlib import Path

import pytest

from bench import file_to_file, solvers
from bench.peers import PEERS


def test_every_solver_is_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(solvers, "CASES", {"small": ((96, 64), 2)})
    monkeypatch.setattr(solvers, "TURNS", 1)

    rows = solvers.measure("small", 4, "bfloat16")

    assert [row["solver"] for row in rows] == [solvers.OURS, *PEERS]
    excess = {row["solver"]: row["excess"] for row in rows}
    assert excess["PROPACK"] < 1e-8
    assert excess[solvers.OURS] < 1e-8
    assert excess["pissa_niter_4"] > 1e-8
    [short] = solvers.in_short(rows)
    assert short["PROPACK"] == f"{next(row['over ours'] for row in rows if row['solver'] == 'PROPACK'):.2f}"
    assert f"({excess['pissa_niter_16']:.0e})" in short["pissa_niter_16"]
    solvers._plot(rows).savefig(tmp_path / "small.png")


def test_every_way_writes_the_factors_of_every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"self_attn.q_proj": (96, 64), "mlp.down_proj": (64, 96)}
    monkeypatch.setattr(file_to_file, "MODELS", {"small": (layer, 2, 4)})
    monkeypatch.setattr(file_to_file, "TURNS", 1)

    rows = file_to_file.measure("small")

    assert [row["matrices"] for row in rows] == [4, 4, 4]
    assert all(row["s"] > 0 for row in rows)
