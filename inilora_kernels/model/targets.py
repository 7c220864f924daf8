"""Which matrices of a checkpoint are factorized, in PEFT's `target_modules` syntax, and how to read each."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, TargetError, WeightError
from ..suggestions import did_you_mean, did_you_mean_names
from .architecture import HEADS, Architecture, Layer, describe
from .checkpoint import Checkpoint
from .files.tensor import some
from .formats.weight import StoredWeight
from .unchanged import watch

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# How architectures call the query and the value projection of one attention block.
QUERY_AND_VALUE = {
    "q_proj": "v_proj",  # LLaMA, Mistral, Qwen, Gemma, Phi, OPT, BART, CLIP, GPT-J and most others
    "query": "value",  # BERT and its family, ViT, DeiT, Swin
    "query_proj": "value_proj",  # DeBERTa-v2
    "q_lin": "v_lin",  # DistilBERT, XLM
    "q": "v",  # T5, MPNet
    "linear_q": "linear_v",  # Conformers
    "wq": "wv",  # LLaMA's and Mistral's own files
    "to_q": "to_v",  # diffusers
    "add_q_proj": "add_v_proj",  # diffusers' transformers, of the text's tokens
}
QUERIES = frozenset(QUERY_AND_VALUE) | {"q_attn"}
VALUES = frozenset(QUERY_AND_VALUE.values())

# Fused weights whose rows are all queries, then all keys, then all values, by (model_type, name). Others mix
# them head by head (GPT-NeoX, BLOOM, Falcon), so no slice of theirs is a query matrix.
FUSED_IN_ORDER = frozenset(
    {("phi3", "qkv_proj"), ("phi4_multimodal", "qkv_proj"), ("modernbert", "Wqkv"), ("mpt", "Wqkv")}
)
FUSED = re.compile(r"c_attn|query_key_value|W?qkv(_proj)?|attn_qkv")

# What modules without a known architecture are, by the last part of their name.
EMBEDDING = re.compile(r"\w*embeddings?|embed_\w+|wte|wpe|shared|relative_attention_bias")
OUTPUT = re.compile(r"lm_head|embed_out|output_projection|proj_out|output|cls\.predictions\.decoder")
CONV1D = re.compile(r"c_attn|c_proj|c_fc|q_attn")

_STRIP_BYTES = 1 << 24


@dataclass(frozen=True)
class Target:
    """One matrix W (d×k) to factorize, d = out_features, k = in_features, and how to read it.

    module: the tensor's name without `.weight`; a part of a fused weight adds `:query` or `:value`.
    kind: "query", "value", or the last part of any other name ("k_proj").
    shape: (d, k) of W, after orientation and slicing.
    dtype: the checkpoint's.
    read: W, contiguous, in its own dtype and memory. Raises CheckpointError if the file changed since it was opened.
    sha256: of the stored tensor's bytes, the whole one for a part of it.
    unchanged: whether it still has the sha256 that was found before; see `watch`.
    transposed: the tensor is stored as (in_features, out_features), as GPT-2's Conv1D does.
    rows: the rows [start, stop) of the whole W that this part covers; None for all of it.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(compare=False)
    sha256: Callable[[], str] = field(compare=False)
    transposed: bool = False
    rows: tuple[int, int] | None = None
    unchanged: Callable[[str], bool] = field(default=lambda sha256: True, compare=False)


