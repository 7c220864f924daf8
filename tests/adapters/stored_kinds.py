"""Every kind of stored weight from its folder to a trained adapter and back; `python -m tests.adapters.stored_kinds`
draws the table of docs/compatibility.md from these runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from inilora_kernels.model.checkpoint import open_checkpoint

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


def _from_gguf(folder: Path) -> Any:
    return _loaded(folder, gguf_file="model.gguf", dtype=torch.float32)


@dataclass(frozen=True)
class Kind:
    """One kind of stored weight.

    write: writes a checkpoint of it. load: the live model. live: how the table describes that model.
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
        return _outcome(kind, folder)


def _outcome(kind: Kind, folder: Path) -> Outcome:
    kind.write(folder / "model")
    files = sorted((folder / "model").glob("*.gguf"))
    base = files[0] if files else folder / "model"
    factors = approximate_model(base, rank=4, solver="krylov", cache=False, progress=False, **kind.options)

    def load() -> Any:
        return kind.load(folder / "model")

    expected = logits(load())
    result = Outcome()
    if "residual live" not in kind.refused:
        result.noise = _difference(expected, logits(load().double()))
    result.try_("read", lambda: _read(base, load(), factors))
    result.try_("start live", lambda: _difference(logits(lora_model(load(), factors)), expected))
    result.try_("residual live", lambda: _difference(logits(lora_model(load(), factors, "residual")), expected))

    def residual() -> float:
        export_residual(base, factors, folder / "residual")
        model = kind.load(folder / "residual/base")
        return _difference(logits(PeftModel.from_pretrained(model, folder / "residual/adapter")), expected)

    result.try_("residual", residual)
    assert ("residual" in result.refused) != (folder / "residual").exists()
    export_delta(base, factors, folder / "delta")
    trained: list[Tensor] = []

    def delta() -> float:
        difference = _difference(logits(load_delta(load(), folder / "delta")), expected)
        # Another: on a CPU bitsandbytes packs a model anew that runs without gradients, and passes none after that.
        model = load_delta(load(), folder / "delta")
        trained.append(train(model))
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
        return _difference(logits(PeftModel.from_pretrained(load(), folder / "lora")), trained[0])

    def merged() -> float:
        export_merged(folder / "trained", factors, folder / "merged", base)
        return _difference(logits(kind.load(folder / "merged")), trained[0])

    result.try_("convert", converted)
    result.try_("merge", merged)
    return result


@torch.no_grad()
def _read(base: Path, model: Any, factors: FactorSet) -> float:
    """What the checkpoint's W is, and what the live layer computes: its outputs for the columns of the identity."""
    checkpoint, largest = open_checkpoint(base), 0.0
    model.train()(IDS)  # unpacks what compressed-tensors holds; in evaluation bitsandbytes would pack anew
    for name in factors:
        parameter, _, expert = name.partition(":")
        if expert:
            W = checkpoint.weights[parameter].read()[int(expert)].T
            live = model.get_parameter(parameter)[int(expert)]
        else:
            W = checkpoint.read(f"{name}.weight")
            live = model.get_submodule(name)(torch.eye(W.shape[1], dtype=model.dtype)).T
        largest = max(largest, _difference(live, W))
    return largest


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
    rows: list[str] = []
    for kind, result in runs(KINDS, outcome):
        rows.append(row(kind, result))
        print(rows[-1], *(f"  {step}: {reason}" for step, reason in result.refused.items()), sep="\n", flush=True)
    if len(rows) == len(KINDS):
        write(rows)


HEADER = """\
| stored as | live model | read | start live | residual | delta | convert | merge |
|---|---|---|---|---|---|---|---|
"""


def write(rows: list[str], file: Path = Path("docs/compatibility.md")) -> None:
    """Put these rows in place of the page's."""
    before, header, after = file.read_text(encoding="utf-8").partition(HEADER)
    assert header, f"{file} has lost the table's header"
    rest = after.splitlines()
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    file.write_text(before + header + "\n".join([*rows, *rest]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
