"""A result in words: what was run, and what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..factors import Factors

# Units of 1,000, as disks and GPUs are sold.
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def run_in_words(factors: Mapping[str, Factors], options: Mapping[str, Any]) -> str:
    """Method, solver, rank and the number of matrices: "inilora by adam, rank 8, 12 matrices"."""
    ranks = sorted({one.rank for one in factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    method = options.get("method", "factors")
    by = f" by {options['solver']}" if options.get("solver") else ""
    count = len(factors)
    return f"{method}{by}, {rank}, {count} {'matrix' if count == 1 else 'matrices'}"


def worth_in_words(factors: Mapping[str, Factors]) -> str:
    """How much of the weights' energy BA keeps, and how much of what its rank could keep."""
    certificates = [one.certificate for one in factors.values()]
    energy = math.fsum(certificate.energy for certificate in certificates)
    loss = math.fsum(certificate.loss for certificate in certificates)
    best = energy - math.fsum(certificate.optimum for certificate in certificates)
    if math.isnan(energy):
        return "how good these factors are is not known without their model: inilora inspect --base MODEL"
    if not energy:
        return "every weight is zero"
    kept = energy - loss
    if kept <= 0:
        return (
            f"a start that does not approximate W: ‖W − BA‖² is {times(loss / energy)} ‖W‖²; "
            f"the best BA keeps {share(best / energy)} of it"
        )
    reached = f", {share(kept / best)} of what the rank can keep" if best > 0 else ""
    return f"BA keeps {share(kept / energy)} of the energy ‖W‖²{reached}"


def share(value: float) -> str:
    """A share in percent, with as many nines as it has, never rounded up to 100 %.

    >>> share(0.1502), share(0.99999914), share(1.0), share(0.5)
    ('15.0 %', '99.9999 %', '100 %', '50.0 %')
    """
    if value >= 1:
        return "100 %"
    digits = max(1, min(4, math.floor(-math.log10(1 - value)) - 2))
    if value > 0.99:
        value = math.floor(value * 10 ** (digits + 2)) / 10 ** (digits + 2)
    return f"{100 * value:.{digits}f} %"


def relative(error: float) -> str:
    """||W − BA||² as a share of ||W||², or as a multiple of it.

    >>> relative(0.85), relative(252.3)
    ('85.0 %', '252×')
    """
    return f"{error:.1%}".replace("%", " %") if error < 10 else times(error)


def times(value: float) -> str:
    """A multiple, to three digits.

    >>> times(94.12), times(25_230.0)
    ('94.1×', '25,200×')
    """
    if math.isinf(value):
        return "∞×"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.{max(0, digits)}f}×"


def duration_in_words(duration: float) -> str:
    """Seconds as a person says them.

    >>> [duration_in_words(seconds) for seconds in (0.4, 16.0, 95.0, 4_680.0, 200_000.0)]
    ['under a second', '16 s', '2 min', '78 min', '2.3 days']
    """
    if duration < 1:
        return "under a second"
    if duration < 90:
        return f"{duration:.0f} s"
    if duration < 2 * 3600:
        return f"{duration / 60:.0f} min"
    return f"{duration / 3600:.1f} hours" if duration < 36 * 3600 else f"{duration / 86400:.1f} days"


def size_in_words(size: float) -> str:
    """Bytes as a person says them.

    >>> [size_in_words(size) for size in (0, 512, 2_350_000, 38_600_000_000)]
    ['0 B', '512 B', '2.35 MB', '38.6 GB']
    """
    unit = next((unit for unit in ("B", "kB", "MB") if size < 1000 * BYTES[unit]), "GB")
    return f"{size / BYTES[unit]:{',.1f' if unit == 'GB' else '.3g'}} {unit}"
