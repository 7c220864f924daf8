"""Every kind of stored weight from its folder to a trained adapter and back; `python -m tests.adapters.stored_kinds`
draws the table of docs/compatibility.md from these runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)

from inilora_kernels import (
    FactorSet,
    approximate_model,
    convert,
    export_delta,
    export_merged,
    export_residual,
    load_delta,
)
from inilora_kernels.errors import InitializationError
from inilora_kernels.lora_start import lora_model
from inilora_kernels.model.checkpoint import Checkpoint
from inilora_kernels.model.live import open_model
from inilora_kernels.model.names import endings
from inilora_kernels.model.targets import find_targets

from .drawing import runs
from .models import IDS, logits, train
from .packed_layers import fp8_kernel, gptqmodel, load_fp8, load_packed
from .quantized_checkpoints import (
    block_fp8,
    by_transformers,
    compressed,
    gguf_file,
    mxfp4_experts,
    packed_words,
    plain,
)

STEPS = ("read", "start live", "residual", "residual live", "delta", "convert", "merge")
Load = Callable[[Path], Any]


def _loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def _run_once(folder: Path) -> Any:
    """compressed-tensors unpacks what it packed when the model first runs."""
    model = _loaded(folder)
    logits(model)
    return model


def _itself(folder: Path) -> Path:
    """What approximate_model and the exports are given: the folder, or the GGUF file in it."""
    return next(folder.glob("*.gguf"), folder)


def _from_gguf(folder: Path) -> Any:
    return _loaded(folder, gguf_file="model.gguf", dtype=torch.float32)


@dataclass(frozen=True)
class Kind:
    """One kind of stored weight, or one place where models are.

    write: writes a checkpoint of it into a folder that it makes. load: the live model, from that folder and from those
        that are exported. live: how the table describes that model. given: what functions of ours are given for it.
    refused: the steps that are refused; "" where none is.
    eps: of the dtype in which the model computes.
    """

    title: str
    write: Callable[[Path], None]
    load: Load = _loaded
    live: str = "its library's layers"
    refused: frozenset[str] = frozenset({"residual", "residual live", "merge"})
    eps: float = torch.finfo(torch.bfloat16).eps
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Callable[[Path], Any] = _itself
    inputs: Tensor = IDS


_DENSE = "dense on a CPU"
_UNPACKED = "after its first run, dense"
_STAND_IN = "stand-in for the kernel"
_FOLDER_ONLY = frozenset({"residual", "merge"})
_F32, _F16 = torch.finfo(torch.float32).eps, torch.finfo(torch.float16).eps


def _bits(four: bool, kind: str = "nf4", nested: bool = False) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _torchao(config: Any) -> Callable[[Path], None]:
    return partial(by_transformers, quantization=transformers.TorchAoConfig(config))


def _compressed(form: str, kind: str, bits: int, strategy: str, **settings: Any) -> Callable[[Path], None]:
    return partial(compressed, form=form, type=kind, num_bits=bits, strategy=strategy, **settings)


_NVFP4 = _compressed("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
_INT4 = _compressed("pack-quantized", "int", 4, "group", group_size=32)
_DYNAMIC = frozenset({"start live", "residual", "residual live", "delta"})  # what comes after is not tried

KINDS = [
    Kind("float32", partial(plain, dtype=torch.float32), live="plain", refused=frozenset(), eps=_F32),
    Kind("float16", partial(plain, dtype=torch.float16), live="plain", refused=frozenset(), eps=_F16),
    Kind("bfloat16", partial(plain, dtype=torch.bfloat16), live="plain", refused=frozenset()),
    Kind("FP8 in blocks, FP8Linear", block_fp8, load_fp8, _STAND_IN, around=fp8_kernel),
    Kind("FP8 in blocks", block_fp8, live=_DENSE, refused=_FOLDER_ONLY),
    Kind(
        "compressed-tensors FP8, a scale for all",
        _compressed("float-quantized", "float", 8, "tensor"),
        live="before its first run",
    ),
    Kind("compressed-tensors FP8, a scale a row", _compressed("float-quantized", "float", 8, "channel")),
    Kind("compressed-tensors int8", _compressed("int-quantized", "int", 8, "channel")),
    Kind("compressed-tensors int4", _INT4, _run_once, _UNPACKED, _FOLDER_ONLY),
    Kind("compressed-tensors NVFP4", _NVFP4, _run_once, _UNPACKED, _FOLDER_ONLY),
    Kind(
        "MXFP4 experts (gpt-oss)",
        mxfp4_experts,
        partial(_loaded, dtype=torch.float32),  # PEFT adds ΔW to the parameter: two steps round away in bfloat16
        _DENSE,
        eps=_F32,
        options={"target_parameters": ["experts.down_proj"]},
    ),
    Kind("bitsandbytes NF4, double quantization", partial(by_transformers, quantization=_bits(True, nested=True))),
    Kind("bitsandbytes FP4", partial(by_transformers, quantization=_bits(True, "fp4"))),
    Kind("bitsandbytes int8", partial(by_transformers, quantization=_bits(False))),
    Kind("GPTQ", partial(packed_words, method="gptq"), load_packed, _STAND_IN, eps=_F16, around=gptqmodel),
    Kind("AWQ", partial(packed_words, method="awq"), load_packed, _STAND_IN, eps=_F16, around=gptqmodel),
    Kind("torchao int8", _torchao(Int8WeightOnlyConfig(version=2))),
    Kind("torchao FP8", _torchao(Float8WeightOnlyConfig())),
    Kind("torchao int4", _torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))),
    Kind("torchao int8, activations too", _torchao(Int8DynamicActivationInt8WeightConfig(version=2)), refused=_DYNAMIC),
    Kind("GGUF Q8_0", gguf_file, _from_gguf, "dense", _FOLDER_ONLY, _F32),
]


@dataclass
class Outcome:
    """What came of one kind.

    errors: the largest difference after each step, relative to the largest value. refused: what was said instead.
    noise: what computing in its dtype does to the original's own outputs, compared with the same weights in float64.
    """

    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    noise: float = 0.0

    def try_(self, step: str, run: Callable[[], float]) -> None:
        try:
            self.errors[step] = run()
        except InitializationError as error:
            self.refused[step] = str(error)


def outcome(kind: Kind, folder: Path) -> Outcome:
    """Every step of STEPS on one kind. Each needs a model that nothing has touched, so each loads its own."""
    with kind.around():
        result = _outcome(kind, folder)
    result.refused = {
        step: reason.replace(f"{folder}/", "").replace(str(folder), "OUT") for step, reason in result.refused.items()
    }
    return result


def _outcome(kind: Kind, folder: Path) -> Outcome:
    kind.write(folder / "model")
    result = Outcome()

    def load() -> Any:
        return kind.load(folder / "model")

    def run(model: Any) -> Tensor:
        return logits(model, kind.inputs)

    base = kind.given(folder / "model")
    try:
        factors = approximate_model(base, rank=4, solver="krylov", cache=False, progress=False, **kind.options)
    except InitializationError as error:
        result.refused["read"] = str(error)
        return result
    expected = run(load())
    if "residual live" not in kind.refused or not {"delta", "merge"} & kind.refused:
        result.noise = _difference(expected, logits(load().double(), _double(kind.inputs)))
    result.try_("read", lambda: _read(base, load(), factors, kind))
    result.try_("start live", lambda: _difference(run(lora_model(load(), factors)), expected))
    result.try_("residual live", lambda: _difference(run(lora_model(load(), factors, "residual")), expected))

    def residual() -> float:
        export_residual(base, factors, folder / "residual")
        model = kind.load(folder / "residual/base")
        return _difference(run(PeftModel.from_pretrained(model, folder / "residual/adapter")), expected)

    result.try_("residual", residual)
    assert ("residual" in result.refused) != (folder / "residual").exists()
    trained: list[Tensor] = []

    def delta() -> float:
        export_delta(base, factors, folder / "delta")
        difference = _difference(run(load_delta(load(), folder / "delta")), expected)
        # Another: on a CPU bitsandbytes packs a model anew that runs without gradients, and passes none after that.
        model = load_delta(load(), folder / "delta")
        trained.append(train(model, kind.inputs))
        # Otherwise nothing that follows would show anything.
        moved = _difference(trained[0], expected)
        assert moved > 2 * kind.eps, moved
        model.save_pretrained(folder / "trained")
        return difference

    result.try_("delta", delta)
    if not trained:
        return result

    def converted() -> float:
        convert(folder / "trained", factors, folder / "lora", base)
        return _difference(run(PeftModel.from_pretrained(load(), folder / "lora")), trained[0])

    def merged() -> float:
        export_merged(folder / "trained", factors, folder / "merged", base)
        return _difference(run(kind.load(folder / "merged")), trained[0])

    result.try_("convert", converted)
    result.try_("merge", merged)
    return result


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


@torch.no_grad()
def _read(base: Any, model: Any, factors: FactorSet, kind: Kind) -> float:
    """What the checkpoint's W is, and what the live layer computes: its outputs for the columns of the identity."""
    checkpoint, largest = open_model(base, None, None, None), 0.0
    model.train()(kind.inputs)  # unpacks what compressed-tensors holds; in evaluation bitsandbytes would pack anew
    live = {name.removesuffix(".weight"): module for name, module in _layers(model, checkpoint)}
    parameters = kind.options.get("target_parameters")
    experts = {one.module: one for one in find_targets(checkpoint, None, None, parameters)} if parameters else {}
    for name in factors:
        parameter, _, part = name.partition(":")
        if part.isdecimal():
            W, found = experts[name].read(), model.get_parameter(parameter)[int(part)]
            found = found if found.shape == W.shape else found.T
        elif parameter not in live:  # in_proj_weight of torch's MultiheadAttention
            W, found = checkpoint.read(f"{parameter}.weight"), model.get_parameter(f"{parameter}_weight")
        else:
            W = checkpoint.read(f"{parameter}.weight")
            layer = live[parameter]
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()
            found = layer(torch.eye(W.shape[1], dtype=next(model.parameters()).dtype)).T
        largest = max(largest, _difference(found, W))
    return largest


