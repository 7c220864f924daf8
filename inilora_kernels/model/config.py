"""config.json: read, and refused where it says what no model has.

transformers builds as many layers as it is told. It may take a negative count for none, and does not end at 10⁹.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.reading import MOST_JSON, json_object, read_bytes
from ..storage.schema import ModelConfig, parse

# Fields that hold a number of something, or a list or a dict with one for each layer, stage or part.
_COUNT = re.compile(
    r"(num|n)_(\w+_)?(layers?|experts?|heads?|labels?|blocks?|stages?)|(en|de)coder_(layers|attention_heads)"
)
_SIZE = re.compile(r"(hidden|intermediate|vocab)_size|head_dim|n_embd|d_model|d_ff")
# Others like them, whose numbers may have another meaning, such as the place of a layer counted from the end.
_SIMILAR = re.compile(r".*(layers?|experts?|depths?|heads?|labels?|blocks?|stages?)")
# Without these there is nothing to factorize; a part of a model, its vision tower say, may have none.
_NEVER_ZERO = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head"),
    *("hidden_size", "n_embd", "d_model"),
}
_MOST_COUNTED, _MOST_SIZE = 1_000_000, 2**31


def read_config(file: Path) -> dict[str, Any]:
    """A model's config.json. Raises CheckpointError, naming the field, also for counts and sizes that no model has."""
    stored = read_bytes(file, most=MOST_JSON)
    config = json_object(stored, file)
    require_counts(config, file)
    parse(ModelConfig, stored, str(file), CheckpointError)
    return config


def require_counts(config: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError if a count or a size in a config is one that no model has."""
    for name in _NEVER_ZERO & config.keys():
        if config[name] == 0:
            raise _refusal(file, name, config[name])
    _check(config, file, "")


def _check(content: Any, file: Path, name: str) -> None:
    size, count = _SIZE.fullmatch(name), _COUNT.fullmatch(name)
    if isinstance(content, Mapping):
        for key, value in content.items():
            _check(value, file, name if size or count else str(key))
    elif isinstance(content, (list, tuple)):
        for value in content:
            _check(value, file, name)
    elif content is not None:
        most = _MOST_SIZE if size else _MOST_COUNTED
        if size or count:
            # A bool is an int to Python.
            possible = type(content) is int and 0 <= content <= most
        else:
            possible = not (isinstance(content, (int, float)) and content > most and _SIMILAR.fullmatch(name))
        if not possible:
            raise _refusal(file, name, content)


def _refusal(file: Path, name: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{file}: {name} is {repr(value)[:20]}, which no model has; download config.json again")
