"""What a base layer's weight is, and whether it may be changed: plain, quantized, sharded, offloaded, shared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TargetError, WeightError
from ..factor_set import FactorSet
from ..factors import Factors
from ..model.fused import row_index
from .modules import Start, is_conv1d, linear_shape

# ⟨W, BA⟩ tells whether W is the matrix that BA is of, where it is this share of ‖W‖².
_TELLING = 1e-3


def require_own_weight(base_layer: nn.Module, what: str, instead: str) -> None:
    """Raise WeightError unless the weight is a whole, plain floating-point matrix in memory, which can be changed.

    what: the layer's name in the message; instead: what to do.
    """
    weight = getattr(base_layer, "weight", None)
    data = weight.data if isinstance(weight, Tensor) else None
    if data is not None and is_plain(data):
        shape = linear_shape(base_layer)
        stored = shape if shape is None or not is_conv1d(base_layer) else shape[::-1]
        status = str(getattr(base_layer, "quantization_status", ""))
        if status and not status.lower().endswith("decompressed"):
            raise WeightError(f"{what}: compressed-tensors quantizes the base weight in every forward pass; {instead}")
        if not data.is_meta and tuple(data.shape) == stored:
            return
        found = "on the meta device" if data.is_meta else f"a shard of shape {tuple(data.shape)}"
        raise WeightError(f"{what}: the base weight is offloaded or sharded ({found}); {instead}")
    found = "no `weight`" if data is None else f"{type(data).__name__} of {data.dtype}"
    raise WeightError(f"{what}: the base weight is quantized or sharded ({found}); {instead}")


def require_unpacked(model: nn.Module, names: Collection[str]) -> None:
    """Raise WeightError if one of these linear layers has no weight yet, so that PEFT cannot add an adapter to it.

    compressed-tensors keeps packed weights (4 bits) in place of `weight` until the model first runs, and unpacks them
    all then, for good.
    """
    for name, module in model.named_modules():
        if name in names and isinstance(module, nn.Linear) and not hasattr(module, "weight"):
            raise WeightError(
                f"{name}: its weight is packed until the model first runs; run the model once before adding adapters, "
                f"or load it with CompressedTensorsConfig(dequantize=True)"
            )


def require_unfused(model: nn.Module, names: Collection[str]) -> None:
    """Raise TargetError if diffusers' fuse_qkv_projections has put another layer in the place of one of these."""
    for name in names:
        if getattr(model.get_submodule(name.rpartition(".")[0]), "fused_projections", False):
            raise TargetError(
                f"{name}: its attention computes with to_qkv, which fuse_qkv_projections made of it, so an adapter on "
                f"it would have no effect; call unfuse_qkv_projections first"
            )


def require_summable(weight: Tensor, what: str) -> None:
    """Raise WeightError if a weight holds a quantized matrix's codes, to which no update of the matrix can be added."""
    if weight.dtype.itemsize < 2 or not weight.is_floating_point():
        raise WeightError(
            f"{what}: the base weight is quantized ({weight.dtype}), and its scales are elsewhere; load what "
            f"save_pretrained writes next to it, or merge that into the original model"
        )


def users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that have each parameter `weight`, by its id; more than one where it is shared."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return users


def has_weight_of(model: nn.Module, factors: FactorSet, name: str, start: Start, guessed: bool = True) -> bool:
    """Whether the weight of a layer is the one that a start's factors were computed from, as far as its values tell.

    guessed: the layer is not named as the factors are, so ‖W‖² must be theirs, up to the rounding of 16 bits. Otherwise
    W may be another version of the same weight, quantized and back, pruned, trained on: it must still have the
    direction of BA, ⟨W, BA⟩, that the certificate says.

    True where the values are not there to be looked at: sharded, offloaded, quantized, replaced by a residual.
    """
    layer = model.get_submodule(name.rpartition(".")[0] if start.A.dim() == 3 else name)
    base_layer = getattr(layer, "base_layer", layer)
    weight = getattr(base_layer, "weight", None)
    if start.A.dim() == 3 or not isinstance(weight, Tensor) or not is_plain(weight.data) or weight.is_meta:
        return True
    # ZeRO-3 and FSDP1 shard in place; FSDP loads the values on the first process alone; subtracted_A: W is R there.
    elsewhere = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    if tuple(oriented(base_layer, weight).shape) != linear_shape(base_layer) or elsewhere or _is_residual(layer):
        return True
    W = oriented(base_layer, weight.detach())  # its own inverse
    for part in map(factors.__getitem__, start.names):
        rows = W[row_index(part.rows, len(W))]
        energy = float(torch.linalg.vector_norm(rows, dtype=torch.float32)) ** 2
        if guessed and not math.isclose(energy, part.certificate.energy, rel_tol=0.01):
            return False
        if not guessed and part.source_sha256 and _is_strange(rows, energy, part):
            return False
    return True


