"""The result: factors A and B of each matrix, their certificate, and the factor file.

A factor file is one safetensors file. Keys are PEFT's, `{module}.lora_A.weight` (r, in_features) and
`{module}.lora_B.weight` (out_features, r), float32; factors kept at earlier steps sit beside them as
`{module}.lora_A.step_{n}.weight`. Its metadata holds one entry, `inilora_kernels`, a JSON object with the format
version, the options of the run and a record a module. One entry, because safetensors does not fix the order of several,
and the same run must give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FactorFileError, OptionError
from .storage.atomic import write_whole

FORMAT_VERSION = 1
METADATA_KEY = "inilora_kernels"

# Factors are stored in float32, so a product BA cannot be nearer to W than float32's half unit in the last place of
# each entry. An optimum below this share of ||W||² is zero for every float32 result.
FLOAT32_FLOOR = 2.0**-48


@dataclass(frozen=True)
class Certificate:
    """How good one matrix's factors are: f = ||W − BA||_F² against the least that rank r allows (Eckart–Young).

    loss: f, summed in float64 from the residual itself.
    optimum: f* = Σ_{i>r} σ_i², or a lower bound on it that was proven, so that the excess is never understated.
    energy: ||W||_F².
    steps: optimizer steps taken, 0 for methods without any.

    >>> certificate = Certificate(loss=1.5, optimum=1.0, energy=10.0, steps=100)
    >>> certificate.excess, certificate.kept
    (0.5, 0.85)
    """

    loss: float
    optimum: float
    energy: float
    steps: int

    @property
    def excess(self) -> float:
        """f/f* − 1: 0 at the minimum.

        Where f* is below float32's resolution of W (an exactly low-rank W), the excess is measured in units of that
        resolution, 2⁻⁴⁸·||W||², instead of dividing by zero.
        """
        if self.energy == 0.0:
            return 0.0 if self.loss == 0.0 else float("inf")
        return (self.loss - self.optimum) / max(self.optimum, FLOAT32_FLOOR * self.energy)

    @property
    def kept(self) -> float:
        """Share of W's energy that BA keeps: 1 − f/||W||²."""
        return 1.0 - self.loss / self.energy if self.energy else 1.0


@dataclass(frozen=True)
class Factors:
    """Factors of one matrix W (d×k): B (d×r) and A (r×k), float32 on the CPU, with BA ≈ W.

    source_sha256: of the bytes of the source tensor, as stored in the checkpoint.
    rows: for a part of a fused weight, the rows [start, stop) of W (in out_features) that it covers; None for all.
    transposed: the checkpoint stores W as (in_features, out_features), as GPT-2's Conv1D does.
    history: (step, loss) pairs in order, as sampled during the run.
    checkpoints: (A, B) kept at earlier steps, by step.
    singular_values: W's leading ones, descending, as many as are known (64 at most); none in files of version 0.1.0.
    """

    A: Tensor
    B: Tensor
    certificate: Certificate
    source_sha256: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    history: tuple[tuple[int, float], ...] = ()
    checkpoints: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    singular_values: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def product(self) -> Tensor:
        """BA (d×k), float32."""
        return self.B @ self.A


