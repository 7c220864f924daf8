"""The factor file: one safetensors file that holds a model's factors and how they were computed.

Keys are PEFT's, `{module}.lora_A.weight` (r, in_features) and `{module}.lora_B.weight` (out_features, r), float32;
factors kept at earlier steps are stored next to them as `{module}.lora_A.step_{n}.weight`. The metadata has one entry,
`inilora_kernels`, a JSON object with the format version, the options of the run and a record for each module. There is
one entry because safetensors does not fix the order of several, and the same run must write the same bytes.

A record holds the sha256 of each of its tensors, of the shape as text, "[8, 384]", followed by the bytes. `checksum` is
the sha256 of the whole entry with zeros in its own place. So no bit of what is read can change unnoticed. Files of
version 0.1.0 have neither, and are read without.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import FactorFileError
from ..factors import Certificate, Factors
from ..suggestions import near_names
from .atomic import unshared
from .reading import is_there, read_bytes
from .schema import FactorFileHeader, FormatVersion, ModuleRecord, parse

FORMAT_VERSION = 1
METADATA_KEY = "inilora_kernels"
_ZEROS = "0" * 64


def encode(modules: Mapping[str, Factors], options: Mapping[str, Any]) -> bytes:
    """The factor file's bytes; the same factors and options give the same bytes."""
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for name, factors in modules.items():
        own = {"lora_A.weight": factors.A, "lora_B.weight": factors.B}
        for step, (A, B) in factors.checkpoints.items():
            own |= {f"lora_A.step_{step}.weight": A, f"lora_B.step_{step}.weight": B}
        tensors.update((f"{name}.{key}", tensor) for key, tensor in own.items())
        records[name] = {**_record(factors), "sha256": {key: _sha256(tensor) for key, tensor in own.items()}}
    header = {"format_version": FORMAT_VERSION, "checksum": _ZEROS, "options": dict(options), "modules": records}
    entry = json.dumps(header)
    return bytes(save(unshared(tensors), metadata={METADATA_KEY: entry.replace(_ZEROS, _checksum(entry), 1)}))


def _checksum(entry: str) -> str:
    """sha256 (hex) of the metadata entry, with zeros in place of its checksum."""
    return hashlib.sha256(entry.encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    total = hashlib.sha256(str(list(tensor.shape)).encode())
    total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def digest(modules: Mapping[str, Factors]) -> str:
    """sha256 (hex) of factors, which stands for them in a record."""
    total = hashlib.sha256()
    # One by one: a file may not hold the same tensor twice, but two modules may have the same factors.
    for name in sorted(modules):
        total.update(encode({name: modules[name]}, {}))
    return total.hexdigest()


def _record(factors: Factors) -> dict[str, Any]:
    certificate = factors.certificate
    return {
        "loss": certificate.loss,
        "optimum": certificate.optimum,
        # Of a loss where W is zero there is no multiple, and JSON has no Inf.
        "excess": certificate.excess if certificate.excess < math.inf else None,
        "energy": certificate.energy,
        "steps": certificate.steps,
        "certified": certificate.certified,
        "source_sha256": factors.source_sha256,
        "rows": factors.rows,
        "transposed": factors.transposed,
        **({"dequantization": factors.dequantization} if factors.dequantization else {}),
        "history": factors.history,
        "checkpoint_steps": sorted(factors.checkpoints),
        "singular_values": factors.singular_values,
    }


def read(path: Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors by module, and the options, of a factor file.

    Raises FactorFileError if the file is missing, is no factor file, is damaged, or is of a newer format.
    """
    if not is_there(path):
        raise FactorFileError(
            f"{path}: no such factor file{near_names(path, ('.safetensors',))}; "
            f"`inilora approximate MODEL -o FILE` writes one"
        )
    return decode(read_bytes(path, FactorFileError), str(path))


def decode(content: bytes, where: str, *, sealed: bool = False) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The same from the file's bytes. Every record and every tensor is checked.

    where: what messages call the file. sealed: refuse a file without checksums too.
    """
    try:
        # safetensors checks the file itself before the metadata is relied on.
        tensors = load(content)
        entry = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][METADATA_KEY]
    except KeyError as error:
        raise FactorFileError(f"{where}: a safetensors file without factors in it; no {METADATA_KEY} entry") from error
    except (SafetensorError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise FactorFileError(f"{where}: damaged factor file ({error}); compute the factors again") from error
    version = parse(FormatVersion, entry, where).format_version
    if version != FORMAT_VERSION:
        raise FactorFileError(
            f"{where}: factor file format {version}, this version reads {FORMAT_VERSION}; use the inilora_kernels "
            f"that wrote it, or a newer one"
        )
    header = parse(FactorFileHeader, entry, where)
    if header.checksum is None:
        damaged = sealed
    else:
        damaged = header.checksum != _checksum(entry.replace(header.checksum, _ZEROS, 1))
    if damaged:
        raise FactorFileError(
            f"{where}: damaged or edited: the checksum of its metadata is not that of what was written; take another "
            f"copy, or compute the factors again"
        )
    return {name: _factors(tensors, name, record, where) for name, record in header.modules.items()}, header.options


def _factors(tensors: Mapping[str, Tensor], name: str, record: ModuleRecord, where: str) -> Factors:
    A, B = _pair(tensors, name, "", record, where)
    return Factors(
        A=A,
        B=B,
        certificate=Certificate(record.loss, record.optimum, record.energy, record.steps, record.certified),
        source_sha256=record.source_sha256,
        rows=record.rows,
        transposed=record.transposed,
        dequantization=record.dequantization,
        history=tuple(record.history),
        checkpoints={step: _pair(tensors, name, f"step_{step}.", record, where) for step in record.checkpoint_steps},
        singular_values=tuple(record.singular_values),
    )


def _pair(
    tensors: Mapping[str, Tensor], name: str, step: str, record: ModuleRecord, where: str
) -> tuple[Tensor, Tensor]:
    """A (r×k) and B (d×r) of a module, float32 and finite, that fit each other. Raises FactorFileError."""
    keys = [f"{name}.lora_{letter}.{step}weight" for letter in "AB"]
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise FactorFileError(f"{where}: damaged factor file, no {missing[0]} in it; compute the factors again")
    A, B = (tensors[key] for key in keys)
    for key, factor in zip(keys, (A, B), strict=True):
        if factor.dtype != torch.float32 or factor.ndim != 2 or 0 in factor.shape:
            raise FactorFileError(
                f"{where}: {key} is {str(factor.dtype).removeprefix('torch.')} of shape {tuple(factor.shape)}, not a "
                f"float32 matrix; compute the factors again"
            )
        if not factor.isfinite().all():
            raise FactorFileError(f"{where}: {key} holds NaN or Inf; compute the factors again")
        expected = record.sha256.get(key.removeprefix(f"{name}."))
        if record.sha256 and _sha256(factor) != expected:
            raise FactorFileError(
                f"{where}: damaged: {key} is not the tensor that was written, by its sha256; take another copy, or "
                f"compute the factors again"
            )
    rows = record.rows
    # Periodic rows repeat to the end of the weight, whose length the file does not record.
    fits = rows is None or (
        B.shape[0] == rows[1] - rows[0] if len(rows) == 2 else B.shape[0] % (rows[1] - rows[0]) == 0
    )
    if A.shape[0] != B.shape[1] or not fits:
        raise FactorFileError(
            f"{where}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}"
            f"{f' for rows {rows}' if rows else ''}, which do not fit each other; "
            f"compute the factors again"
        )
    return A, B
