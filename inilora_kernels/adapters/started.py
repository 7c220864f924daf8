"""lora_A and lora_B as modules that keep where they started: A0 and B0 travel with A and B.

In the delta form both together compute B(A − A0)x + (B − B0)A0x, so any layer that adds `lora_B(lora_A(x))`, PEFT's for
every kind of base and ours, is in the delta form without knowing. Nothing outside reads the weights in the forward
pass: FSDP and ZeRO may shard each of the two modules by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FactorFileError

# What ends the names of A0 and B0 in a state dict.
STARTS = ("delta_start", "residual_start")

# A cosine below which an A has not started from A0: random ones of rank 8 and 1,000 columns are within 0.03.
_UNRELATED = 0.1

# A cosine above which a weight was copied from one that started at A0, or trained since: five standard deviations of
# random ones as small as 4×32.
_NEAR = 0.5


# Which torchao's quantize_ leaves alone: a quantized A less A0 is neither computed nor what was learned.
class Started(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """A linear layer (out_features, in_features) without bias of its own, and a frozen copy of where it started.

    weight: the parameter to train, used as it is.
    initial: where it starts, of the same shape; kept in the weight's dtype and on its device, in a buffer named by the
        form, so that a whole state dict with R in it loads into no model with W.
    bias: lora_bias's, or None.
    persistent: whether `initial` is part of the state dict. PEFT's hotswap zeroes what it finds there and the incoming
        adapter lacks; with A0 = B0 = 0 the delta form is a plain LoRA, which that adapter is.

    A state dict may hold the weight alone, or the doubled one of `doubled`, which must have started at `initial`.
    """

    start_name: str
    axis: int
    # Of how many matrices, one after the other along `axis`, the weight is made: as many as a parameter has experts.
    blocks: int = 1

    def __init__(
        self, weight: nn.Parameter, initial: Tensor, bias: nn.Parameter | None = None, persistent: bool = False
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        # Not by assignment, which accelerate's init_empty_weights (low_cpu_mem_usage=True) turns to the meta device.
        self._parameters["weight"] = weight
        self._parameters["bias"] = bias
        self.register_buffer(self.start_name, initial.to(weight, copy=True), persistent)
        self._swapped = self._unseen = False

    @property
    def initial(self) -> Tensor:
        return self.get_buffer(self.start_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Started:
        """nn.Module._apply, by which `.to`, `.half()` and so on act, but no coarser dtype for what was trained.

        In 16 bits A − A0 would be rounded by the size of A, which is many times larger, and be lost without a word.
        """
        keeps = self._is_trained()

        def kept(tensor: Tensor) -> Tensor:
            return _not_coarser(fn(tensor), tensor) if keeps else fn(tensor)

        moved: Started = super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _is_trained(self) -> bool:
        weight, initial = self.weight.data, self.initial
        if type(weight) is not Tensor or weight.is_meta or initial.is_meta or weight.shape != initial.shape:
            return False
        return weight.dtype == initial.dtype and weight.device == initial.device and not torch.equal(weight, initial)

    def doubled(self, weight: Tensor) -> Tensor:
        """[A − A0; A0] or [B, B − B0], so that their product is BA − B0A0, and nothing cancels in it; see `difference`.

        A or B comes back from it to the rounding of the difference.
        """
        if weight.shape != self.initial.shape:
            return weight
        start = self.initial.to(weight)
        halves = (weight, weight - start) if self.axis else (weight - start, start)
        return torch.cat([self._each(half) for half in halves], dim=self.axis + 1).flatten(self.axis, self.axis + 1)

    def _each(self, weight: Tensor) -> Tensor:
        """The weight with one dimension more along `axis`, its blocks."""
        return weight.unflatten(self.axis, (self.blocks, -1))  # type: ignore[no-untyped-call, no-any-return]

    def swapped(self) -> bool:
        """Whether PEFT's hotswap has put a plain LoRA here, which started from nothing: then `initial` is zero.

        Hotswap takes the state dict before it swaps, so `initial` is looked at once after each time.
        """
        if self._unseen:
            self._swapped = not bool(self.initial.any())
            self._unseen = False
        return self._swapped

    def _save_to_state_dict(self, *args: Any) -> None:
        self._unseen = True
        super()._save_to_state_dict(*args)

    def require_loadable(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise FactorFileError if a state dict's weight has not started where this one did."""
        key = f"{prefix}weight"
        found = gathered(state_dict.get(key))
        if isinstance(found, Tensor) and self._is_doubled(found):
            weight, start = self._ends(found)
            if not _is_same(start, self.initial, weight):
                raise FactorFileError(
                    f"{key}: this adapter was trained from other factors than the model was started from, or its start "
                    f"was trained too, as PEFT alone does; start the model from the same factors, go on by load_delta, "
                    f"or load the adapter under another name, as the plain LoRA that it is"
                )
        elif f"{prefix}{self.start_name}" not in state_dict:
            self._require_related(found, key)
        if self.start_name not in self._non_persistent_buffers_set:
            self._require_own_start(gathered(state_dict.get(f"{prefix}{self.start_name}", self.initial)), key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        self.require_loadable(state_dict, prefix)
        key = f"{prefix}weight"
        found = state_dict.get(key)
        if isinstance(found, Tensor) and self._is_doubled(found):
            state_dict[key] = self._ends(found)[0].contiguous()
        # Checkpoints without it, such as those that hold A and B alone, are complete.
        if self.start_name not in self._non_persistent_buffers_set:
            state_dict.setdefault(f"{prefix}{self.start_name}", self.initial)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _is_doubled(self, found: Tensor) -> bool:
        return found.dim() == 2 and found.shape[self.axis] == 2 * self.initial.shape[self.axis]

    def _ends(self, doubled: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the start that `doubled` was made of."""
        rank = self.initial.shape[self.axis]
        halves = torch.split(self._each(doubled), rank // self.blocks, dim=self.axis + 1)
        one, other = (half.flatten(self.axis, self.axis + 1) for half in halves)
        return (one, one - other) if self.axis else (one + other, other)

    def _require_related(self, found: Any, key: str) -> None:
        """Raise FactorFileError if an A alone is nowhere near A0: a LoRA that has not started from these factors."""
        if self.axis or not isinstance(found, Tensor) or found.shape != self.initial.shape or found.is_meta:
            return
        if self._cosine(found) < _UNRELATED:
            raise FactorFileError(
                f"{key}: this adapter has not started from the factors that the model was started from; load it under "
                f"another name, as the plain LoRA that it is"
            )

    def resembles(self, weight: Tensor) -> bool:
        """Whether a weight of the same shape is near where this one started, as one copied from it is."""
        if weight.shape != self.initial.shape or weight.is_meta or type(weight.data) is not Tensor:
            return False
        return self._cosine(weight) > _NEAR

    def _cosine(self, weight: Tensor) -> float:
        one, other = weight.detach().float().flatten(), self.initial.float().flatten().to(weight.device)
        return float(F.cosine_similarity(one, other, dim=0))

    def _require_own_start(self, found: Tensor, key: str) -> None:
        """Raise FactorFileError if the base weight is R of other factors than a state dict says; zero: hotswapped."""
        if self.start_name == "delta_start" or found.is_meta or not found.any():
            return
        if _is_same(found, self.initial, found):
            return
        raise FactorFileError(
            f"{key}: this state dict was trained on the residual of other factors than the model was started from; "
            f"start the model from the same factors"
        )


def gathered(tensor: Any) -> Any:
    """A tensor that FSDP2 has sharded as a whole one, for which every process has to call this; else what was given."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def unwrapped(module: nn.Module) -> Started | None:
    """The Started in a module, since FSDP wraps each by itself; None where there is none."""
    return next((inner for inner in module.modules() if isinstance(inner, Started)), None)


def _is_same(stored: Tensor, initial: Tensor, weight: Tensor) -> bool:
    """Whether both are the same start, up to the rounding of √(scaling) and of the coarser of their dtypes.

    weight: the one whose difference from the start was stored, and rounded by its own size.
    """
    dtypes = [torch.finfo(one.dtype) for one in (stored, initial)]
    rtol = 4 * max(dtype.eps for dtype in dtypes)
    atol = 4 * max(dtype.eps * dtype.smallest_normal for dtype in dtypes)  # between float16's least numbers
    off = (stored.float() - initial.to(stored.device, torch.float32)).abs()
    return bool((off <= atol + rtol * (stored.float().abs() + weight.float().abs())).all())


def _not_coarser(moved: Tensor, tensor: Tensor) -> Tensor:
    """What a tensor has become, but in its own dtype where the new one has fewer digits."""
    if not (tensor.is_floating_point() and moved.is_floating_point()):
        return moved
    coarser = torch.finfo(moved.dtype).eps > torch.finfo(tensor.dtype).eps
    return tensor.to(moved.device) if coarser else moved


def _as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """The input of B in B's dtype: where only one of A and B is trained, a cast to 16 bits leaves them different."""
    return x if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


class StartedA(Started):
    """lora_A (r, in_features) of the residual form, whose forward pass is a LoRA's."""

    start_name, axis = "residual_start", 0


class StartedB(Started):
    """lora_B (out_features, r) of the residual form, whose forward pass is a LoRA's."""

    start_name, axis = "residual_start", 1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_as_weight(x, self.weight), self.weight, self.bias)


class DeltaA(StartedA):
    """lora_A of the delta form: x ↦ [(A − A0)x; A0x], twice as many features as A has rows."""

    start_name = "delta_start"

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape != self.initial.shape:  # swapped in by PEFT, of another rank
            return F.linear(x, self.weight)
        A0 = self.initial.to(self.weight.dtype)
        return F.linear(x, torch.cat([self.weight - A0, A0]))


class DeltaB(StartedB):
    """lora_B of the delta form: [u; v] ↦ Bu + (B − B0)v, and lora_bias where there is one."""

    start_name = "delta_start"

    def forward(self, x: Tensor) -> Tensor:
        x = _as_weight(x, self.weight)
        if self.weight.shape != self.initial.shape:
            return F.linear(x, self.weight, self.bias)
        B0 = self.initial.to(self.weight.dtype)
        return F.linear(x, torch.cat([self.weight, self.weight - B0], dim=1), self.bias)


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of BA − B0A0, of rank 2r and without cancellation: A' = [A − A0; A0] (2r, k), B' = [B, B − B0] (d, 2r).

    Of stacks (experts, r, k) and (experts, d, r) too.

    Where A = A0 and B = B0 their product is exactly 0. A0 and B0 are taken in the dtype of A and B, so this
    also holds for a model that was cast.

    >>> A, B = torch.randn(2, 5), torch.randn(4, 2)
    >>> A1, B1 = difference(A, B, A, B)
    >>> (B1 @ A1).abs().max()
    tensor(0.)
    """
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
    return torch.cat([A - A0, A0], dim=-2), torch.cat([B, B - B0], dim=-1)


def start_of(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A0 and B0 of what `difference` returned.

    >>> A, B, A0, B0 = torch.ones(2, 5), torch.ones(4, 2), torch.zeros(2, 5), torch.zeros(4, 2)
    >>> all(torch.equal(x, y) for x, y in zip(start_of(*difference(A, B, A0, B0)), (A0, B0)))
    True
    """
    B, moved = B.chunk(2, dim=-1)
    return A.chunk(2, dim=-2)[1], B - moved