@dataclass(frozen=True)
class FactorSet(Mapping[str, Factors]):
    """The factors of a model by module name, and the options that made them.

    The module name is the checkpoint's tensor name without `.weight`; a part of a fused weight adds `:query` or
    `:value` to it.

    >>> import tempfile, torch
    >>> certificate = Certificate(loss=0.0, optimum=0.0, energy=2.0, steps=0)
    >>> one = Factors(torch.ones(1, 2), torch.ones(1, 1), certificate, source_sha256="")
    >>> path = Path(tempfile.mkdtemp()) / "factors.safetensors"
    >>> FactorSet({"layer.0.query": one}, {"method": "inilora"}).save(path)
    >>> FactorSet.load(path)["layer.0.query"].A
    tensor([[1., 1.]])
    """

    modules: Mapping[str, Factors]
    options: Mapping[str, Any]

    def __getitem__(self, module: str) -> Factors:
        return self.modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def at_step(self, step: int) -> FactorSet:
        """The factors as they were at a step of `checkpoint_steps`, with that step's loss. Raises OptionError."""
        modules = {}
        for name, factors in self.modules.items():
            if step not in factors.checkpoints:
                raise OptionError(
                    f"{name}: no factors were kept at step {step}; "
                    f"there are {sorted(factors.checkpoints)}: ask for it in checkpoint_steps"
                )
            A, B = factors.checkpoints[step]
            history = tuple(sample for sample in factors.history if sample[0] <= step)
            certificate = replace(factors.certificate, loss=dict(history)[step], steps=step)
            modules[name] = replace(factors, A=A, B=B, certificate=certificate, history=history, checkpoints={})
        return FactorSet(modules, self.options)

    def to_bytes(self) -> bytes:
        """The factor file's bytes; the same set gives the same bytes."""
        tensors: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        for name, factors in self.modules.items():
            tensors[f"{name}.lora_A.weight"] = factors.A.contiguous()
            tensors[f"{name}.lora_B.weight"] = factors.B.contiguous()
            for step, (A, B) in factors.checkpoints.items():
                tensors[f"{name}.lora_A.step_{step}.weight"] = A.contiguous()
                tensors[f"{name}.lora_B.step_{step}.weight"] = B.contiguous()
            certificate = factors.certificate
            records[name] = {
                "loss": certificate.loss,
                "optimum": certificate.optimum,
                "excess": certificate.excess,
                "energy": certificate.energy,
                "steps": certificate.steps,
                "source_sha256": factors.source_sha256,
                "rows": factors.rows,
                "transposed": factors.transposed,
                "history": factors.history,
                "checkpoint_steps": sorted(factors.checkpoints),
                "singular_values": factors.singular_values,
            }
        header = {"format_version": FORMAT_VERSION, "options": dict(self.options), "modules": records}
        return bytes(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))

    def save(self, path: str | Path) -> None:
        """Write the factor file, whole or not at all. Raises OutputError."""
        write_whole(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, base: str | Path | None = None) -> FactorSet:
        """Read a factor file, or a folder of `{module}.weight.pt` files as the paper's authors write them.

        base: only for such a folder, which does not say of which weights its factors are: their model, for the
            certificates and the sha256 that exports and conversions compare.

        Raises FactorFileError: no factor file, a damaged one, one of a newer format, or factors of another model.
        """
        path = Path(path)
        if path.is_dir():
            from .storage.authors_folder import load_inilora_pt  # that module builds on this one

            return load_inilora_pt(path, base)
        if not path.is_file():
            raise FactorFileError(f"{path}: no such factor file; `inilora approximate MODEL -o FILE` writes one")
        try:
            with safe_open(path, framework="pt") as reader:
                header = json.loads((reader.metadata() or {}).get(METADATA_KEY, "null"))
                if header is None:
                    raise FactorFileError(
                        f"{path}: a safetensors file, but not one of factors; no {METADATA_KEY} entry"
                    )
                if header["format_version"] != FORMAT_VERSION:
                    raise FactorFileError(
                        f"{path}: factor file format {header['format_version']}, this version reads "
                        f"{FORMAT_VERSION}; use the inilora_kernels that wrote it, or a newer one"
                    )
                modules = {name: _read(reader, name, record) for name, record in header["modules"].items()}
                if not modules:
                    raise FactorFileError(f"{path}: a factor file without any factors; make it again")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FactorFileError(f"{path}: damaged factor file ({error}); make it again") from error
        return cls(modules, header["options"])


def _read(reader: Any, name: str, record: Mapping[str, Any]) -> Factors:
    return Factors(
        A=reader.get_tensor(f"{name}.lora_A.weight"),
        B=reader.get_tensor(f"{name}.lora_B.weight"),
        certificate=Certificate(record["loss"], record["optimum"], record["energy"], record["steps"]),
        source_sha256=record["source_sha256"],
        rows=tuple(record["rows"]) if record["rows"] else None,
        transposed=record["transposed"],
        history=tuple((step, loss) for step, loss in record["history"]),
        checkpoints={
            step: (
                reader.get_tensor(f"{name}.lora_A.step_{step}.weight"),
                reader.get_tensor(f"{name}.lora_B.step_{step}.weight"),
            )
            for step in record["checkpoint_steps"]
        },
        singular_values=tuple(record.get("singular_values", ())),
    )
