"""What a selection of target modules that misses is told: which names select nothing, and what there is instead."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from ..errors import TargetError, WeightError
from ..suggestions import did_you_mean, did_you_mean_names, some
from .checkpoint import Checkpoint
from .fused import FUSED
from .modules import Module, last_part, selector, unused


def require_each_selects(
    checkpoint: Checkpoint, target_modules: Collection[str] | str, loaded: list[Module], left_out: list[Module]
) -> None:
    """Raise TargetError, or warn, if a name in `target_modules` selects nothing, or nothing that can be a target."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for name in unused(target_modules, loaded):
        selects = selector(name if isinstance(target_modules, str) else [name])
        refused = next((module for module in left_out if selects(module.aliases)), None)
        if refused is not None:
            others = [other for other in names if other != name]
            raise TargetError(
                f"{checkpoint.path}: {name} selects only modules like {refused.name}, and {refused.left_out}; "
                f"leave {name} out of target_modules{f': {others}' if others else ''}"
            )
        if len(names) > 1:
            endings = {last_part(module.name) for module in loaded if module.is_inner_linear}
            problem = f"{checkpoint.path}: {name!r} in target_modules selects nothing{did_you_mean(name, endings)}"
            if did_you_mean(name, endings):
                raise TargetError(f"{problem}; names here end in {', '.join(sorted(endings))}")
            warnings.warn(problem, stacklevel=3)  # PEFT accepts a list that is meant for several models


def nothing_found(
    checkpoint: Checkpoint,
    modules: list[Module],
    target_modules: Collection[str] | str | None,
    left_out: list[Module],
) -> TargetError | WeightError:
    """The error for a selection of none of these modules. left_out: what it selects that can be no target."""
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
    known = f"{', '.join(linear[:4])}; they end in {', '.join(sorted({last_part(name) for name in linear}))}"
    there = f"linear layers here: {known}" if linear else "it has no linear layers"
    fused = next((module.name for module in modules if _is_fused(module)), None)
    if target_modules is None and left_out:
        what = f"query and value are in {some([module.name for module in left_out])}, and {left_out[0].left_out}"
        return TargetError(f"{checkpoint.path}: {what}. In target_modules {how}; {there}")
    if target_modules is None and fused:
        return TargetError(
            f"{checkpoint.path}: query and value are fused in {fused}, in a layout that is not known, so neither can "
            f"be cut out. Name the modules in target_modules, such as "
            f'["{last_part(fused)}"] for the whole fused weights'
        )
    asked = "no query and value projections found" if target_modules is None else "nothing selected"
    shown = "" if target_modules is None else f" by target_modules={target_modules!r}"
    named_all = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    near = "" if named_all else did_you_mean_names(target_modules, {"all-linear", *map(last_part, linear)})
    return TargetError(f"{checkpoint.path}: {asked}{shown}{near}; {there}. In target_modules {how}")


def _is_fused(module: Module) -> bool:
    """Whether it holds queries and values by its name; Mamba's in_proj, of other shapes, holds neither."""
    last, shape = last_part(module.name), module.entry.shape
    return FUSED.fullmatch(last) is not None and (last != "in_proj" or shape[0] == 3 * shape[-1])
