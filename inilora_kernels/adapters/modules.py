"""Which linear module of a model each matrix of a FactorSet belongs to, and the start its factors give it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FactorFileError, OptionError, TargetError
from ..factor_set import FactorSet
from ..factors import Factors
from ..model.architecture import architectures, names_on_loading
from ..model.experts import parameter_of_expert
from ..model.fused import row_count, row_index
from ..model.names import endings, match_names
from ..suggestions import some


@dataclass(frozen=True, eq=False)
class Start:
    """The factors that an adapter of one module starts from, float32: A (r, in_features), B (out_features, r), BA ≈ W.

    Of a parameter of E experts A is (E, r, in_features) and B (E, out_features, r).

    names: the matrices of the FactorSet that it comes from; several for a fused weight.
    """

    names: tuple[str, ...]
    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[-2])

    def scaled(self, scaling: float) -> tuple[Tensor, Tensor]:
        """(A/√s, B/√s), so that s·B'A' = BA. Dividing both by the same keeps balanced factors balanced.

        Raises OptionError if s is not positive and finite, or so large or small that A/√s or B/√s leaves float32.
        """
        if not (scaling > 0 and math.isfinite(scaling)):
            raise OptionError(f"scaling={scaling}: it must be a positive number; the paper's is 1")
        root = math.sqrt(scaling)
        scaled = []
        for factor in (self.A, self.B):
            largest = float(factor.abs().max())
            # Beyond these bounds, entries 2²⁶ times smaller or larger than the largest leave float32's range.
            if largest and not 2.0**-100 < largest / root < 2.0**100:
                raise OptionError(
                    f"scaling={scaling:g}: A and B of {self.names[0]}, divided by its root, leave float32's range; "
                    f"give a lora_alpha nearer to the rank"
                )
            scaled.append(factor / root)
        return scaled[0], scaled[1]


def module_of(name: str) -> str:
    """The module that a matrix of a FactorSet belongs to: its name without `:query` or `:value`, or an expert's number.

    >>> module_of("h.0.attn.c_attn:query")
    'h.0.attn.c_attn'
    """
    return name.partition(":")[0]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, quantized ones and GPT-2's Conv1D too; None for other modules."""
    if is_conv1d(module):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, which stores W as (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def find_starts(
    shapes: Mapping[str, tuple[int, ...]],
    factors: FactorSet,
    where: str,
    config: Mapping[str, Any] | None = None,
    partial: bool = False,
    fits: Callable[..., bool] | None = None,
    *,
    model: nn.Module | None = None,
) -> dict[str, Start]:
    """Return the start of each module that has factors, by the module's name in the model, in the FactorSet's order.

    shapes: (out_features, in_features) of the model's linear modules, by name; (experts, out_features, in_features) of
        parameters of experts.
    where: what messages call the model.
    config: the model's config.json, for modules to which transformers gives other names than the checkpoint.
    partial: every one of `shapes` has factors, but some factors may have no module.
    fits: fits(module, start) says whether a module is the one that this start is for, as far as its values tell. Asked
        where the model is a part of the checkpoint's, such as the text model of one for vision and language. Unless
        `partial`, fits(module, start, guessed=False) then says of each module found whether it can be.
    model: the live model, which knows the names of its own checkpoints best.

    Names in a checkpoint and in a model may differ by a prefix, `bert.` or `base_model.model.`, the same
    one for all. Two parts of one fused weight start one adapter together: their A stacked, each B in its
    own rows.

    Raises TargetError: a matrix has no module, two modules fit equally, or a shape differs. FactorFileError: factors
    hold NaN or Inf, or are of another model.
    """
    if not factors:
        raise TargetError(f"{where}: the factor set is empty; compute it again with `inilora approximate`")
    parts: dict[str, dict[str, Factors]] = {}
    for name, part in factors.items():
        if not (part.A.isfinite().all() and part.B.isfinite().all()):
            raise FactorFileError(f"{name}: its factors hold NaN or Inf; compute them again with `inilora approximate`")
        parts.setdefault(module_of(name), {})[name] = part
    if partial and config and not shapes.keys() <= parts.keys():
        parts |= _of_shared(parts, config)
    why = "merges, splits or permutes on loading"
    try:
        live_names = _live_names(list(parts), shapes, where, config, partial, model=model)
    except TargetError:
        live_names = _names_in_part(parts, shapes, fits, partial) if fits else {}
        if not live_names:
            raise
        why = "does not have"
    left_out = [module for module in parts if module not in live_names]
    if left_out and not partial:
        warnings.warn(
            f"{where}: left out the factors of {some(left_out, most=1)}, which it {why}; its own modules get adapters",
            stacklevel=3,
        )
    starts = {
        live_names[module]: _combine(its_parts, shapes[live_names[module]], f"{where}: {live_names[module]}")
        for module, its_parts in parts.items()
        if module in live_names
    }
    checked = {} if partial or fits is None else starts
    strange = [name for name, start in checked.items() if fits and not fits(name, start, guessed=False)]
    if strange:
        raise FactorFileError(
            f"{where}: {some(strange, most=1)} of its modules do not have the weight that the factors were computed "
            f"from ({starts[strange[0]].names[0]}); give the factors of this model, or the model that they are of"
        )
    return starts


def without(factors: FactorSet, left_out: Collection[str], warning: str, nothing_left: str) -> FactorSet:
    """The factors but some, with a warning to whoever called an export. Raises TargetError if none would be left."""
    if len(left_out) == len(factors):
        raise TargetError(nothing_left)
    warnings.warn(warning, stacklevel=5)
    return FactorSet({name: part for name, part in factors.items() if name not in left_out}, factors.options)


def _of_shared(parts: Mapping[str, dict[str, Factors]], config: Mapping[str, Any]) -> dict[str, dict[str, Factors]]:
    """The factors of a weight under the names of all modules that have it; the checkpoint names one."""
    return {
        other: parts[name]
        for architecture in architectures(config, list(parts))
        for name in parts
        if name in architecture.layers
        for other in architecture.layers[name].shared_with
        if other not in parts
    }


def _live_names(
    wanted: Sequence[str],
    available: Collection[str],
    where: str,
    config: Mapping[str, Any] | None,
    partial: bool,
    *,
    model: nn.Module | None,
) -> dict[str, str]:
    match = _match_part if partial else match_names
    try:
        return match(wanted, available, where)
    except TargetError:
        if own := _own_names(model, wanted, available):
            return own
        for architecture in architectures(config, wanted) if config else ():
            renamed = {architecture.layers[name].name: name for name in wanted if name in architecture.layers}
            renamed |= {name: name for name in wanted if name in architecture.parameter_names}
            if not renamed or (len(renamed) < len(wanted) and not partial):
                continue
            try:
                return {renamed[new]: live for new, live in match(list(renamed), available, where).items()}
            except TargetError:
                continue
        fused = next((one for one in wanted if one.endswith("in_proj") and _attention_of(one) in available), None)
        if fused and fused not in available:
            raise fused_attention(where, fused) from None
        raise


def _own_names(model: nn.Module | None, wanted: Sequence[str], available: Collection[str]) -> dict[str, str]:
    """The names under which a transformers model loads these modules, without those that it takes apart or together.

    Empty unless that is all of them: then they are another model's.
    """
    transformers: Any = sys.modules.get("transformers")
    if model is None or transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    own: Any = model
    names, converted = names_on_loading(own, wanted)
    names = {name: name for name in wanted if name in available} | names
    whole = all(name in converted or names.get(name) in available for name in wanted)
    return {name: live for name, live in names.items() if name not in converted} if whole else {}


def fused_attention(where: str, module: str) -> TargetError:
    """The refusal of an adapter for in_proj_weight."""
    return TargetError(
        f"{where}: {module} cannot get an adapter: it is in_proj_weight of torch's MultiheadAttention, which reads "
        f"that parameter and calls no layer; make the factors again without it, or convert the model to one whose "
        f"projections are layers (transformers' CLIPModel for open_clip)"
    )


def _attention_of(in_proj: str) -> str:
    """The one layer that torch's MultiheadAttention has next to its in_proj_weight."""
    return in_proj.removesuffix("in_proj") + "out_proj"


def _names_in_part(
    parts: Mapping[str, Mapping[str, Factors]],
    shapes: Mapping[str, tuple[int, ...]],
    fits: Callable[[str, Start], bool],
    every: bool,
) -> dict[str, str]:
    """The names in a model that is a part of the checkpoint's: what remains of the checkpoint's names after one prefix.

    Empty unless there is exactly one prefix by which each module has the shape and the values that its factors say.
    every: whether all of `shapes` must be named.
    """
    by_prefix: dict[str, dict[str, str]] = {}
    for module in parts:
        for end in endings(module):
            if end in shapes:
                by_prefix.setdefault(module.removesuffix(end), {})[module] = end

    def fit(module: str, live: str) -> bool:
        try:
            return fits(live, _combine(parts[module], shapes[live], live))
        except TargetError:
            return False

    found = [
        names
        for names in by_prefix.values()
        if (len(names) == len(shapes) or not every) and all(fit(*pair) for pair in names.items())
    ]
    return found[0] if len(found) == 1 else {}


def _match_part(wanted: Sequence[str], available: Collection[str], where: str) -> dict[str, str]:
    """Like `match_names`, where some of the wanted names may be missing."""
    try:
        return {name: live for live, name in match_names(list(available), wanted, where).items()}
    except TargetError as error:
        known = frozenset(wanted)
        without = [name for name in available if name not in known]
        if len(without) in (0, len(available)):
            raise
        strange = next((name for name in wanted if name not in available), None)
        raise TargetError(
            f"{where}: {f'it has no linear module {strange}, for which there are factors, and ' if strange else ''}"
            f"{some(without, most=1)} of its modules have no factors; give the factors that it "
            f"started from"
        ) from error


def _combine(parts: Mapping[str, Factors], shape: tuple[int, ...], where: str) -> Start:
    if len(shape) == 3:
        return _stack(parts, shape, where)
    out_features, in_features = shape
    blocks = []
    for name, part in parts.items():
        fits = part.rows is None or (
            part.rows[1] <= out_features and (len(part.rows) == 2 or out_features % part.rows[2] == 0)
        )
        if not fits or part.A.shape[1] != in_features or part.B.shape[0] != row_count(part.rows, out_features):
            raise TargetError(
                f"{where} is {out_features}×{in_features}, but {name} has A {tuple(part.A.shape)} and "
                f"B {tuple(part.B.shape)}{f' for rows {part.rows}' if part.rows else ''}; use the factors of this model"
            )
        block = torch.zeros(out_features, part.rank, dtype=torch.float32, device=part.B.device)
        block[row_index(part.rows, out_features)] = part.B
        blocks.append(block)
    return Start(tuple(parts), torch.cat([part.A for part in parts.values()]), torch.cat(blocks, dim=1))


def _stack(parts: Mapping[str, Factors], shape: tuple[int, ...], where: str) -> Start:
    """The factors of all experts of a parameter, of which each has to have some, of one rank."""
    experts, out_features, in_features = shape
    numbers = [int(name.rpartition(":")[2]) for name in parts if parameter_of_expert(name)]
    if sorted(numbers) != list(range(experts)):
        raise TargetError(
            f"{where} has {experts} experts, and there are factors for {len(numbers)}; use the factors of this model, "
            f"of all of its experts"
        )
    ordered = [parts[f"{module_of(next(iter(parts)))}:{number}"] for number in range(experts)]
    odd = next((name for name, part in parts.items() if part.rank != ordered[0].rank), None)
    if odd is not None:
        raise TargetError(
            f"{where}: its experts have factors of rank {ordered[0].rank}, but {odd} of {parts[odd].rank}; PEFT gives "
            f"all experts of a parameter one rank: compute them with a rank, not with a share of the energy"
        )
    A, B = torch.stack([part.A for part in ordered]), torch.stack([part.B for part in ordered])
    if A.shape[2] != in_features or B.shape[1] != out_features:
        raise TargetError(
            f"{where} has experts of {out_features}×{in_features}, but their factors are of {B.shape[1]}×{A.shape[2]}; "
            f"use the factors of this model"
        )
    return Start(tuple(parts), A, B)