def _is_residual(layer: nn.Module) -> bool:
    return "subtracted_A" in layer._buffers


@torch.no_grad()
def _is_strange(W: Tensor, energy: float, part: Factors) -> bool:
    """Whether ‖W‖² or ⟨W, BA⟩ is not half of what the certificate says, or twice that.

    ‖W − BA‖² = ‖W‖² − 2⟨W, BA⟩ + ‖BA‖² gives the product that W should have. A matrix that has nothing to do with BA
    has one of about ‖W‖‖BA‖/√(dk): where the certificate's is no larger, as for IniLoRA-α's factors, it says nothing,
    nor where it is no share of ‖W‖², as for a plain LoRA's.
    """
    certificate = part.certificate
    if not certificate.energy / 2 <= energy <= 2 * certificate.energy:
        return certificate.energy > 0  # NaN where it is not known
    with torch.autocast("cpu", enabled=False), torch.autocast(W.device.type, enabled=False):
        square = float(((part.B.mT @ part.B) * (part.A @ part.A.mT)).sum())
        expected = (certificate.energy + square - certificate.loss) / 2
        chance = 6 * math.sqrt(certificate.energy * max(square, 0.0) / W.numel())
        if expected < max(chance, _TELLING * certificate.energy):
            return False
        A, B = part.A.to(W.device), part.B.to(W.device)
        found = sum(
            float(((B[start : start + len(strip)].mT @ strip.float()) * A).sum()) for start, strip in _strips(W)
        )
    return not expected / 2 <= found <= 2 * expected


def _strips(W: Tensor, most: int = 1 << 22) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time, so that a float32 copy of them is small."""
    height = max(1, most // max(1, W.shape[1]))
    for start in range(0, len(W), height):
        yield start, W[start : start + height]


def with_shared(starts: Mapping[str, Start], model: nn.Module, shapes: Collection[str]) -> dict[str, Start]:
    """The starts, and the same for other linear layers that have the same weight, as Zamba's attention blocks do.

    Each trains an adapter of its own, from one start. shapes: the names of the model's linear layers.
    """
    every = dict(starts)
    for users in users_of_weights(model).values():
        names = list(dict.fromkeys(user.removesuffix(".base_layer") for user in users))
        first = next((name for name in names if name in starts), None)
        if first is not None:
            every |= {name: starts[first] for name in names if name in shapes and name not in every}
    return every


def require_unshared_weight(
    users: Mapping[int, Sequence[str]], name: str, base_layer: nn.Module, what: str, instead: str
) -> None:
    """Raise TargetError if another module of the model shares the weight, so that `what` would change it too.

    users: what `users_of_weights` says of the model; name: the layer's, under which its base layer is found too.
    """
    for user in users.get(id(base_layer.weight), ()):
        if user != name and not user.startswith(f"{name}."):
            raise TargetError(f"{name}: its weight is also {user}.weight, which {what} would change too; {instead}")


def device_of(base_layer: nn.Module) -> torch.device:
    """Where an adapter belongs: the device of the layer's tensors, or the one that accelerate moves them to."""
    device: torch.device | int | str | None = next(
        (tensor.device for tensor in [*base_layer.parameters(), *base_layer.buffers()]), None
    )
    if device is None or torch.device(device).type == "meta":
        device = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    device = torch.device("cpu" if device is None else device)
    return torch.device("cpu") if device.type == "meta" else device


