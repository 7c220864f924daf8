"""What a live model does with the layers that will get an adapter: whether it calls them, and what it computes."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .modules import linear_shape
from .weights import require_unfused

# What a module may ask of a weight without computing with it.
_QUESTIONS = frozenset(
    {"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "dim", "numel"}
)
# A name as source has it: ("self", "layers", "*", "q_proj") for `self.layers[0].q_proj`.
Chain = tuple[str, ...]
_NONE: dict[str, list[Chain]] = {}

# The beginnings of methods' names that are called before it, if at all: diffusers' Attention has a fuse_projections.
_BEFORE_IT = ("extra_repr", "fuse_", "unfuse_")
_NOT_THE_FORWARD_PASS = ("__init__", "_init", "init_", "reset_", "_reset", "tie_", "_tie", "set_", "get_", *_BEFORE_IT)


def require_called(model: nn.Module, names: Collection[str]) -> None:
    """Raise TargetError if the code around a layer reads its weight instead of calling it.

    An adapter on such a layer has no effect: `MultiheadAttention.out_proj`, `dt_proj` of Mamba. The source of the
    modules around each layer says where its weight is read; where the model can be run on random input, that decides
    whether the layer is called after all, and finds what the source does not show.
    """
    require_unfused(model, names)
    suspects = _methods_with(model, names, _weights_computed_with)
    inputs = random_inputs(model)
    if inputs is not None:
        for name in _bypassed(model, [name for name in names if name not in suspects], inputs):
            suspects[name] = ("", "the code around it")
    if not suspects:
        return
    called = frozenset[str]() if inputs is None else called_layers(model, suspects, inputs)
    bypassed = {name for name in suspects if name not in called}
    if bypassed and inputs is not None and all(parameter.is_meta for parameter in model.parameters()):
        # Models that run elsewhere may fail there before they come to a layer: one that is called somewhere passes.
        completed = _completed(model, {suspects[name][0] for name in bypassed}, inputs)
        bypassed -= {
            name for name in _methods_with(model, bypassed, _layers_called_by) if suspects[name][0] not in completed
        }
    for name in suspects:
        if name in bypassed:
            raise TargetError(
                f"{name}: {suspects[name][1]} reads its weight and does not call the layer, so an adapter on it would "
                f"have no effect; leave this module out of target_modules and of the factors"
            )


def require_called_by_kernels(model: nn.Module, names: Collection[str]) -> None:
    """Raise TargetError if training hands a layer's weight to code that another machine may have a fused kernel for.

    Mamba's mixers offer weights to a kernel in training, and call their layers where there is none: an adapter that is
    right here has no effect there. For models that others will load; `require_called` is right about this machine.
    """
    for name, (_, owner) in _methods_with(model, names, _weights_offered_by).items():
        raise TargetError(
            f"{name}: {owner} hands its weight to a fused kernel where there is one (on a GPU, say), so an adapter on "
            f"it would have no effect there; leave this module out of the factors, or start by lora_model on the "
            f"machine that trains, which tries whether it does"
        )


def reads_weight(model: nn.Module, name: str) -> str | None:
    """The class and method around a module whose source computes with `module.weight` itself; None if there is none.

    >>> reads_weight(nn.MultiheadAttention(4, 2), "out_proj")
    'MultiheadAttention.forward'
    """
    return _methods_with(model, [name], _weights_computed_with).get(name, (None, None))[1]


def _bypassed(model: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor]) -> list[str]:
    """The layers among these that are not called on these inputs, and whose weight changes the output all the same."""
    layers = {name: model.get_submodule(name) for name in names}
    with _seen(names, lambda name: layers[name].register_forward_pre_hook) as called, _reads(layers) as read:
        expected = output_of(model, inputs)
    if expected is None:
        return []
    found = []
    for name in sorted(read - called):
        weight: Any = layers[name].weight
        if isinstance(weight, Tensor) and weight.is_floating_point() and type(weight.data) is Tensor:
            before = weight.data
            weight.data = before + before.abs().mean()
            output = output_of(model, inputs)
            weight.data = before
            if output is None or not torch.equal(output, expected):
                found.append(name)
    return found


@contextmanager
def _reads(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collects the names of layers whose `weight` something outside asks for within."""
    read: set[str] = set()
    inside: set[str] = set()
    names = {id(layer): name for name, layer in layers.items()}
    classes: dict[str, Any] = {name: type(layer) for name, layer in layers.items()}

    @functools.cache
    def watched(of: Any) -> Any:
        class Watched(of):  # type: ignore[misc]
            def __call__(self, *args: Any, **options: Any) -> Any:
                inside.add(names[id(self)])
                try:
                    return super().__call__(*args, **options)
                finally:
                    inside.discard(names[id(self)])

            @property
            def weight(self) -> Any:
                if names[id(self)] not in inside:
                    read.add(names[id(self)])
                return super().weight  # no class has it where it is a parameter: nn.Module then looks it up

        return Watched

    try:
        for name, layer in layers.items():
            layer.__class__ = watched(classes[name])
        yield read
    finally:
        for name, layer in layers.items():
            layer.__class__ = classes[name]


