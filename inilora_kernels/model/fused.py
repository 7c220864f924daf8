"""Fused projections: which rows of a weight of queries, keys and values together are the queries and the values.

Rows are given as (start, stop), one range, or as (start, stop, period): those from start to stop of every `period`
rows, which is how architectures that mix heads store them. GPT-NeoX with 2 heads of 4, for example:

    row      0–3  4–7  8–11 | 12–15 16–19 20–23        query (0, 4, 12), value (8, 12, 12)
    holds    q₀   k₀   v₀   | q₁    k₁    v₁
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError

Rows: TypeAlias = tuple[int, int] | tuple[int, int, int]
Parts: TypeAlias = dict[str, Rows]

FUSED = re.compile(r"c_attn|query_key_value|W?qkv(_proj)?|wqkv|attn_qkv|W_pack|in_proj")


def row_count(rows: Rows | None, out_features: int) -> int:
    """How many rows this is.

    >>> row_count((0, 4, 12), 24), row_count((4, 10), 24), row_count(None, 24)
    (8, 6, 24)
    """
    if rows is None:
        return out_features
    count = rows[1] - rows[0]
    return count if len(rows) == 2 else count * (out_features // rows[2])


def row_index(rows: Rows | None, out_features: int) -> slice | Tensor:
    """An index for these rows of a tensor (out_features, …): W[row_index(rows, len(W))].

    >>> row_index((2, 4, 6), 12)
    tensor([2, 3, 8, 9])
    """
    if rows is None:
        return slice(None)
    if len(rows) == 2:
        return slice(*rows)
    start, stop, period = rows
    return (torch.arange(0, out_features, period)[:, None] + torch.arange(start, stop)).flatten()


def fused_parts(config: Any, name: str, out_features: int, in_features: int, *, conv1d: bool = False) -> Parts:
    """The rows of query and value in a fused weight; empty for a weight that is not fused, or not in a known layout.

    config: transformers' config of the model, or config.json's values as attributes; None without one.
    name: of the module. conv1d: whether it is transformers' Conv1D.

    Raises CheckpointError if the number of rows contradicts the config.
    """
    last = name.rpartition(".")[2]
    if conv1d and last in _CONV1D:
        return _CONV1D[last](name, out_features)
    model_type = getattr(config, "model_type", None)
    layout = _LAYOUTS.get((str(model_type), last))
    if layout is not None:
        return layout(config, name, out_features)
    # timm's configs do not say how a model is built; all its blocks are alike.
    if last == "qkv" and name.endswith("attn.qkv") and out_features == 3 * in_features:
        return thirds(out_features)
    return {}


def _gpt2(name: str, d: int) -> Parts:
    """Queries, keys, values; a cross-attention's holds keys and values only, as its queries are in q_attn."""
    return {"value": (d // 2, d)} if "crossattention" in name else thirds(d)


def thirds(d: int) -> Parts:
    """All queries, all keys, all values, as many of each."""
    return {"query": (0, d // 3), "value": (2 * d // 3, d)}


def _in_order(config: Any, name: str, d: int) -> Parts:
    """All queries, then all keys, then all values."""
    return _queries_first(config, name, d, _key_value_heads(config))


def _queries_first(config: Any, name: str, d: int, groups: int) -> Parts:
    heads = _heads(config)
    size = _head_size(name, d, heads + 2 * groups)
    return {"query": (0, heads * size), "value": (d - groups * size, d)}


def _by_head(config: Any, name: str, d: int) -> Parts:
    """Query, key and value of a head, then those of the next."""
    size = _head_size(name, d, 3 * _heads(config))
    return {"query": (0, size, 3 * size), "value": (2 * size, 3 * size, 3 * size)}


def _by_group(config: Any, name: str, d: int) -> Parts:
    """The queries of a group of heads, their key and their value, then the next group."""
    heads, groups = _heads(config), _key_value_heads(config)
    size = _head_size(name, d, heads + 2 * groups)
    own, period = heads // groups, (heads // groups + 2) * size
    return {"query": (0, own * size, period), "value": ((own + 1) * size, period, period)}


def _falcon(config: Any, name: str, d: int) -> Parts:
    if config.new_decoder_architecture:
        return _by_group(config, name, d)
    return _queries_first(config, name, d, 1) if config.multi_query else _by_head(config, name, d)


def _bigcode(config: Any, name: str, d: int) -> Parts:
    return _queries_first(config, name, d, 1) if config.multi_query else _by_head(config, name, d)


def _codegen(config: Any, name: str, d: int) -> Parts:
    """Four parts, as it was trained on four cores, each with its queries, values and keys, in that order."""
    size = _head_size(name, d, 12)
    return {"query": (0, size, 3 * size), "value": (size, 2 * size, 3 * size)}


def _chatglm(config: Any, name: str, d: int) -> Parts:
    groups = config.multi_query_group_num if getattr(config, "multi_query_attention", False) else _heads(config)
    return _queries_first(config, name, d, groups)


def _heads(config: Any) -> int:
    return int(
        next(getattr(config, name) for name in ("num_attention_heads", "n_head", "n_heads") if hasattr(config, name))
    )


def _key_value_heads(config: Any) -> int:
    attention = getattr(config, "attn_config", None)
    names = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
    found = (getattr(one, name, None) for one in (config, attention) for name in names)
    return int(next((count for count in found if count), _heads(config)))


def _head_size(name: str, d: int, parts: int) -> int:
    size, rest = divmod(d, parts)
    if rest:
        raise CheckpointError(
            f"{name} has {d} rows, which the {parts} heads of queries, keys and values do not divide; config.json and "
            f"weights do not belong together"
        )
    return size


# Of a Conv1D, by the last part of the module's name: GPT-2 and the models built from its blocks.
_CONV1D: dict[str, Callable[[str, int], Parts]] = {"c_attn": _gpt2}

# Of a linear layer, by model_type and the last part of the module's name. What is missing is refused, not guessed.
_LAYOUTS: dict[tuple[str, str], Callable[[Any, str, int], Parts]] = {
    ("phi3", "qkv_proj"): _in_order,
    ("phi4_multimodal", "qkv_proj"): _in_order,
    ("modernbert", "Wqkv"): _in_order,
    ("mpt", "Wqkv"): _in_order,
    ("dbrx", "Wqkv"): _in_order,
    ("baichuan", "W_pack"): _in_order,
    ("chatglm", "query_key_value"): _chatglm,
    ("internlm2", "wqkv"): _by_group,
    ("gpt_neox", "query_key_value"): _by_head,
    ("gpt_neox_japanese", "query_key_value"): _by_head,
    ("bloom", "query_key_value"): _by_head,
    ("persimmon", "query_key_value"): _by_head,
    ("deberta", "in_proj"): _by_head,
    ("falcon", "query_key_value"): _falcon,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("codegen", "qkv_proj"): _codegen,
}