def oriented(base_layer: nn.Module, product: Tensor) -> Tensor:
    """A product (out_features, in_features) as the base layer stores its weight."""
    return product.T if is_conv1d(base_layer) else product


def plus(weight: Tensor, update: Tensor) -> Tensor:
    """Their sum, taken in float32, in the weight's dtype."""
    return (weight.float() + update.to(weight.device)).to(weight.dtype).contiguous()


def warn_if_rounded_away(weight: Tensor, residual: Tensor, name: str) -> None:
    """Warn if R is so much larger than W that its rounding error is 4 times that of W in its own dtype.

    This happens with IniLoRA-α's factors, whose product is about 35 times W.
    """
    growth = float(residual.float().norm() / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    if growth > 4 and weight.dtype.itemsize < 4:
        loss = growth * torch.finfo(weight.dtype).eps / math.sqrt(12)
        warnings.warn(
            f"{name}: the residual is {growth:.0f} times as large as the weight, so {weight.dtype} "
            f'rounds away about {loss:.1%} of the weight; use form="delta", which leaves the base as it is',
            stacklevel=3,
        )


def warn_of_dropout(dropout: float) -> None:
    """Warn of dropout in the residual form, where BA is a part of W."""
    if dropout:
        warnings.warn(
            f"dropout of {dropout} in the residual form drops BA, a part of the original weight, so the model that "
            f'trains is another one; leave it out, or use form="delta", where it drops nothing but what is learned',
            stacklevel=4,
        )


def require_gradients(base_layer: nn.Module, name: str) -> None:
    """Raise TargetError if a quantized layer passes no gradient to its input: what comes before it would not train.

    torchao's layers that quantize their input as well, for example, compute outside autograd.
    """
    weight, shape = getattr(base_layer, "weight", None), linear_shape(base_layer)
    if shape is None or (isinstance(weight, Tensor) and is_plain(weight.data)) or torch.is_inference_mode_enabled():
        return
    with torch.enable_grad():
        found = run_base(base_layer, shape[1], gradients=True)
    if found is not None and not found[1].requires_grad:
        raise TargetError(
            f"{name}: {type(base_layer).__name__} with a weight of {type(getattr(weight, 'data', weight)).__name__} "
            f"passes no gradient to its input, so adapters before it would not train; quantize the weights alone, not "
            f"the activations, or train on another base"
        )


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor holds W itself: dense, floating-point, of 16 bits or more."""
    return type(weight) is Tensor and weight.is_floating_point() and weight.dtype.itemsize >= 2


def run_base(base_layer: nn.Module, in_features: int, gradients: bool = False) -> tuple[Tensor, Tensor] | None:
    """Random input in a dtype that the layer takes, and its output; None where it cannot be run here."""
    weight = getattr(base_layer, "weight", None)
    own = [weight.dtype] if isinstance(weight, Tensor) and weight.dtype.is_floating_point else []
    own = [dtype for dtype in own if dtype.itemsize > 1]  # 8 bits are how W is stored, not what it computes in
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, in_features, generator=generator, dtype=torch.float32, device="cpu").to(device_of(base_layer))
    # bitsandbytes packs a layer that runs in evaluation mode so that it can no longer be trained.
    training = base_layer.training
    base_layer.training = True
    try:
        for dtype in (*own, torch.float32, torch.bfloat16, torch.float16):
            try:
                output = base_layer(x.to(dtype).requires_grad_(gradients))
            except Exception:  # whatever kernels raise for a dtype or a device that they do not support
                continue
            if isinstance(base_layer, nn.Linear) and not isinstance(output, Tensor):
                raise TargetError(
                    f"{type(base_layer).__name__} returns a {type(output).__name__}, so it is more than a linear layer "
                    f"and takes no LoRA; leave it out of target_modules and of the factors"
                )
            if isinstance(output, Tensor) and output.dtype.is_floating_point and not output.is_meta:
                return x.to(dtype), output
        return None
    finally:
        base_layer.training = training