def _methods_with(
    model: nn.Module, names: Collection[str], chains_of: Callable[[Any], frozenset[Chain]]
) -> dict[str, tuple[str, str]]:
    """The first method around each layer whose chains have it: the module, class and name. Without layers of none."""
    # Of this call alone: a class's forward may be replaced later. One entry serves all modules of a class.
    found_in: dict[Any, dict[Chain, str]] = {}
    found = {}
    for name in names:
        path = name.split(".")
        modules = [model]
        for part in path[:-1]:
            modules.append(modules[-1].get_submodule(part))
        for depth, module in enumerate(modules):
            key = module if "forward" in vars(module) else type(module)
            if key not in found_in:
                methods = reversed(list(_methods(module).items()))
                found_in[key] = {chain: owner for owner, function in methods for chain in chains_of(function)}
            if found_in[key]:
                chain = ("self", *("*" if part.isdecimal() else part for part in path[depth:]))
                if chain in found_in[key]:
                    found[name] = ".".join(path[:depth]), found_in[key][chain]
                    break
    return found


def random_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Small random inputs for a transformers model, None for a model whose inputs are not known.

    A model that is wholly on the meta device gets them there: it can be run, for the shapes alone.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    text = getattr(config, "get_text_config", lambda: config)()
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if len({parameter.is_meta for parameter in model.parameters()}) == 2:
        return None
    if main == "input_ids" and isinstance(vocabulary := getattr(text, "vocab_size", None), int) and vocabulary > 0:
        ids = torch.randint(vocabulary, (1, 8), generator=generator, device="cpu").to(device)
        decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": ids, **decoder}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if main == "pixel_values" and isinstance(size, int):
        pixels = torch.randn(1, channels, size, size, generator=generator, device="cpu")
        return {"pixel_values": pixels.to(device, getattr(model, "dtype", torch.float32))}
    return None


def require_same_output(before: Tensor, after: Tensor | None, where: str) -> None:
    """Raise TargetError if a model's output on the same input has changed, or there is none, as it must be the same.

    The tolerance is far above the effect of R's rounding and of kernels that add in no fixed order, and far below that
    of a layer that starts from BA instead of W.
    """
    if after is None or before.shape != after.shape:
        what = "does not run" if after is None else "gives another shape"
        raise TargetError(
            f"{where}: with the adapters it {what} on random input, on which it ran before, so some of these are "
            f"no linear layers; leave them out of target_modules and of the factors"
        )
    size = float(before.double().norm()) or 1.0
    changed = float((after.double() - before.double()).norm()) / size
    if changed > (1e-3 if before.dtype.itemsize >= 4 else 0.05):
        raise TargetError(
            f"{where}: with the adapters the output on random input changes by {changed:.1%}, so the model does not "
            f"call some of these layers as linear layers; leave them out of target_modules and of the factors"
        )


def model_config(model: nn.Module) -> dict[str, object] | None:
    """The config.json of a transformers model, None for any other."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return dict(to_dict()) if to_dict else None


def called_layers(model: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Which of these layers are called both in evaluation and in training, where fused kernels may bypass them."""
    called = frozenset(names)
    for training in (False, True):
        called &= _called(model, names, inputs, training)
    return called


def _called(model: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor], training: bool) -> frozenset[str]:
    with _seen(names, lambda name: model.get_submodule(name).register_forward_pre_hook) as seen:
        _run(model, inputs, training)
    return frozenset(seen)


