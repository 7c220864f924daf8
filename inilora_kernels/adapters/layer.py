"""The adapter as a PyTorch layer, in two forms that are equal in exact arithmetic.

    delta      y = Wx + s(BA − B0A0)x       W stays as it is
    residual   y = Rx + sBAx                R = W − sB0A0, rounded to W's dtype

In the delta form the difference is taken between the factors, before anything is multiplied:

    BA − B0A0 = B(A − A0) + (B − B0)A0 = [B, B − B0] [A − A0; A0]

As long as A = A0 and B = B0 both differences are exactly 0, so the layer gives the base layer's output in
any dtype, by any kernel; afterwards the rounding error is relative to what training changed, and not to BA,
which is many times larger. The gradients are those of the residual form.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, TargetError, WeightError
from ..factor_set import FactorSet
from .modules import Start, find_starts, is_conv1d, linear_shape

Form = Literal["delta", "residual"]
Model = TypeVar("Model", bound=nn.Module)

# What torch.compile and activation checkpointing put into module names; DDP puts "module" before them.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_FROZEN = "_inilora_trained_before"


class LoRALinear(nn.Module):
    """A linear layer and its adapter.

    base_layer: an nn.Linear, quantized or not, or transformers' Conv1D; frozen.
    A: (r, in_features), B: (out_features, r): where the adapter starts, already divided by √scaling.
    form: "delta" or "residual", as at the head of this module.
    dropout: probability for the adapter's input. In the delta form step 0 is exact with it too; in the residual form,
        during training, it drops a part of W itself.

    A and B are float32 whatever the base's dtype, and so is the adapter's arithmetic outside autocast; the
    sum is rounded once to the dtype of the base's output. Only they are in the state dict; A0 and B0 are
    buffers that it leaves out.

    >>> base = nn.Linear(3, 2, dtype=torch.bfloat16)
    >>> x = torch.randn(5, 3, dtype=torch.bfloat16)
    >>> layer = LoRALinear(base, A=torch.randn(1, 3), B=torch.randn(2, 1))
    >>> torch.equal(layer(x), base(x))
    True
    >>> list(layer.state_dict())
    ['base_layer.weight', 'base_layer.bias', 'lora_A.weight', 'lora_B.weight']
    """

    initial_A: Tensor
    initial_B: Tensor

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
        device = _device(base_layer)
        self.lora_A = _linear(A.to(device, copy=True))
        self.lora_B = _linear(B.to(device, copy=True))
        self.register_buffer("initial_A", A.to(device, copy=True), persistent=False)
        self.register_buffer("initial_B", B.to(device, copy=True), persistent=False)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # The weight as it was, on the CPU, while another stands in its place: W comes back bit for bit.
        self._original: Tensor | None = None
        if form == "residual":
            self._put_weight(self._residual())

    def forward(self, x: Tensor) -> Tensor:
        """Wx, or what the head of this module says; x (…, in_features), y (…, out_features)."""
        y: Tensor = self.base_layer(x)
        if self.merged:
            return y
        A, B = self.lora_A.weight, self.lora_B.weight
        if self.form == "delta":
            A, B = difference(A, B, self.initial_A, self.initial_B)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        update = F.linear(F.linear(self.lora_dropout(x), A), B)
        return (y + self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s(BA − B0A0) (out_features, in_features), float32: what training has added to W."""
        A, B = difference(self.lora_A.weight, self.lora_B.weight, self.initial_A, self.initial_B)
        return self.scaling * (B.float() @ A.float())

    def merge(self) -> None:
        """Put W + s(BA − B0A0), summed in float32, into the base layer, which then does all the work.

        Raises WeightError where the base layer is quantized or sharded.
        """
        if self.merged:
            return
        require_plain_weight(self.base_layer, "merge", "`inilora convert` makes an adapter to load beside it")
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
        return self._add(self._weight(), -self.scaling * (self.initial_B.float() @ self.initial_A.float()))

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


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of BA − B0A0, of rank 2r and without cancellation: A' = [A − A0; A0] (2r, k), B' = [B, B − B0] (d, 2r).

    Where A = A0 and B = B0 their product is exactly 0. A0 and B0 are taken in the dtype of A and B, so this
    also holds for a model that was cast.

    >>> A, B = torch.randn(2, 5), torch.randn(4, 2)
    >>> A1, B1 = difference(A, B, A, B)
    >>> (B1 @ A1).abs().max()
    tensor(0.)
    """
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


def attach(model: Model, factors: FactorSet, form: Form = "delta", scaling: float = 1.0, dropout: float = 0.0) -> Model:
    """Put an adapter on every module of the model that has factors, in place, and freeze all the rest.

    The model's output stays what it was: to the bit in the delta form, to the rounding of R = W − sBA in the
    residual form. A head that shall train too is unfrozen after this call, and nothing is changed if it
    raises.

    model: any nn.Module whose linear layers are the checkpoint's, also a quantized one (delta form).
    factors: from `approximate_model` or `FactorSet.load`; float32, BA ≈ W.
    form: "delta" or "residual".
    scaling: s; A and B are divided by √s, so sBA stays the same.
    dropout: probability for the adapter's input.

    Returns the model. Raises TargetError (no such module, a shape differs, an adapter is there already, or a
    residual form of a weight that two modules share), OptionError (form, scaling, dropout) and WeightError
    (residual form of a quantized or sharded weight). Warns where the residual form would lose W to rounding.

    >>> from inilora_kernels.factors import Certificate, Factors
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> certificate = Certificate(loss=0.0, optimum=0.0, energy=1.0, steps=0)
    >>> start = Factors(torch.randn(1, 4), torch.randn(3, 1), certificate, source_sha256="")
    >>> x = torch.randn(2, 4)
    >>> expected = model(x)
    >>> attached = attach(model, FactorSet({"0": start}, {}))
    >>> torch.equal(attached(x), expected), sum(p.numel() for p in trainable_parameters(model))
    (True, 7)
    """
    if form not in ("delta", "residual"):
        raise OptionError(f'form={form!r}: it is "delta" or "residual"')
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"dropout={dropout}: it must be at least 0 and below 1")
    where = type(model).__name__
    if any(True for _ in adapters(model)):
        raise TargetError(f"{where} has adapters already; call detach(model) first")
    modules = dict(model.named_modules())
    shapes = {name: shape for name, module in modules.items() if name and (shape := linear_shape(module))}
    starts = find_starts(shapes, factors, where, model_config(model))
    scaled = {name: start.scaled(scaling) for name, start in starts.items()}
    if form == "residual":
        for name, start in starts.items():
            _require_residual(model, name, modules[name], start)
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    for name, (A, B) in scaled.items():
        _replace(model, name, LoRALinear(modules[name], A, B, form, scaling, dropout))
    setattr(model, _FROZEN, trained)
    return model


def detach(model: Model) -> Model:
    """Take the adapters off, in place: the model is as it was before `attach`, weights bit for bit. Returns it."""
    for name, layer in list(adapters(model)):
        _replace(model, name, layer.restored_base_layer())
    trained: frozenset[str] = getattr(model, _FROZEN, frozenset())
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    if hasattr(model, _FROZEN):
        delattr(model, _FROZEN)
    return model


def merge(model: Model) -> Model:
    """Put every adapter into its base layer's weight: W + s(BA − B0A0). `unmerge` undoes it bit for bit.

    Raises WeightError, before any change, where a base layer is quantized or sharded.
    """
    layers = list(adapters(model))
    for name, layer in layers:
        require_plain_weight(layer.base_layer, name, "`inilora convert` makes an adapter to load beside it")
    for _, layer in layers:
        layer.merge()
    return model


def unmerge(model: Model) -> Model:
    """Undo `merge`, bit for bit."""
    for _, layer in adapters(model):
        layer.unmerge()
    return model


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's adapters with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, for an optimizer."""
    return [parameter for _, parameter in _named(model)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B alone: `{module}.lora_A.weight` (r, in_features) and `{module}.lora_B.weight` (out_features, r).

    Names are those in the plain model, also through DDP and torch.compile. Under FSDP2 the tensors are
    gathered, so every process has to call this.
    """
    return {name: _whole(parameter.detach()) for name, parameter in _named(model)}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Put what `adapter_state_dict` gave into a model to which the same factors are attached.

    Raises TargetError, before any change, if names or shapes differ.
    """
    parameters = dict(_named(model))
    if parameters.keys() != state_dict.keys():
        odd = sorted(parameters.keys() ^ state_dict.keys())[0]
        side = "the model" if odd in parameters else "the state dict"
        raise TargetError(f"{odd} is only in {side}; attach the factors that the state dict was trained from")
    for name, parameter in parameters.items():
        if parameter.shape != state_dict[name].shape:
            raise TargetError(
                f"{name} is {tuple(parameter.shape)} in the model and {tuple(state_dict[name].shape)} "
                f"in the state dict; attach the factors that it was trained from"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(state_dict[name], parameter))


def model_config(model: nn.Module) -> dict[str, object] | None:
    """The config.json of a transformers model, None for any other."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return dict(to_dict()) if to_dict else None


def require_plain_weight(base_layer: nn.Module, what: str, instead: str) -> None:
    """Raise WeightError unless the weight is a plain floating point tensor that can be changed."""
    weight = getattr(base_layer, "weight", None)
    data = weight.data if isinstance(weight, Tensor) else None
    if data is None or type(data) is not Tensor or not data.is_floating_point() or data.dtype.itemsize < 2:
        found = "no `weight`" if data is None else f"{type(data).__name__} of {data.dtype}"
        raise WeightError(f"{what}: the base weight is quantized or sharded ({found}); {instead}")


def warn_if_rounded_away(weight: Tensor, residual: Tensor, name: str) -> None:
    """Warn if R is so much larger than W that its rounding, and with it W's error, is 4 times that of W's own dtype.

    So it is with IniLoRA-α's factors, whose product is about 35 times W.
    """
    growth = float(residual.float().norm() / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    if growth > 4 and weight.dtype.itemsize < 4:
        loss = growth * torch.finfo(weight.dtype).eps / math.sqrt(12)
        warnings.warn(
            f"{name}: the residual is {growth:.0f} times as large as the weight, so {weight.dtype} "
            f'rounds away about {loss:.1%} of the weight; use form="delta", which leaves the base as it is',
            stacklevel=3,
        )


def _require_residual(model: nn.Module, name: str, base_layer: nn.Module, start: Start) -> None:
    require_plain_weight(base_layer, name, 'use form="delta", which leaves the base as it is')
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    users = [user for user, other in model.named_parameters(remove_duplicate=False) if other is weight]
    if len(users) > 1:
        raise TargetError(
            f"{name}: its weight is also {users[0] if users[0] != f'{name}.weight' else users[1]}, which the "
            f'residual form would change too; use form="delta"'
        )
    product = (start.B @ start.A).to(weight.device)
    oriented = product.T if is_conv1d(base_layer) else product
    warn_if_rounded_away(weight.detach(), weight.detach().float() - oriented, name)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in adapters(model):
        plain = ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)
        for linear in ("lora_A", "lora_B"):
            yield f"{plain}.{linear}.weight", layer.get_parameter(f"{linear}.weight")


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _linear(weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _device(base_layer: nn.Module) -> torch.device:
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
