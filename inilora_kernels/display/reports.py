"""What the commands print for other programs: a result as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..factors import Factors


def json_report(factors: Mapping[str, Factors], options: Mapping[str, Any]) -> dict[str, Any]:
    """The table's content, and the options, as JSON values."""
    return {
        "options": dict(options),
        "modules": {
            name: {
                "shape": [one.B.shape[0], one.A.shape[1]],
                "rank": one.rank,
                "loss": one.certificate.loss,
                "optimum": one.certificate.optimum,
                "excess": one.certificate.excess,
                "certified": one.certificate.certified,
                "energy": one.certificate.energy,
                "energy_kept": one.certificate.kept,
                "steps": one.certificate.steps,
                "singular_values": list(one.singular_values),
                "source_sha256": one.source_sha256,
            }
            for name, one in factors.items()
        },
    }
