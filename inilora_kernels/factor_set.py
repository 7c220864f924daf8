"""The factors of a model as one value, by module name: saved, loaded and shown."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.table import Table

from .display import tables
from .display.html import as_html
from .errors import FactorFileError, OptionError, UnknownModuleError
from .factors import Factors
from .foreign_factors import certified
from .places import file_to_write, given_path
from .storage import factor_file
from .storage.atomic import write_whole
from .storage.authors_folder import load_inilora_pt
from .suggestions import did_you_mean, some


@dataclass(frozen=True, eq=False, repr=False)
class FactorSet(Mapping[str, Factors]):
    """The factors of a model by module name, and the options they were computed with.

    The module name is the checkpoint's tensor name without `.weight`; a part of a fused weight adds `:query` or
    `:value` to it.

    >>> import tempfile, torch
    >>> from inilora_kernels import Certificate
    >>> certificate = Certificate(loss=0.0, optimum=0.0, energy=2.0, steps=0)
    >>> one = Factors(torch.ones(1, 2), torch.ones(1, 1), certificate, source_sha256="")
    >>> path = Path(tempfile.mkdtemp()) / "factors.safetensors"
    >>> FactorSet({"layer.0.query": one}, {"method": "inilora"}).save(path)
    >>> FactorSet.load(path)["layer.0.query"].A
    tensor([[1., 1.]])
    >>> FactorSet.load(path)
    FactorSet(1 matrix, inilora, rank 1, keeps 100.00% of the energy, excess ≤ 0.0e+00)

    Two sets are equal only if they are the same object.
    """

    modules: Mapping[str, Factors]
    options: Mapping[str, Any]

    def __getitem__(self, module: str) -> Factors:
        if module in self.modules:
            return self.modules[module]
        ends = [name for name in self.modules if name.replace(":", ".").endswith(f".{module}")]
        near = f"; {some(ends)} end in that name" if ends else did_you_mean(module, self.modules)
        raise UnknownModuleError(f"no factors for {module!r} among {len(self)} matrices{near}")

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def at_step(self, step: int) -> FactorSet:
        """The factors as they were at a step of `checkpoint_steps`, with that step's loss. Raises OptionError."""
        modules = {}
        for name, factors in self.modules.items():
            if step not in factors.checkpoints:
                kept = f"only at {sorted(factors.checkpoints)}" if factors.checkpoints else "nor at any other"
                raise OptionError(
                    f"{name}: no factors were kept at step {step}, {kept}; ask for it in checkpoint_steps"
                )
            A, B = factors.checkpoints[step]
            history = tuple(sample for sample in factors.history if sample[0] <= step)
            certificate = replace(factors.certificate, loss=dict(history)[step], steps=step)
            modules[name] = replace(factors, A=A, B=B, certificate=certificate, history=history, checkpoints={})
        return FactorSet(modules, self.options)

    def table(self, *, every: bool = False) -> Table:
        """What `inilora inspect` shows, for rich to print: a row for each kind of matrix, or for every one; totals."""
        return tables.result_table(self.modules, self.options, every=every)

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return as_html(self.table())

    def to_bytes(self) -> bytes:
        """The factor file's bytes; the same set gives the same bytes."""
        return factor_file.encode(self.modules, self.options)

    def save(self, path: str | Path) -> None:
        """Write the factor file, completely or not at all. Raises OutputError."""
        write_whole(file_to_write(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, base: str | Path | None = None) -> FactorSet:
        """Read a factor file, or a folder of `{module}.weight.pt` files as the paper's authors write them.

        base: only for such a folder, which does not say which weights its factors were computed from: the model's
            folder, for the certificates and for the sha256 that exports and conversions compare.

        Raises FactorFileError if the file is missing, damaged or of a newer format, or belongs to another model.
        """
        if not isinstance(path, (str, PathLike)):
            raise FactorFileError(f"FactorSet.load was given a {type(path).__name__}; give a factor file's path")
        path = given_path(path)
        if not os.path.isdir(path):
            return cls(*factor_file.read(path))
        modules, options = load_inilora_pt(path)
        return cls(modules if base is None else certified(modules, base), options)

    def __repr__(self) -> str:
        count = f"{len(self)} matrix" if len(self) == 1 else f"{len(self)} matrices"
        if not self.modules:
            return f"FactorSet({count})"
        ranks = sorted({one.rank for one in self.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        certificates = [one.certificate for one in self.values()]
        energy, loss = (math.fsum(values) for values in zip(*((c.energy, c.loss) for c in certificates), strict=True))
        if math.isnan(energy):
            return f"FactorSet({count}, {self.options.get('method', 'unknown method')}, {rank}, not certified)"
        kept = f"keeps {1 - loss / energy if energy else 1:.2%} of the energy"
        excess = f"excess ≤ {max(certificate.excess for certificate in certificates):.1e}"
        return f"FactorSet({count}, {self.options.get('method', 'unknown method')}, {rank}, {kept}, {excess})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def factor_set(factors: FactorSet | str | Path, base: str | Path | None = None) -> FactorSet:
    """Return the factors, read by `FactorSet.load` if this is their path.

    Raises OptionError for anything else, and what `FactorSet.load` raises.
    """
    if isinstance(factors, FactorSet):
        return factors
    if isinstance(factors, (str, Path)):
        return FactorSet.load(factors, base)
    raise OptionError(
        f"factors: was given a {type(factors).__name__}; give what approximate_model or FactorSet.load returns, or the "
        f"path of a factor file"
    )


def loaded(factors: Any) -> Any:
    """The FactorSet of a file, if this is its path; anything else as it is. Raises what `FactorSet.load` raises."""
    return FactorSet.load(factors) if isinstance(factors, (str, Path)) else factors