def find_targets(checkpoint: Checkpoint, target_modules: Collection[str] | str | None = None) -> list[Target]:
    """The matrices that `target_modules` selects, in the order of the layers.

    target_modules:
        None: the query and value projection of every attention block. GPT-2's and Phi-3's fused weights give
            a part for each.
        a list: modules whose name is one of these, or ends in one after a dot.
        a string: a regular expression that matches the whole name.
        "all-linear": every linear layer but the output layer.
    Names are those in the checkpoint, those that transformers gives the modules when it loads it, and both
    with the base model's prefix (`bert.`), so what works in a `LoraConfig` works here.

    A target is a matrix that the model will load as a linear layer. What transformers does not load (the layers for
    multi-token prediction), or merges with others into one parameter (experts), is left out with a warning.

    Raises TargetError: nothing is selected, or something that is no linear layer or shares its weight, or the
    expression is invalid. WeightError: a selected weight is quantized or not floating point. CheckpointError:
    a weight's shape contradicts config.json.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> from inilora_kernels.model.checkpoint import open_checkpoint
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({f"0.{name}.weight": torch.zeros(4, 6) for name in ("q_proj", "k_proj", "v_proj")}, path)
    >>> [target.module for target in find_targets(open_checkpoint(path))]
    ['0.q_proj', '0.v_proj']
    """
    target = partial(_target, checkpoint, functools.cache(checkpoint.sha256))
    every = _modules(checkpoint)
    modules = [module for module in every if module.left_out is None]
    left_out = [module for module in every if module.left_out is not None]
    if target_modules is None:
        targets = list(_query_and_value(modules, target))
        left_out = [module for module in left_out if _last(module.name) in QUERIES | VALUES]
    elif isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        targets = [target(module) for module in modules if module.is_inner_linear]
        left_out = [module for module in left_out if module.form != "other" and not _is_output_by_name(module.name)]
    else:
        selects = _selector(target_modules)
        targets = [target(module) for module in modules if selects(module)]
        left_out = [module for module in left_out if selects(module)]
        _require_each_selects(checkpoint, target_modules, modules, left_out)
    if not targets:
        raise _nothing_found(checkpoint, modules, target_modules)
    for reason in dict.fromkeys(module.left_out for module in left_out):
        names = [module.name for module in left_out if module.left_out == reason]
        warnings.warn(f"{checkpoint.path}: left out {some(names)}: {reason}", stacklevel=2)
    return targets


@dataclass(frozen=True)
class _Module:
    """A module of the checkpoint with a weight, and what is known about it.

    entry: its weight.
    layer: what transformers says; None if it knows no such module.
    left_out: why it cannot be a target, whatever is asked for; None if it can.
    """

    path: Path
    name: str
    entry: StoredWeight
    form: Literal["linear", "conv1d", "other"]
    is_inner_linear: bool
    layer: Layer | None
    architecture: Architecture | None
    left_out: str | None

    @property
    def aliases(self) -> set[str]:
        """The names under which PEFT may meet this module."""
        names = {self.name, self.layer.name if self.layer else self.name}
        if self.architecture is not None and self.architecture.base_model_prefix:
            names |= {f"{self.architecture.base_model_prefix}.{name}" for name in names}
        return names


def _modules(checkpoint: Checkpoint) -> list[_Module]:
    """Every module of the checkpoint that has a weight, layer 2 before layer 10."""
    entries = {
        name.removesuffix(".weight"): weight for name, weight in checkpoint.weights.items() if name.endswith(".weight")
    }
    architecture = describe(checkpoint.config, entries) if checkpoint.config else None
    stored_transposed = _looks_like_gpt2(checkpoint, entries)
    modules = []
    for name in sorted(entries, key=_natural_order):
        layer = architecture.layers.get(name) if architecture else None
        if layer is not None:
            form = layer.form
            inner = form != "other" and not layer.is_output and not layer.shared_with
        else:
            form = _form_by_name(name, entries[name], stored_transposed)
            # A tensor that a complete model has no place for is a leftover, such as a pretraining head.
            inner = form != "other" and not _is_output_by_name(name) and not (architecture and architecture.complete)
        modules.append(
            _Module(
                path=checkpoint.path,
                name=name,
                entry=entries[name],
                form=form,
                is_inner_linear=inner,
                layer=layer,
                architecture=architecture,
                left_out=architecture.left_out(name) if architecture else None,
            )
        )
    return modules


def _require_each_selects(
    checkpoint: Checkpoint, target_modules: Collection[str] | str, loaded: list[_Module], left_out: list[_Module]
) -> None:
    """Raise TargetError, or warn, where a name in `target_modules` selects nothing, or nothing fit to be a target."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for name in names:
        selects = _selector(name if isinstance(target_modules, str) else [name])
        if any(selects(module) for module in loaded):
            continue
        refused = next((module for module in left_out if selects(module)), None)
        if refused is not None:
            others = [other for other in names if other != name]
            raise TargetError(
                f"{checkpoint.path}: {name} selects {refused.name} alone or its like, and {refused.left_out}; "
                f"leave {name} out of target_modules{f': {others}' if others else ''}"
            )
        if len(names) > 1:
            endings = {_last(module.name) for module in loaded if module.is_inner_linear}
            problem = f"{checkpoint.path}: {name!r} in target_modules selects nothing{did_you_mean(name, endings)}"
            if did_you_mean(name, endings):
                raise TargetError(f"{problem}; names here end in {', '.join(sorted(endings))}")
            warnings.warn(problem, stacklevel=3)  # PEFT takes a list that is meant for several models


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _looks_like_gpt2(checkpoint: Checkpoint, modules: Iterable[str]) -> bool:
    """Whether modules named as Conv1D's are stored as (in, out): a bias has out_features entries."""
    for module in modules:
        weight, bias = checkpoint.tensors.get(f"{module}.weight"), checkpoint.tensors.get(f"{module}.bias")
        if CONV1D.fullmatch(_last(module)) and weight and bias and len(weight.shape) == 2:
            rows, columns = weight.shape
            if rows != columns and bias.shape == (columns,):
                return True
    return False


