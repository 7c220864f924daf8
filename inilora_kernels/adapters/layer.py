"""The adapter as a PyTorch layer, in two forms that are equal in exact arithmetic.

    delta      y = Wx + s(BA − B0A0)x       W stays as it is
    residual   y = Rx + sBAx                R = W − sB0A0, rounded to W's dtype

In the delta form the difference is taken between the factors, before anything is multiplied:

    BA − B0A0 = B(A − A0) + (B − B0)A0 = [B, B − B0] [A − A0; A0]

As long as A = A0 and B = B0 both differences are exactly 0, so the layer returns the base layer's output in
any dtype, by any kernel; afterwards the rounding error is relative to what training changed, not to BA,
which is many times larger. The gradients are those of the residual form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..choices import Form
from ..errors import WeightError
from .modules import is_conv1d, linear_shape
from .started import DeltaA, DeltaB, StartedA, StartedB, difference
from .weights import device_of, require_own_weight


class LoRALinear(nn.Module):
    """A linear layer and its adapter.

    base_layer: an nn.Linear, quantized or not, or transformers' Conv1D; frozen.
    A: (r, in_features), B: (out_features, r): where the adapter starts, already divided by √scaling.
    form: "delta" or "residual"; see the top of this module.
    dropout: probability for the adapter's input. In the delta form step 0 is exact even so; in the residual form,
        dropout in training drops part of W itself.

    A and B are float32 whatever the base's dtype, and so is the adapter's arithmetic outside autocast; the
    sum is rounded once to the dtype of the base's output. `weight` and `bias` are the base layer's, for code that asks
    for their dtype. A0 and B0 are buffers that the state dict leaves out.

    >>> base = nn.Linear(3, 2, dtype=torch.bfloat16)
    >>> x = torch.randn(5, 3, dtype=torch.bfloat16)
    >>> layer = LoRALinear(base, A=torch.randn(1, 3), B=torch.randn(2, 1))
    >>> torch.equal(layer(x), base(x))
    True
    >>> list(layer.state_dict())
    ['lora_A.weight', 'lora_B.weight', 'weight', 'bias']
    """

    def __init__(
        self,
        base_layer: nn.Module,
        A: Tensor,
        B: Tensor,
        form: Form = "delta",
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.form = form
        self.scaling = scaling
        self.merged = False
        shape = linear_shape(base_layer)
        assert shape is not None
        self.out_features, self.in_features = shape
        device = device_of(base_layer)
        of_A, of_B = (DeltaA, DeltaB) if form == "delta" else (StartedA, StartedB)
        self.lora_A = of_A(nn.Parameter(A.to(device, copy=True)), A)
        self.lora_B = of_B(nn.Parameter(B.to(device, copy=True)), B)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # The original weight, on the CPU, while another is in its place, so that W comes back bit for bit.
        self._original: Tensor | None = None
        if form == "residual":
            self._put_weight(self._residual())

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.base_layer, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Wx, or as at the top of this module; x (…, in_features), y (…, out_features)."""
        y: Tensor = self.base_layer(x)
        if self.merged:
            return y
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        update: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        total: Tensor = y + self.scaling * update
        return total.to(y.dtype)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **options: Any) -> Any:
        """A and B, and the base layer's tensors under the plain layer's names, with W + s(BA − B0A0) in W's place.

        Programs that save a model without knowing of adapters write this, and the plain model loads it as trained.
        Loaded back here, A and B count, and the base stays, unless it is unfrozen. The base layer's own names
        (`base_layer.…`) remain where W cannot be changed, quantized, sharded or offloaded, and with `keep_vars`.
        """
        state_dict = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **options)
        if keep_vars or not self.holds_weight():
            return state_dict
        for name in self.base_layer.state_dict():
            state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}base_layer.{name}")
        state_dict[f"{prefix}weight"] = self._weight() if self.merged else self._add(self._unchanged(), self.delta())
        return state_dict

    def trained(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W + s(BA − B0A0), of a base weight, A and B that were taken from this layer's state and are whole there."""
        if self.merged:
            return weight
        if self.form == "delta":
            A, B = difference(A, B, self.lora_A.initial.to(A), self.lora_B.initial.to(B))
        update = (self.scaling * (B.float() @ A.float())).to(weight.device)
        return self._add(weight, update)

    def holds_weight(self) -> bool:
        """Whether the base weight and A are whole matrices in memory, so that W + s(BA − B0A0) can be written."""
        try:
            require_own_weight(self.base_layer, "", "")
        except WeightError:
            return False
        return type(self.lora_A.weight.data) is Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        found = state_dict.pop(f"{prefix}weight", None)
        if found is not None:
            ends: list[Any] = [state_dict.get(f"{prefix}lora_{side}.weight") for side in "AB"]
            error = self._misfit(found, *ends)
            if error:
                others[-1].append(f"{prefix}weight {error}")
            trains_base = not error and self._is_unfrozen() and self.holds_weight()
            state_dict[f"{prefix}base_layer.weight"] = self._base_of(found, *ends) if trains_base else self.weight
            for name in self.base_layer.state_dict().keys() & {key.removeprefix(prefix) for key in state_dict}:
                state_dict[f"{prefix}base_layer.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _misfit(self, found: Tensor, A: Tensor | None, B: Tensor | None) -> str | None:
        """Why a stored W + s(BA − B0A0) is not that of this layer's W, A0 and B0; None if it is."""
        if A is None or B is None:
            return "comes without A and B, from a plain model; load it before `attach`"
        if self.merged:
            return "cannot be loaded into a merged layer; call `unmerge` first"
        if not self.holds_weight() or A.shape != self.lora_A.weight.shape or B.shape != self.lora_B.weight.shape:
            return None  # what follows says so
        started = (self.lora_A.initial.to(A), self.lora_B.initial.to(B))
        if self._is_unfrozen():
            return None
        A, B = difference(A, B, *started)
        update = self.scaling * (B.float() @ A.float())
        W = self._unchanged().to(update.device)
        expected = self._add(W, update).float()
        off = float((found.to(update.device).float() - expected).norm())
        # W's rounding, and half for averaged state dicts, whose A and B have not the averaged product. Other factors
        # are off by the difference of two B0A0, of which the update here consists then.
        if off <= torch.finfo(W.dtype).eps * float(expected.norm()) + 0.5 * float(update.norm()):
            return None
        return (
            "was trained from other factors, or on another base, or with it; attach the factors that it started from, "
            "and unfreeze what was trained besides"
        )

    def _is_unfrozen(self) -> bool:
        """Whether the base weight is trained, too."""
        return self.weight is not None and self.weight.requires_grad

    def _base_of(self, found: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The base weight, W or R, with which A and B make a stored W + s(BA − B0A0)."""
        if A.shape != self.lora_A.weight.shape or B.shape != self.lora_B.weight.shape:
            return self._weight()  # what follows says so
        if self.form == "delta":
            A, B = difference(A, B, self.lora_A.initial.to(A), self.lora_B.initial.to(B))
        return self._add(found, -self.scaling * (B.float() @ A.float()).to(found.device))

    @torch.no_grad()
    def learned(self) -> tuple[Tensor, Tensor]:
        """[A − A0; A0] (2r, in_features) and [B, B − B0] (out_features, 2r), whose product, times s, `delta` is."""
        return difference(self.lora_A.weight, self.lora_B.weight, self.lora_A.initial, self.lora_B.initial)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s(BA − B0A0) (out_features, in_features), float32: what training has added to W."""
        A, B = self.learned()
        return self.scaling * (B.float() @ A.float())

    def merge(self) -> None:
        """Put W + s(BA − B0A0), summed in float32, into the base layer, which from then on does all the work.

        Raises WeightError where the base layer is quantized, sharded or offloaded.
        """
        if self.merged:
            return
        require_own_weight(self.base_layer, "merge", "`inilora convert` makes an adapter to load next to it")
        W = self._unchanged()
        if self._is_trained_residual():
            self._original = W.to("cpu", copy=True)
        self._put_weight(self._add(W, self.delta()))
        self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if not self.merged:
            return
        self._restore()
        self.merged = False
        if self.form == "residual":
            self._put_weight(self._residual())

    def restored_base_layer(self) -> nn.Module:
        """The base layer with its weight as it was before the adapter, bit for bit."""
        self._restore()
        return self.base_layer

    @torch.no_grad()
    def _residual(self) -> Tensor:
        return self._add(self._weight(), -self._started())

    def _started(self) -> Tensor:
        """sB0A0, float32."""
        return self.scaling * (self.lora_B.initial.float() @ self.lora_A.initial.float())

    def _add(self, weight: Tensor, update: Tensor) -> Tensor:
        oriented = update.T if is_conv1d(self.base_layer) else update
        return (weight.float() + oriented).to(weight.dtype).contiguous()

    def _weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight.data  # type: ignore[assignment]
        return weight

    def _unchanged(self) -> Tensor:
        """W as it was before the adapter, or as it was trained since, by itself."""
        if self._original is None:
            return self._weight()
        if self._is_trained_residual():
            return self._add(self._weight(), self._started())
        return self._original.to(self._weight())

    def _is_trained_residual(self) -> bool:
        """Whether R is there and may have been trained, so that W is no longer what it was computed from."""
        return self.form == "residual" and not self.merged and self._is_unfrozen()

    def _put_weight(self, weight: Tensor) -> None:
        if self._original is None:
            self._original = self._weight().to("cpu", copy=True)
        self.base_layer.weight.data = weight

    def _restore(self) -> None:
        if self._original is not None:
            self.base_layer.weight.data = self._original.to(self._weight())
            self._original = None
