"""Which matrices of a checkpoint are factorized, in PEFT's `target_modules` syntax, and how to read each."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, TargetError, WeightError
from ..suggestions import some
from .architecture import Architecture, describe
from .checkpoint import Checkpoint
from .experts import (
    REARRANGED,
    ExpertParameter,
    find_expert_parameters,
    is_selected,
    rearranged_experts,
    selected,
)
from .files.tensor import blocks_of
from .formats.find import module_and_part
from .formats.weight import StoredWeight
from .fused import FUSED, Parts, Rows, fused_parts, row_count, row_index, thirds
from .hub import Choose
from .modules import Module, aliases, find_modules, is_output_by_name, last_part, once_each, selector
from .selection import nothing_found, require_each_selects
from .unchanged import watch

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The names that architectures give the query and value projections of an attention block.
QUERY_AND_VALUE = {
    "q_proj": "v_proj",  # LLaMA, Mistral, Qwen, Gemma, Phi, OPT, BART, CLIP, GPT-J and most others
    "query": "value",  # BERT and its family, ViT, DeiT, Swin
    "query_proj": "value_proj",  # DeBERTa-v2
    "q_lin": "v_lin",  # DistilBERT, XLM
    "q": "v",  # T5, MPNet
    "linear_q": "linear_v",  # Conformers
    "wq": "wv",  # LLaMA's and Mistral's own files
    "to_q": "to_v",  # diffusers
    "add_q_proj": "add_v_proj",  # diffusers' transformers, for the text tokens
    "project_q": "project_v",  # CPM-Ant
    "Wq": "Wv",  # CTRL
    "q_head": "v_head",  # Funnel
}
# GPT-2's cross-attention, and DeepSeek's latent attention: its queries are q_proj's, or q_b_proj's where they are
# compressed; keys and values come from one latent vector by kv_b_proj, whose heads hold both, so it is taken whole.
_OTHER_PARTNERS = {
    "q_attn": ("c_attn",),
    "q_proj": ("kv_b_proj",),
    "q_b_proj": ("kv_b_proj",),
    "kv_b_proj": ("q_proj", "q_b_proj"),
}
QUERIES = frozenset(QUERY_AND_VALUE) | {"q_attn", "q_b_proj"}
VALUES = frozenset(QUERY_AND_VALUE.values()) | {"kv_b_proj"}

_STRIP_BYTES = 1 << 24


@dataclass(frozen=True)
class Target:
    """One matrix W (d×k) to factorize, d = out_features, k = in_features, and how to read it.

    module: the tensor's name without `.weight`; a part of a fused weight adds `:query` or `:value`; of a parameter of
        experts (model/experts.py) its name in the model and `:3`, the expert's number.
    kind: "query", "value", or the last part of any other name ("k_proj").
    shape: (d, k) of W, after orientation and slicing.
    dtype: the checkpoint's.
    read: W, contiguous, in its own dtype and memory. Raises CheckpointError if the file changed since it was opened.
    sha256: of the stored tensor's bytes; of the whole tensor for a part of it.
    hashes_values: the sha256 is that of the bytes of W as `read` returns it.
    blocks: W some rows at a time in order, the bytes that `sha256` is of; a block may be overwritten by the next one.
        None where they are not W's, rows are long, or reading so takes longer.
    unchanged: whether it still has a sha256 that was computed before; see `watch`.
    transposed: the tensor is stored as (in_features, out_features), as GPT-2's Conv1D does.
    dequantization: how W is computed from a quantized weight; "" for a plain one.
    rows: the rows of the whole W that this part covers, see model/fused.py; None for all of it.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(compare=False)
    sha256: Callable[[], str] = field(compare=False)
    transposed: bool = False
    dequantization: str = ""
    rows: Rows | None = None
    hashes_values: bool = False
    blocks: Callable[[], Iterator[Tensor]] | None = field(default=None, compare=False)
    unchanged: Callable[[str], bool] = field(default=lambda sha256: True, compare=False)


