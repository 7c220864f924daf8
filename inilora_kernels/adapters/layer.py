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

import torch
from torch import Tensor, nn

from ..choices import Form
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
    sum is rounded once to the dtype of the base's output. They alone are in the state dict; A0 and B0 are buffers that
    it leaves out. `weight` and `bias` are the base layer's, for code that asks for their dtype.

    >>> base = nn.Linear(3, 2, dtype=torch.bfloat16)
    >>> x = torch.randn(5, 3, dtype=torch.bfloat16)
    >>> layer = LoRALinear(base, A=torch.randn(1, 3), B=torch.randn(2, 1))
    >>> torch.equal(layer(x), base(x))
    True
    >>> list(layer.state_dict())
    ['base_layer.weight', 'base_layer.bias', 'lora_A.weight', 'lora_B.weight']
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

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s(BA − B0A0) (out_features, in_features), float32: what training has added to W."""
        A, B = difference(self.lora_A.weight, self.lora_B.weight, self.lora_A.initial, self.lora_B.initial)
        return self.scaling * (B.float() @ A.float())

    def merge(self) -> None:
        """Put W + s(BA − B0A0), summed in float32, into the base layer, which from then on does all the work.

        Raises WeightError where the base layer is quantized, sharded or offloaded.
        """
        if self.merged:
            return
        require_own_weight(self.base_layer, "merge", "`inilora convert` makes an adapter to load next to it")
        original = self._weight() if self._original is None else self._original.to(self._weight())
        self._put_weight(self._add(original, self.delta()))
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
        return self._add(self._weight(), -self.scaling * (self.lora_B.initial.float() @ self.lora_A.initial.float()))

    def _add(self, weight: Tensor, update: Tensor) -> Tensor:
        oriented = update.T if is_conv1d(self.base_layer) else update
        return (weight.float() + oriented).to(weight.dtype).contiguous()

    def _weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight.data  # type: ignore[assignment]
        return weight

    def _put_weight(self, weight: Tensor) -> None:
        if self._original is None:
            self._original = self._weight().to("cpu", copy=True)
        self.base_layer.weight.data = weight

    def _restore(self) -> None:
        if self._original is not None:
            self.base_layer.weight.data = self._original.to(self._weight())
            self._original = None