def _form_by_name(name: str, entry: StoredWeight, stored_transposed: bool) -> Literal["linear", "conv1d", "other"]:
    if EMBEDDING.fullmatch(_last(name)) or (not entry.refusal and len(entry.shape) != 2):
        return "other"
    return "conv1d" if stored_transposed and CONV1D.fullmatch(_last(name)) else "linear"


def _is_output_by_name(name: str) -> bool:
    return bool(OUTPUT.fullmatch(name) or OUTPUT.fullmatch(_last(name))) or name.split(".")[0] in HEADS


def _selector(target_modules: Collection[str] | str) -> Callable[[_Module], bool]:
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(
                f"target_modules={target_modules!r} is no regular expression ({error}); "
                f'for module names give a list: ["query", "value"]'
            ) from error
        return lambda module: any(pattern.fullmatch(name) for name in module.aliases)
    endings = list(target_modules)
    if not all(isinstance(ending, str) and ending for ending in endings):
        raise TargetError(f"target_modules={target_modules!r}: every entry must be a module name")
    return lambda module: any(
        name == ending or name.endswith(f".{ending}") for name in module.aliases for ending in endings
    )


def _query_and_value(modules: list[_Module], target: Callable[..., Target]) -> Iterator[Target]:
    # transformers' names where it knows the module: they are more uniform than those in files.
    by_name = {module.layer.name if module.layer else module.name: module for module in modules}
    for name, module in by_name.items():
        block, last = name.rpartition(".")[0], _last(name)
        partners = [query for query, value in QUERY_AND_VALUE.items() if value == last]
        if last in QUERY_AND_VALUE:
            partners.append(QUERY_AND_VALUE[last])
        if any(f"{block}.{partner}" in by_name for partner in partners) or (
            last == "q_attn" and f"{block}.c_attn" in by_name
        ):
            yield target(module)
        for part, rows in _parts_in_order(module, name).items():
            yield target(module, part, rows)


