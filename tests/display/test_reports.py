"""The report for programs: JSON that comes back the same, with the certificate of every matrix."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from inilora_kernels.display.reports import json_report
from inilora_kernels.factors import Certificate

from .synthetic import one


def test_a_report_survives_json_and_says_what_the_certificate_says() -> None:
    factors = {"h.0.q": one(0.5, 0.4, rank=3, shape=(6, 5)), "h.0.v": one(0.0, 0.0)}
    report = json_report(factors, {"method": "inilora", "rank": 3})
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["options"] == {"method": "inilora", "rank": 3}
    shown, certificate = report["modules"]["h.0.q"], factors["h.0.q"].certificate
    assert (shown["shape"], shown["rank"]) == ([6, 5], 3)
    assert shown["energy_kept"] == certificate.kept == 0.5
    for name in ("loss", "optimum", "excess", "energy", "steps", "certified"):
        assert shown[name] == getattr(certificate, name)


def test_what_has_no_bound_is_null() -> None:
    """Adam on a matrix of zeros leaves a loss, of which there is no multiple: `Infinity` is no JSON."""
    zero = replace(one(), certificate=Certificate(loss=1e-9, optimum=0.0, energy=0.0, steps=3))
    report = json_report({"h.0.q": zero}, {"tol": math.inf, "ranks": [8, math.nan]})
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["modules"]["h.0.q"]["excess"] is None
    assert report["options"] == {"tol": None, "ranks": [8, None]}
