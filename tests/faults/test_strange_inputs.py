"""The fault campaign, on inputs that are whole and wrong: pipes, links, foreign tensors, options at the ends of ranges.

Each call of the command line ends with the status that it should, with one line where that is 2; nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from inilora_kernels import FactorSet, approximate_model, export_delta
from inilora_kernels.cli.main import main
from inilora_kernels.storage.authors_folder import save_inilora_pt

from .test_campaign import remove, snapshot

pytestmark = pytest.mark.slow

APPROXIMATE = "approximate {0}/model -o {1} --rank 2 --solver krylov --no-progress"
ADAM = "approximate {0}/model -o {1} --rank 2 --steps 3 --no-progress"
DELTA = "export {0}/factors.safetensors --base {0}/model -o {1} --form delta"
RESIDUAL = "export {0}/factors.safetensors --base {0}/model -o {1}"
CONVERT = "convert {0}/delta/adapter --init {0}/factors.safetensors --base {0}/model -o {1}"
MERGE = CONVERT.replace("convert", "merge")
INSPECT = "inspect {0}/factors.safetensors"
AUTHORS = "inspect {0}/authors --base {0}/model"
Spoil = Callable[[Path], None]
QUERY = "model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def adapter(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "delta/adapter/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model/model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model/model.safetensors")

    return spoil


def query(value: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return weights(lambda tensors: tensors.update({f"{QUERY}.weight": value(tensors[f"{QUERY}.weight"]).contiguous()}))


def as_bin(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model/model.safetensors")
        tensors[f"{QUERY}.weight"] = change(tensors[f"{QUERY}.weight"])
        torch.save(tensors, folder / "model/pytorch_model.bin")
        (folder / "model/model.safetensors").unlink()

    return spoil


def authors(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / f"authors/{QUERY}.weight.pt"
        content = torch.load(file)
        torch.save({**content, "A": change(content["A"])}, file)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        remove(folder / name)
        os.mkfifo(folder / name)

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        remove(folder / name)
        (folder / name).symlink_to(target)

    return spoil


def index(**weight_map: str) -> Spoil:
    """Shards by an index: every tensor in `real`, some others elsewhere."""

    def spoil(folder: Path) -> None:
        model = folder / "model"
        (model / "model.safetensors").rename(model / "real.safetensors")
        shutil.copy(model / "real.safetensors", folder / "outside.safetensors")
        names = dict.fromkeys(load_file(model / "real.safetensors"), "real.safetensors")
        there = {**names, f"{QUERY}.weight": weight_map["query"].format(folder)}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": there}))

    return spoil


def header(change: Callable[[dict[str, Any]], None], padding: bytes = b"") -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model/model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode() + padding
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


def distributed(folder: Path) -> None:
    tensors = load_file(folder / "model/model.safetensors")
    shutil.rmtree(folder / "model")
    dcp.save(tensors, checkpoint_id=folder / "model", no_dist=True)
    pipe("model/__0_0.distcp")(folder)


def nothing(folder: Path) -> None:
    pass


def overlapping(entries: dict[str, Any]) -> None:
    first, second = [name for name in entries if "q_proj" in name][:2]
    entries[first]["data_offsets"] = entries[second]["data_offsets"]


# What is spoiled, the command, and the status that it must end with.
CASES: dict[str, tuple[Spoil, str, int]] = {
    "quantization_config is text": (config(quantization_config="nonsense"), APPROXIMATE, 2),
    "quant_method is an object": (config(quantization_config={"quant_method": {"a": 1}}), APPROXIMATE, 0),
    "no architectures": (config(architectures=[]), APPROXIMATE, 0),
    "an unknown model_type": (config(model_type="no-such", architectures=["X"]), APPROXIMATE, 0),
    "no heads": (config(num_attention_heads=0), APPROXIMATE, 2),
    "a vocabulary of -5": (config(vocab_size=-5), APPROXIMATE, 2),
    "a layer count without an end": (config(num_hidden_layers=10**9), APPROXIMATE, 2),
    "config.json with a byte order mark": (
        lambda folder: (
            (folder / "model/config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "model/config.json").read_bytes())
            and None
        ),
        APPROXIMATE,
        2,
    ),
    "an index that leaves the folder": (index(query="../outside.safetensors"), APPROXIMATE, 2),
    "an index with a full path": (index(query="{0}/outside.safetensors"), APPROXIMATE, 2),
    "an index with no such shard": (index(query="absent.safetensors"), APPROXIMATE, 2),
    "an index of a folder": (index(query="."), APPROXIMATE, 2),
    "two tensors in one place": (header(overlapping), APPROXIMATE, 2),
    "a header padded with spaces": (header(lambda _: None, b" " * 64), APPROXIMATE, 0),
    "a header padded with null bytes": (header(lambda _: None, b"\0" * 64), APPROXIMATE, 2),
    "a negative size": (
        header(lambda entries: entries[f"{QUERY}.weight"].update(shape=[-32, -32])),
        APPROXIMATE,
        2,
    ),
    "sizes whose product leaves 64 bits": (
        header(lambda entries: entries[f"{QUERY}.weight"].update(shape=[2**40, 2**40])),
        APPROXIMATE,
        2,
    ),
    "a query of one row": (query(lambda W: W[:1]), APPROXIMATE, 2),
    "a query without rows": (query(lambda W: W[:0]), APPROXIMATE, 2),
    "a query of three dimensions": (query(lambda W: W[None]), APPROXIMATE, 2),
    "a query of integers": (query(lambda W: W.to(torch.int64)), APPROXIMATE, 2),
    "a query of complex numbers": (query(lambda W: W.to(torch.complex64)), APPROXIMATE, 2),
    "a query of zeros": (query(torch.zeros_like), APPROXIMATE, 0),
    "a query of one value": (query(torch.ones_like), ADAM, 0),
    "a query of float32's largest": (query(lambda W: torch.full_like(W, 3.4e38)), APPROXIMATE, 2),
    "a query of subnormal numbers": (query(lambda W: torch.full_like(W, 1e-40)), APPROXIMATE, 2),
    "a query with one NaN": (query(lambda W: W.index_fill(0, torch.tensor([3]), float("nan"))), ADAM, 2),
    "names with escapes": (
        weights(lambda tensors: tensors.update({"\n\x1b[31m😀.q_proj.weight": torch.ones(8, 8)})),
        APPROXIMATE,
        0,
    ),
    "a sparse tensor in a .bin": (as_bin(torch.Tensor.to_sparse), APPROXIMATE, 2),
    "a tensor without values in a .bin": (as_bin(lambda W: W.to("meta")), APPROXIMATE, 2),
    "a complex tensor in a .bin": (as_bin(lambda W: W.to(torch.complex64)), APPROXIMATE, 2),
    "a nested tensor in a .bin": (as_bin(lambda W: torch.nested.nested_tensor([W, W[:3]])), APPROXIMATE, 2),
    "a transposed tensor in a .bin": (as_bin(lambda W: W.T.contiguous().T), APPROXIMATE, 0),
    "an expanded tensor in a .bin": (as_bin(lambda W: torch.ones(1).expand(70_000, 70_000)), APPROXIMATE, 2),
    "parts of DCP in a pipe": (distributed, APPROXIMATE, 2),
    "authors' A is sparse": (authors(torch.Tensor.to_sparse), AUTHORS, 2),
    "authors' A is complex": (authors(lambda A: A.to(torch.complex64)), AUTHORS, 2),
    "authors' A has no values": (authors(lambda A: A.to("meta")), AUTHORS, 2),
    "authors' A has NaN": (authors(lambda A: A * float("nan")), AUTHORS, 2),
    "authors' file is a pipe": (pipe(f"authors/{QUERY}.weight.pt"), AUTHORS, 2),
    "config.json is a pipe": (pipe("model/config.json"), RESIDUAL, 2),
    "the tokenizer is a pipe": (pipe("model/tokenizer.json"), RESIDUAL, 2),
    "the tokenizer is a dead link": (link("model/tokenizer.json", "nowhere"), RESIDUAL, 2),
    "the tokenizer is a link to a device": (link("model/tokenizer.json", "/dev/zero"), RESIDUAL, 2),
    "the tokenizer is a link to a folder": (link("model/tokenizer.json", "/proc"), RESIDUAL, 2),
    "weights are a link to themselves": (link("model/model.safetensors", "model.safetensors"), APPROXIMATE, 2),
    "adapter_config.json is a pipe": (pipe("delta/adapter/adapter_config.json"), CONVERT, 2),
    "adapter's weights are a device": (link("delta/adapter/adapter_model.safetensors", "/dev/zero"), MERGE, 2),
    "diffusers' name beside PEFT's": (
        link("delta/adapter/pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
        CONVERT,
        2,
    ),
    "an adapter of a device": (
        adapter(base_model_name_or_path="/dev/zero"),
        CONVERT.replace("--base {0}/model ", ""),
        2,
    ),
    "an adapter of a name with a null byte": (
        adapter(base_model_name_or_path="a\0b"),
        CONVERT.replace("--base {0}/model ", ""),
        2,
    ),
    "an adapter of a long name": (
        adapter(base_model_name_or_path="x" * 5000),
        CONVERT.replace("--base {0}/model ", ""),
        2,
    ),
    "lora_alpha 1e308": (adapter(lora_alpha=1e308), MERGE, 2),
    "lora_alpha 1e-308": (adapter(lora_alpha=1e-308), MERGE, 2),
    "lora_alpha text": (adapter(lora_alpha="8"), CONVERT, 2),
    "patterns that are lists": (adapter(alpha_pattern=[1]), CONVERT, 2),
    "a pattern that is no expression": (adapter(alpha_pattern={"(": 2}), CONVERT, 2),
    "DoRA": (adapter(use_dora=True), MERGE, 2),
    "factors are a model": (link("factors.safetensors", "model/model.safetensors"), INSPECT, 2),
    "factors are a device": (link("factors.safetensors", "/dev/zero"), INSPECT, 2),
    "factors are a pipe": (pipe("factors.safetensors"), DELTA, 2),
    "start is a pipe": (pipe("factors.safetensors"), f"{APPROXIMATE} --start {{0}}/factors.safetensors", 2),
    "start is a model": (nothing, f"{APPROXIMATE} --start {{0}}/model/model.safetensors", 2),
    **{
        f"approximate {option}": (nothing, f"{ADAM} {option}", 2)
        for option in (
            *("--rank 0", "--rank -1", "--rank 1000000000", "--rank 2,2", "--rank energy:2", "--rank energy:nan"),
            *(
                "--steps -1",
                "--steps 100000000000",
                "--lr nan",
                "--lr 0",
                "--lr 1e300",
                "--lr inf",
                "--gamma 1e300 --step-size 1",
            ),
            *("--step-size 0", "--tol nan", "--tol -1", "--init-std inf", "--init-std 1e-40", "--seed -1"),
            *("--concurrency 0", "--checkpoint-steps 4", "--checkpoint-steps -1", "--device cuda:99", "--device x"),
            *("--loss x", "--solver x", "--method x", "--backend x", "--rank-pattern (=2", "--rank-pattern none=2"),
            *("-t (", "-t nothing", "--target-parameters nothing", "--plot {0}/plot.txt", "--plot {0}/none/plot.png"),
        )
    },
    **{
        f"export {option}": (nothing, f"{DELTA} {option}", 2)
        for option in (
            *("--lora-alpha nan", "--lora-alpha inf", "--lora-alpha 0", "--lora-alpha -1", "--lora-alpha 1e308"),
            *("--lora-dropout 1", "--lora-dropout nan", "--lora-dropout -0.1", "--task-type x", "--format x"),
        )
    },
    "a seed of 100 bits": (nothing, f"{ADAM} --seed {2**100}", 0),
    "convert --rank 0": (nothing, f"{CONVERT} --rank 0", 2),
    "convert --rank 1000000000": (nothing, f"{CONVERT} --rank 1000000000", 2),
    "an output that names a folder": (nothing, APPROXIMATE.replace("{1}", "{1}/"), 2),
    "an output in the model's place": (nothing, APPROXIMATE.replace("{1}", "{0}/model/model.safetensors"), 2),
    "an output in the config's place": (nothing, APPROXIMATE.replace("{1}", "{0}/model/config.json"), 2),
    "an output on a device": (nothing, APPROXIMATE.replace("{1}", "/dev/null"), 2),
    "an export into the model": (nothing, RESIDUAL.replace("{1}", "{0}/model"), 2),
    "an export onto a file": (nothing, RESIDUAL.replace("{1}", "{0}/factors.safetensors"), 2),
    "an export below a file": (nothing, DELTA.replace("{1}", "{0}/factors.safetensors/x"), 2),
    "an export of a long name": (nothing, DELTA.replace("{1}", "{1}" + "x" * 300), 2),
    "a merge into the adapter": (nothing, MERGE.replace("{1}", "{0}/delta/adapter"), 2),
}
COUNTS: Counter[int] = Counter()


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(llama, folder / "model")
    factors = approximate_model(folder / "model", 2, solver="krylov", cache=False, progress=False)
    factors.save(folder / "factors.safetensors")
    export_delta(folder / "model", factors, folder / "delta")
    save_inilora_pt(FactorSet.load(folder / "factors.safetensors"), folder / "authors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    print(f"\nstrange inputs: {dict(COUNTS)}")


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_strange_inputs(
    whole: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, command, expected = CASES[name]
    folder, out = tmp_path / "inputs", tmp_path / "out"
    shutil.copytree(whole, folder)
    spoil(folder)
    inputs = snapshot(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["inilora", *(word.format(folder, out) for word in command.split())])
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    said = capsys.readouterr().err
    problems = [line for line in said.splitlines() if line.startswith("inilora: ") and "warning" not in line]
    by_typer = "Error" in said and "Usage" in said
    assert status == expected, said
    assert expected == 0 or len(problems) == 1 or by_typer, said
    assert snapshot(folder) == inputs
    left = {path.name for path in tmp_path.iterdir()} - {"inputs", "cache"}
    assert left == ({"out"} if expected == 0 and "-o" in command else set())
    assert expected or fits(folder / "model", FactorSet.load(out))
    COUNTS[status] += 1


def fits(model: Path, factors: FactorSet) -> bool:
    """Whether each loss is ||W - BA||² of the weight that torch or safetensors reads there."""
    file = model / "model.safetensors"
    stored = load_file(file) if file.exists() else torch.load(model / "pytorch_model.bin", weights_only=True)
    for name, part in factors.items():
        W = stored[f"{name}.weight"].double()
        loss = float((W - part.product().double()).square().sum())
        # The loss is summed in float32.
        if not abs(loss - part.certificate.loss) <= 1e-4 * float(W.square().sum()):
            return False
    return True
