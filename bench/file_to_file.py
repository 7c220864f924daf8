"""From a checkpoint on disk to a file of factors: ours, a script around scipy's PROPACK, and PEFT."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inilora_kernels import approximate_model

from .harness import Row, seconds
from .peers import PEERS, linear, ours
from .spectra import like_the_real

TURNS = 3
# Beyond this the peer is given one turn.
PATIENCE = 60.0
LLAMA3_LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
QUERY_AND_VALUE = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096)}
# The matrices of a layer, how many layers, the rank.
MODELS: dict[str, tuple[dict[str, tuple[int, int]], int, int]] = {
    "LLaMA2-7B, query and value": (QUERY_AND_VALUE, 32, 8),
    "LLaMA3-8B, 4 layers, all-linear": (LLAMA3_LAYER, 4, 32),
}
NOTE = (
    "bfloat16, a file a layer, in the page cache; each writes a safetensors file with A and B of every matrix. "
    "Ours hashes and certifies them too. PEFT's layers are made from the file, without transformers' loading."
)
# Enough different matrices that none is still in the processor's cache when its like comes round.
_DIFFERENT = 4


def measure(model: str) -> list[Row]:
    """A row for each way, which take turns."""
    layer, layers, rank = MODELS[model]
    ways: dict[str, Callable[[Path, Path, int], None]] = {
        "inilora krylov": _ours,
        "PROPACK script": _propack,
        "PEFT pissa_niter_16": _peft,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "model", Path(scratch) / "factors.safetensors"
        folder.mkdir()
        known: dict[tuple[int, int], list[Tensor]] = {}
        for shape in set(layer.values()):
            known[shape] = [like_the_real(shape, torch.bfloat16, seed) for seed in range(min(layers, _DIFFERENT))]
        index: dict[str, str] = {}
        for number in range(layers):
            names = {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
            index |= dict.fromkeys(names, f"model-{number}.safetensors")
            tensors = {
                # The value differs from the query of its layer.
                name: known[shape][(number + place) % len(known[shape])].clone()
                for place, (name, shape) in enumerate(names.items())
            }
            save_file(tensors, folder / f"model-{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        ours(like_the_real((1500, 1500), torch.bfloat16, seed=9), rank)  # compiles
        for turn in range(TURNS):
            for way, run in ways.items():
                if not turn or sum(times[way]) < PATIENCE:
                    times[way].append(seconds(lambda run=run: run(folder, output, rank)))
    least = median(times["inilora krylov"])
    return [
        {
            "model": model,
            "matrices": layers * len(layer),
            "rank": rank,
            "way": way,
            "s": median(taken),
            "over ours": median(taken) / least,
            "turns": len(taken),
        }
        for way, taken in times.items()
    ]


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name.removesuffix(".weight"), opened.get_tensor(name)


def _ours(folder: Path, output: Path, rank: int) -> None:
    approximate_model(folder, rank, "all-linear", solver="krylov", cache=False, progress=False).save(output)


def _propack(folder: Path, output: Path, rank: int) -> None:
    found = {}
    for module, W in _stored(folder):
        A, B = PEERS["PROPACK"](W, rank)
        found |= {f"{module}.lora_A.weight": A.contiguous(), f"{module}.lora_B.weight": B.contiguous()}
    save_file(found, output)


def _peft(folder: Path, output: Path, rank: int) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    layers = nn.ModuleDict()
    for module, W in _stored(folder):
        layers[module.replace(".", "_")] = linear(W)
    config = LoraConfig(r=rank, target_modules=list(layers), init_lora_weights="pissa_niter_16")
    save_file(get_peft_model_state_dict(get_peft_model(layers, config)), output)