def _completed(model: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Which of these modules finish their forward pass on these inputs."""
    with _seen(names, lambda name: model.get_submodule(name).register_forward_hook) as seen:
        _run(model, inputs)
    return frozenset(seen)


@contextmanager
def _seen(names: Collection[str], register: Callable[[str], Callable[..., Any]]) -> Iterator[set[str]]:
    """Collects the names whose hooks run within. register: a module's method that adds the kind of hook."""
    seen: set[str] = set()
    hooks = [register(name)(lambda *_, name=name: seen.add(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def output_of(model: nn.Module, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor | None:
    """The model's first output, without dropout unless `training`; None if it has no values on these inputs."""
    output = _run(model, inputs, training)
    is_whole = isinstance(output, Tensor) or not hasattr(output, "values")
    first = output if is_whole else next(iter(output.values()), None)
    return first if isinstance(first, Tensor) and not first.is_meta else None


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor], training: bool = False) -> Any:
    with _mode(model, training), torch.random.fork_rng(devices=[]):
        try:
            return model(**inputs)
        except Exception:  # whatever a model raises on input that is not meant for it; it then tells us nothing
            return None


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Linear layers stay in training mode: in evaluation, bitsandbytes packs weights so that they cannot be trained."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training or linear_shape(module) is not None
        yield
    finally:
        for module, was in before.items():
            module.training = was


def _methods(module: nn.Module) -> Mapping[str, Any]:
    """The functions of a module's forward pass, as far as a name tells, by class and name."""
    methods, patched = _methods_of(type(module)), vars(module).get("forward")
    if patched is None:
        return methods
    # On the object, as some kernel integrations do.
    others = {name: function for name, function in methods.items() if not name.endswith(".forward")}
    own = {f"{type(module).__name__}.forward": inspect.unwrap(patched)} if inspect.isroutine(patched) else {}
    return others | own


def _methods_of(of: type) -> Mapping[str, Any]:
    functions: dict[str, Any] = {}
    for owner in of.__mro__:
        if owner not in (nn.Module, object):
            for name, function in vars(owner).items():
                functions.setdefault(name, function)
    return {
        f"{of.__name__}.{name}": inspect.unwrap(function)
        for name, function in functions.items()
        if inspect.isroutine(function) and not name.startswith(_NOT_THE_FORWARD_PASS)
    }


@functools.cache
def _weights_computed_with(function: Any) -> frozenset[Chain]:
    """Each attribute chain, ("self", "out_proj"), whose `.weight` the function computes with; "*" for any index."""
    return frozenset(chain for _, chain in _weights_read(function))


@functools.cache
def _weights_offered_by(function: Any) -> frozenset[Chain]:
    """Those among them that the function reads for a kernel: in a branch for training, or by its own name."""
    if "kernel" in getattr(function, "__name__", ""):
        return _weights_computed_with(function)
    around = dict(_nodes(function))
    return frozenset(chain for node, chain in _weights_read(function) if _is_for_training(node, around))


def _is_for_training(node: ast.AST, around: Mapping[ast.AST, ast.AST]) -> bool:
    while around[node] is not node:
        node = around[node]
        if isinstance(node, ast.If) and any(
            isinstance(part, ast.Attribute) and part.attr == "training" for part in ast.walk(node.test)
        ):
            return True
    return False


def _weights_read(function: Any) -> Iterator[tuple[ast.AST, Chain]]:
    """Where the function computes with a layer's `.weight`, and that layer's chain."""
    if "weight" not in getattr(getattr(function, "__code__", None), "co_names", ()):
        return
    nodes = _nodes(function)
    variables = _variables(nodes)
    for node, around in nodes:
        if isinstance(node, ast.Attribute) and node.attr == "weight" and _computes(node, around):
            for chain in _chains(node.value, variables):
                yield node, chain


@functools.cache
def _layers_called_by(function: Any) -> frozenset[Chain]:
    """Each attribute chain, ("self", "out_proj"), that the function calls."""
    nodes = _nodes(function)
    variables = _variables(nodes)
    return frozenset(
        chain for node, _ in nodes if isinstance(node, ast.Call) for chain in _chains(node.func, variables)
    )


def _variables(nodes: Sequence[tuple[ast.AST, ast.AST]]) -> dict[str, list[Chain]]:
    """The chains that local variables stand for somewhere: `layer = self.q`, `for layer in self.layers`."""
    variables: dict[str, list[Chain]] = {}
    for node, _ in nodes:
        if isinstance(node, ast.Assign):
            target, chains = node.targets[0], _chains(node.value, variables)
        elif isinstance(node, (ast.For, ast.comprehension)):
            target, every = node.target, node.iter
            if (
                isinstance(every, ast.Call)
                and isinstance(target, ast.Tuple)
                and _chains(every.func) == [("enumerate",)]
            ):
                target, every = target.elts[-1], every.args[0]
            chains = [(*chain, "*") for chain in _chains(every, variables)]
        else:
            continue
        if isinstance(target, ast.Name):
            variables.setdefault(target.id, []).extend(chain for chain in chains if chain[0] == "self")
    return variables


@functools.cache
def _nodes(function: Any) -> list[tuple[ast.AST, ast.AST]]:
    """The nodes of a function's source, each with the one around it; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    nodes: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    for node, _ in nodes:
        nodes.extend((child, node) for child in ast.iter_child_nodes(node))
    return nodes


def _computes(node: ast.Attribute, around: ast.AST) -> bool:
    if isinstance(around, ast.Attribute):
        return around.attr not in _QUESTIONS
    asks = isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id == "isinstance"
    return isinstance(node.ctx, ast.Load) and not asks and not isinstance(around, ast.Compare)


def _chains(node: ast.AST, variables: Mapping[str, list[Chain]] = _NONE) -> list[Chain]:
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        names.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    return [(*start, *reversed(names)) for start in [(node.id,), *variables.get(node.id, ())]]
