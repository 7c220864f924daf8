"""What the commands print for other programs: a result as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..factors import Factors


def json_report(factors: Mapping[str, Factors], options: Mapping[str, Any]) -> dict[str, Any]:
    """The table's content, and the options, as JSON values."""
    return {
        "options": _strict(dict(options)),
        "modules": {
            name: {
                "shape": [one.B.shape[0], one.A.shape[1]],
                "rank": one.rank,
                "loss": _number(one.certificate.loss),
                "optimum": _number(one.certificate.optimum),
                "excess": _number(one.certificate.excess),
                "certified": one.certificate.certified and not math.isnan(one.certificate.loss),
                "energy": _number(one.certificate.energy),
                "energy_kept": _number(one.certificate.kept),
                "steps": one.certificate.steps,
                "singular_values": list(one.singular_values),
                "source_sha256": one.source_sha256,
            }
            for name, one in factors.items()
        },
    }


def _number(value: float) -> float | None:
    """JSON has neither NaN nor Inf: what is not known without the model, or has no bound, is null."""
    return value if math.isfinite(value) else None


def _strict(value: Any) -> Any:
    """The same value without numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _strict(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(one) for one in value]
    return _number(value) if isinstance(value, float) else value
