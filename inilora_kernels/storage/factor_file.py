"""The factor file: one safetensors file that holds a model's factors and how they were computed.

Keys are PEFT's, `{module}.lora_A.weight` (r, in_features) and `{module}.lora_B.weight` (out_features, r), float32;
factors kept at earlier steps are stored next to them as `{module}.lora_A.step_{n}.weight`. The metadata has one entry,
`inilora_kernels`, a JSON object with the format version, the options of the run and a record for each module. There is
one entry because safetensors does not fix the order of several, and the same run must write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import FactorFileError
from ..factors import Certificate, Factors

FORMAT_VERSION = 1
METADATA_KEY = "inilora_kernels"


def encode(modules: Mapping[str, Factors], options: Mapping[str, Any]) -> bytes:
    """The factor file's bytes; the same factors and options give the same bytes."""
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for name, factors in modules.items():
        tensors[f"{name}.lora_A.weight"] = factors.A.contiguous()
        tensors[f"{name}.lora_B.weight"] = factors.B.contiguous()
        for step, (A, B) in factors.checkpoints.items():
            tensors[f"{name}.lora_A.step_{step}.weight"] = A.contiguous()
            tensors[f"{name}.lora_B.step_{step}.weight"] = B.contiguous()
        records[name] = _record(factors)
    header = {"format_version": FORMAT_VERSION, "options": dict(options), "modules": records}
    return bytes(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))


def digest(modules: Mapping[str, Factors]) -> str:
    """sha256 (hex) of some factors, which stands for them in a record."""
    total = hashlib.sha256()
    # Each on its own: one file may not hold the same tensor twice, but two modules may have the same factors.
    for name in sorted(modules):
        total.update(encode({name: modules[name]}, {}))
    return total.hexdigest()


def _record(factors: Factors) -> dict[str, Any]:
    certificate = factors.certificate
    return {
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


def read(path: Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors by module, and the options, of a factor file.

    Raises FactorFileError: no such file, no factor file, a damaged one, or one of a newer format.
    """
    if not path.is_file():
        raise FactorFileError(f"{path}: no such factor file; `inilora approximate MODEL -o FILE` writes one")
    try:
        with safe_open(path, framework="pt") as reader:
            header = json.loads((reader.metadata() or {}).get(METADATA_KEY, "null"))
            if header is None:
                raise FactorFileError(f"{path}: a safetensors file without factors in it; no {METADATA_KEY} entry")
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
    return modules, dict(header["options"])


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