def _layers(model: Any, checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """The live model's layer of each weight: their names may differ by a prefix."""
    modules = dict(model.named_modules())
    for name in checkpoint.weights:
        module = name.removesuffix(".weight")
        end = next((end for end in endings(module) if end in modules), None)
        prefixed = next((one for one in modules if one.endswith(f".{module}")), None)
        if end or prefixed:
            yield name, modules[end or prefixed]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def row(kind: Kind, result: Outcome) -> str:
    """A row of the table."""
    cells = [_cell(result, step) for step in STEPS if step != "residual live"]
    if "residual" in result.refused and "residual live" in result.errors:
        cells[2] = f"refused; live {result.errors['residual live']:.0e}"
    return f"| {kind.title} | {kind.live} | {' | '.join(cells)} |"


def _cell(result: Outcome, step: str) -> str:
    if step in result.errors:
        return "exact" if result.errors[step] == 0 else f"{result.errors[step]:.0e}"
    return "refused" if step in result.refused else "–"


def main() -> None:
    """Write the table into docs/compatibility.md."""
    draw(KINDS, HEADER)


def draw(kinds: Sequence[Kind], header: str, why: str = "") -> None:
    """Run these, and put their rows in place of the page's below this header.

    why: the line below which the page says why; every reason of a refusal by its title.
    """
    rows: list[str] = []
    reasons: list[str] = []
    for kind, result in runs(kinds, outcome):
        rows.append(row(kind, result))
        print(rows[-1], *(f"  {step}: {reason}" for step, reason in result.refused.items()), sep="\n", flush=True)
        reasons += [f"- {kind.title}: {reason}" for reason in dict.fromkeys(result.refused.values())]
    if len(rows) == len(kinds):
        write(rows, header)
        if why:
            write(reasons, why)


HEADER = """\
| stored as | live model | read | start live | residual | delta | convert | merge |
|---|---|---|---|---|---|---|---|
"""


def write(rows: list[str], header: str, file: Path = Path("docs/compatibility.md")) -> None:
    """Put these lines, up to the next empty one, in place of the page's below this header."""
    before, found, after = file.read_text(encoding="utf-8").partition(header)
    assert found, f"{file} has lost the table's header"
    rest = after.partition("\n\n")[2]
    file.write_text(before + header + "\n".join(rows) + "\n\n" + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