def find_targets(
    checkpoint: Checkpoint,
    target_modules: Collection[str] | str | None = None,
    rank_of: Callable[[str], int] | None = None,
    target_parameters: Collection[str] | None = None,
) -> list[Target]:
    """The matrices that `target_modules` and `target_parameters` select, in the order of the layers.

    target_modules:
        None: the query and value projection of every attention block. GPT-2's and Phi-3's fused weights yield one part
            for each, others a pattern of rows (model/fused.py). DeepSeek's latent attention: q_proj or
            q_b_proj, and kv_b_proj.
        a list: modules whose name is one of these, or ends in one after a dot.
        a string: a regular expression that matches the whole name.
        "all-linear": every linear layer but the output layer.
    rank_of: the rank that a module will have; "all-linear" leaves out, with a warning, matrices thinner than that.
    target_parameters: parameters of experts by their names in the model or endings of them, as in PEFT: a matrix for
        each expert. With them alone, and target_modules None, nothing else.

    Names may be those in the checkpoint or those that transformers gives the modules on loading, either with the base
    model's prefix (`bert.`), so what works in a `LoraConfig` works here.

    A target is a matrix that the model will load as a linear layer. Whatever transformers does not load (the layers for
    multi-token prediction), merges with others into one parameter (experts), or splits or permutes (nomic-bert's Wqkv),
    is left out with a warning.

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
    every = once_each(find_modules(checkpoint))
    architecture = next((module.architecture for module in every), None)
    experts = find_expert_parameters(checkpoint, architecture)
    rearranged = rearranged_experts(checkpoint, architecture)
    chosen = selected(checkpoint, experts, target_parameters or (), rearranged)
    matrices = [_expert(one, number) for one in chosen for number in range(len(one.stored))]
    if chosen and target_modules is None:
        return matrices
    modules = [module for module in every if module.left_out is None]
    left_out = [module for module in every if module.left_out is not None]
    named_all = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    if target_modules is None:
        targets = list(_query_and_value(modules, target, SimpleNamespace(**(checkpoint.config or {}))))
        left_out = [module for module in left_out if _is_default(module)]
    elif named_all:
        targets = [target(module) for module in modules if module.is_inner_linear]
        left_out = [module for module in left_out if module.form != "other" and not is_output_by_name(module.name)]
    else:
        selects = selector(target_modules)
        targets = [target(module) for module in modules if selects(module.aliases)]
        left_out = [module for module in left_out if selects(module.aliases)]
        require_each_selects(checkpoint, target_modules, modules, left_out)
    thin = [one for one in targets if rank_of and min(one.shape) < rank_of(one.module)] if named_all else []
    dropped = {one.module for one in thin}
    targets = [one for one in targets if one.module not in dropped]
    if not targets:
        raise nothing_found(checkpoint, modules, target_modules, left_out)
    parameters = {one.name for one in chosen}
    left_out = [module for module in left_out if _merged(module) not in parameters]
    fused = [one.name for one in experts if one not in chosen and one.is_fused] if named_all else []
    if fused:
        endings = sorted({".".join(name.split(".")[-2:]) for name in fused})
        warnings.warn(
            f"{checkpoint.path}: left out {some(fused)}: no linear layers but parameters of all experts; "
            f"target_parameters={endings} factorizes them",
            stacklevel=2,
        )
    if rearranged and named_all:
        warnings.warn(f"{checkpoint.path}: left out {some(rearranged)}: {REARRANGED}", stacklevel=2)
    if thin:
        shapes = f"{some([one.module for one in thin])}: {thin[0].shape[0]}×{thin[0].shape[1]} is thinner than the rank"
        warnings.warn(f"{checkpoint.path}: left out {shapes}", stacklevel=2)
    if in_proj := [
        one.module for one in targets if checkpoint.weights[f"{one.module.partition(':')[0]}.weight"].is_fused_attention
    ]:
        no_layer = "torch's MultiheadAttention reads this parameter itself, so no adapter can start from its factors"
        warnings.warn(f"{checkpoint.path}: {some(in_proj)}: {no_layer}", stacklevel=2)
    for reason in dict.fromkeys(module.left_out for module in left_out):
        names = [module.name for module in left_out if module.left_out == reason]
        warnings.warn(f"{checkpoint.path}: left out {some(names)}: {reason}", stacklevel=2)
    return targets + matrices


def _is_default(module: Module) -> bool:
    """Whether one that is left out would be a target by default, as far as its name tells."""
    last = last_part(module.name)
    is_rearranged = module.architecture is not None and module.name in module.architecture.rearranged
    return last in QUERIES | VALUES or (is_rearranged and FUSED.fullmatch(last) is not None)


def _merged(module: Module) -> str | None:
    return module.architecture.merged.get(module.name) if module.architecture else None


def tensors_of(
    target_modules: Collection[str] | str | None, target_parameters: Collection[str] | None = None
) -> Choose:
    """Which tensors of a checkpoint `find_targets` needs, judging by their names and config.json alone.

    At least those: what names cannot tell apart is included.
    """

    def choose(names: Collection[str], config: Mapping[str, Any] | None) -> Collection[str]:
        modules = {name: module_and_part(name, names)[0] for name in names}
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            return names
        architecture = describe(config, dict.fromkeys(modules.values())) if config else None
        selects = _by_default if target_modules is None else selector(target_modules)
        chosen = {module for module in set(modules.values()) if selects(aliases(module, architecture))}
        if target_parameters:
            chosen = chosen if target_modules is not None else set()
            live = {module: _parameter_name(module, architecture) for module in set(modules.values())}
            # A parameter stored as it is has no part of its own: its name is a module's and a parameter's.
            live |= {name: _parameter_name(name, architecture) for name in names}
            chosen |= {module for module, name in live.items() if is_selected(name, target_parameters)}
            return [name for name, module in modules.items() if module in chosen or name in chosen] or names
        # A selection that misses everything is refused, naming what is there.
        return [name for name, module in modules.items() if module in chosen] or names

    return choose


def _parameter_name(module: str, architecture: Architecture | None) -> str:
    if architecture is None:
        return module
    return architecture.merged.get(module) or architecture.live_name(module) or module


def _by_default(names: Collection[str]) -> bool:
    return any(last in QUERIES | VALUES or FUSED.fullmatch(last) for last in map(last_part, names))


def _query_and_value(modules: list[Module], target: Callable[..., Target], config: Any) -> Iterator[Target]:
    # transformers' names if it knows the module: they are more uniform than those in files.
    # Convolutions have such names too, of Janus's VQ model and of Squeezebert.
    linear = [module for module in modules if module.form != "other"]
    by_name = {module.layer.name if module.layer else module.name: module for module in linear}
    for name, module in by_name.items():
        block, last = name.rpartition(".")[0], last_part(name)
        partners = [query for query, value in QUERY_AND_VALUE.items() if value == last]
        if last in QUERY_AND_VALUE:
            partners.append(QUERY_AND_VALUE[last])
        partners += _OTHER_PARTNERS.get(last, ())
        if any(f"{block}.{partner}".removeprefix(".") in by_name for partner in partners):
            yield target(module)
        for part, rows in _parts(module, name, config).items():
            yield target(module, part, rows)


def _parts(module: Module, name: str, config: Any) -> Parts:
    """The rows of query and value in a fused weight; empty for any other."""
    if module.entry.is_fused_attention:
        # No adapter library takes it in transformers' models, so there it is none of the defaults.
        return {} if module.architecture else thirds(module.entry.shape[0])
    if len(module.entry.shape) != 2 or not FUSED.fullmatch(last_part(name)):
        return {}
    turned = module.form == "conv1d" and not module.entry.is_quantized
    k, d = module.entry.shape if turned else module.entry.shape[::-1]
    try:
        config = module.architecture.config if module.architecture else config
        return fused_parts(config, name, d, k, conv1d=module.form == "conv1d")
    except (CheckpointError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{module.path}: {error or 'config.json does not say how many heads there are'}"
        ) from error


def _target(
    checkpoint: Checkpoint,
    sha256: Callable[[str], str],
    module: Module,
    part: str | None = None,
    rows: Rows | None = None,
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
        raise TargetError(f"{where} is not a linear layer ({what}); leave it out of target_modules")
    if module.layer is not None and not module.shares_with_layers_alone:
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
    last = last_part(module.name)
    kind = part or ("query" if last in QUERIES else "value" if last in VALUES else last)
    tensor, shape = f"{module.name}.weight", (row_count(rows, d), k)
    hashes_values = not (entry.is_quantized or transposed or rows)
    return Target(
        module=f"{module.name}:{part}" if part else module.name,
        kind=kind,
        shape=shape,
        dtype=entry.dtype,
        read=partial(_read, checkpoint, tensor, shape, transposed, rows),
        sha256=partial(sha256, tensor),
        transposed=transposed,
        dequantization=entry.dequantization,
        rows=rows,
        hashes_values=hashes_values,
        blocks=blocks_of(entry.plain) if hashes_values and entry.plain else None,
        unchanged=watch((part.file for part in entry.stored.values()), partial(checkpoint.sha256, tensor)),
    )


def _expert(parameter: ExpertParameter, number: int) -> Target:
    return Target(
        module=f"{parameter.name}:{number}",
        kind=last_part(parameter.name),
        shape=parameter.shape,
        dtype=parameter.dtype,
        read=partial(parameter.read, number),
        sha256=partial(parameter.sha256, number),
        transposed=parameter.turned,
        dequantization=parameter.dequantization,
        hashes_values=True,
        unchanged=watch(parameter.files(number), partial(parameter.sha256, number)),
    )


def _read(checkpoint: Checkpoint, tensor: str, shape: tuple[int, int], transposed: bool, rows: Rows | None) -> Tensor:
    """W (d×k) from a stored tensor, transposed and cut out piece by piece; the peak is about W itself."""
    entry = checkpoint.weights[tensor]
    if not transposed and (rows is None or len(rows) == 2):
        return checkpoint.read(tensor, slice(*rows) if rows else slice(None))
    if not transposed and rows is not None:
        return _read_periodic(entry, rows)
    d, k = shape
    index = row_index(rows, entry.shape[1])
    W = torch.empty(d, k, dtype=entry.dtype)
    step = max(1, _STRIP_BYTES // (entry.shape[1] * entry.dtype.itemsize))
    for column in range(0, k, step):
        strip = checkpoint.read(tensor, slice(column, column + step))
        W[:, column : column + step] = strip[:, index].T
    return W


def _read_periodic(entry: StoredWeight, rows: Rows) -> Tensor:
    """The same rows of every period, a few periods at a time."""
    out_features, k = entry.shape
    period = rows[-1]
    count = rows[1] - rows[0]
    W = torch.empty(row_count(rows, out_features), k, dtype=entry.dtype)
    # A quantized weight may have to be unpacked completely for any of its rows.
    step = out_features if entry.is_quantized else max(1, _STRIP_BYTES // (period * k * entry.dtype.itemsize)) * period
    for first in range(0, out_features, step):
        strip = entry.read(slice(first, min(first + step, out_features)))
        start = first // period * count
        kept = strip[row_index(rows, len(strip))]
        W[start : start + len(kept)] = kept
    return W


def _dtype(entry: StoredWeight) -> str:
    return str(entry.dtype).removeprefix("torch.")
