"""What the commands print for programs: a result as JSON values."""

from __future__ import annotations

import math
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
                "loss": _known(one.certificate.loss),
                "optimum": _known(one.certificate.optimum),
                "excess": _known(one.certificate.excess),
                "energy": _known(one.certificate.energy),
                "energy_kept": _known(one.certificate.kept),
                "steps": one.certificate.steps,
                "singular_values": list(one.singular_values),
                "source_sha256": one.source_sha256,
            }
            for name, one in factors.items()
        },
    }


def _known(value: float) -> float | None:
    """JSON has no NaN: null stands for what was never compared with any weights."""
    return None if math.isnan(value) else value