def _parts_in_order(module: _Module, name: str) -> dict[str, tuple[int, int]]:
    """The rows of query and value in a fused weight that keeps each in one piece; empty for any other."""
    last = _last(name)
    if len(module.entry.shape) != 2:
        return {}
    if module.form == "conv1d" and last == "c_attn":
        d = module.entry.shape[0 if module.entry.is_quantized else 1]
        if "crossattention" in name:  # keys and values only; the queries are q_attn's
            return {"value": (d // 2, d)}
        return {"query": (0, d // 3), "value": (2 * d // 3, d)}
    config = module.architecture.config if module.architecture else None
    if config is None or (config.model_type, last) not in FUSED_IN_ORDER:
        return {}
    heads = config.num_attention_heads
    d = module.entry.shape[0]
    grouped = getattr(config, "num_key_value_heads", None) or heads
    head_size, rest = divmod(d, heads + 2 * grouped)
    if rest:
        raise CheckpointError(
            f"{module.path}: {module.name} has {d} rows, which {heads} query and 2·{grouped} key and value "
            f"heads do not divide; config.json and weights do not belong together"
        )
    return {"query": (0, heads * head_size), "value": (d - grouped * head_size, d)}


def _target(
    checkpoint: Checkpoint,
    sha256: Callable[[str], str],
    module: _Module,
    part: str | None = None,
    rows: tuple[int, int] | None = None,
) -> Target:
    where = f"{module.path}: {module.name}"
    entry = module.entry
    if entry.refusal or entry.dtype not in FLOAT_DTYPES:
        raise WeightError(
            f"{where} is quantized or not floating point ({entry.refusal or f'stored as {_dtype(entry)}'}); use the "
            f"original model in float32, float16 or bfloat16: its factors fit the quantized one too"
        )
    if len(entry.shape) != 2:
        raise TargetError(f"{where} has a weight of shape {entry.shape}, not a matrix; leave it out of target_modules")
    if module.form == "other":
        what = module.layer.type if module.layer else "embedding, by its name"
        raise TargetError(f"{where} is no linear layer ({what}); leave it out of target_modules")
    if module.layer is not None and module.layer.shared_with:
        raise TargetError(
            f"{where} shares its weight with {', '.join(module.layer.shared_with)}, so it cannot have "
            f"factors of its own; leave it out of target_modules"
        )
    turned = module.form == "conv1d" and entry.is_quantized
    if module.layer is not None and module.layer.shape != (entry.shape[::-1] if turned else entry.shape):
        raise CheckpointError(
            f"{where} has shape {entry.shape}, but config.json makes it {module.layer.shape}; "
            f"config.json and weights do not belong together"
        )
    transposed = module.form == "conv1d" and not entry.is_quantized
    d, k = reversed(entry.shape) if transposed else entry.shape
    last = _last(module.name)
    kind = part or ("query" if last in QUERIES else "value" if last in VALUES else last)
    tensor, shape = f"{module.name}.weight", (rows[1] - rows[0] if rows else d, k)
    return Target(
        module=f"{module.name}:{part}" if part else module.name,
        kind=kind,
        shape=shape,
        dtype=entry.dtype,
        read=partial(_read, checkpoint, tensor, shape, transposed, rows),
        sha256=partial(sha256, tensor),
        transposed=transposed,
        rows=rows,
        unchanged=watch((part.file for part in entry.stored.values()), partial(checkpoint.sha256, tensor)),
    )


def _read(
    checkpoint: Checkpoint, tensor: str, shape: tuple[int, int], transposed: bool, rows: tuple[int, int] | None
) -> Tensor:
    """W (d×k) of a stored tensor, turned and cut out strip by strip; the peak is about W itself."""
    if not transposed:
        return checkpoint.read(tensor, slice(*rows) if rows else slice(None))
    d, k = shape
    start, stop = rows or (0, d)
    entry = checkpoint.weights[tensor]
    W = torch.empty(d, k, dtype=entry.dtype)
    step = max(1, _STRIP_BYTES // (entry.shape[1] * entry.dtype.itemsize))
    for column in range(0, k, step):
        strip = checkpoint.read(tensor, slice(column, column + step))
        W[:, column : column + step] = strip[:, start:stop].T
    return W


def _nothing_found(
    checkpoint: Checkpoint, modules: list[_Module], target_modules: Collection[str] | str | None
) -> TargetError | WeightError:
    method = ((checkpoint.config or {}).get("quantization_config") or {}).get("quant_method")
    if method:
        return WeightError(
            f"{checkpoint.path}: no weight found to factorize, and config.json says the model is quantized "
            f"({method}); use the original, unquantized model: its factors fit the quantized one too"
        )
    how = (
        'give a list of name endings such as ["query", "value"], a regular expression for the whole name, '
        'or "all-linear"'
    )
    linear = [module.name for module in modules if module.is_inner_linear]
    known = f"{', '.join(linear[:4])}; they end in {', '.join(sorted({_last(name) for name in linear}))}"
    there = f"linear layers here: {known}" if linear else "it has no linear layers"
    fused = next((module.name for module in modules if FUSED.fullmatch(_last(module.name))), None)
    if target_modules is None and fused:
        return TargetError(
            f"{checkpoint.path}: query and value are fused in {fused}, in a layout that mixes them head by "
            f"head or is not known, so neither can be cut out. Name the modules in target_modules, such as "
            f'["{_last(fused)}"] for the whole fused weights'
        )
    asked = "no query and value projections found" if target_modules is None else "nothing selected"
    shown = "" if target_modules is None else f" by target_modules={target_modules!r}"
    near = did_you_mean_names(target_modules, {_last(name) for name in linear})
    return TargetError(f"{checkpoint.path}: {asked}{shown}{near}; {there}. In target_modules {how}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _dtype(entry: StoredWeight) -> str:
    return str(entry.dtype).removeprefix("torch.")
