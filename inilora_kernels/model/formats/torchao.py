"""torchao's tensors as transformers saves them: a tensor for each part, everything else in the file's metadata.

torchao itself puts them together and dequantizes them.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from ..files.torch_file import TorchTensor
from .weight import StoredModule, StoredWeight, library, unreadable

_PREFIX = "_weight_"


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    parts = {part: tensor for part, tensor in module.tensors.items() if part.startswith(_PREFIX)}
    name = f"{module.name}.weight"
    whole = module.tensors.get("weight")
    if isinstance(whole, TorchTensor) and whole.type:
        return StoredWeight(
            name=name,
            shape=whole.shape,
            dtype=whole.dtype,
            dequantization=f"torchao {whole.type}",
            stored={"weight": whole},
            dequantize=whole.read,
        )
    if not parts or name not in module.metadata:
        return None
    record = json.loads(module.metadata[name])
    values = next((parts[part] for part in (f"{_PREFIX}qdata", f"{_PREFIX}data") if part in parts), None)
    shape = _shape(record, values.shape if values else ())
    if shape is None:
        return unreadable(module, f"torchao's {record.get('_type')} does not say its shape")

    def dequantize(rows: slice) -> Tensor:
        support = library("torchao.prototype.safetensors.safetensors_support", module)
        metadata = {"tensor_names": json.dumps([name]), name: module.metadata[name]}
        tensors = {f"{module.name}.{part}": tensor.read() for part, tensor in parts.items()}
        whole, _ = support.unflatten_tensor_state_dict(tensors, metadata)
        dequantized: Tensor = whole[name].dequantize()
        return dequantized[rows].to(module.dtype).contiguous()

    return StoredWeight(
        name=name,
        shape=shape,
        dtype=module.dtype,
        dequantization=f"torchao {record.get('_type')} {json.dumps(record.get('_data'), sort_keys=True)}",
        stored=parts,
        dequantize=dequantize,
    )


def _shape(record: Any, values: tuple[int, ...]) -> tuple[int, int] | None:
    """The whole matrix's shape: stated where several values share a byte, otherwise that of the stored values."""
    if record.get("_type") in ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor"):
        shape: Any = values
    else:
        shape = (record.get("_data") or {}).get("shape")
        shape = shape.get("_data") if isinstance(shape, dict) else shape
    return (int(shape[0]), int(shape[1])) if isinstance(shape, (list, tuple)) and len(shape) == 2 else None
