"""The README and the pages on trainers, run from their own text.

Blocks are run in order, in one folder with `model` and `reviews.csv` in it. A block marked `not-run-here` needs a
program that these tests do not have; before one marked `after-training` its result is put in place by PEFT, which those
programs train through.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertLMHeadModel,
)

from bench.movie_reviews import Review
from inilora_kernels import initialize_peft
from inilora_kernels.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "trainers").glob("*.md"))
_FENCE = re.compile(r"^```(\w+)(?: ([\w-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    text: str


Run = Callable[[Block], dict[str, Any]]


def blocks(page: str) -> list[Block]:
    places = {"README.md": DOCS.parent, "guide.md": DOCS}
    text = (places.get(page, DOCS / "trainers") / page).read_text(encoding="utf-8")
    return [Block(language, mark, content) for language, mark, content in _FENCE.findall(text)]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages factorize the same model: once is enough."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path, own_cache: Path, reviews: list[Review]
) -> Path:
    monkeypatch.setenv("INILORA_CACHE", str(shared_cache))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with (tmp_path / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([review.text, int(review.rating > 0)] for review in reviews[:64])
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true", "--bf16", "false"]

    def run_block(block: Block) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "page"}
        if block.language == "yaml":
            Path("train.yaml").write_text(block.text, encoding="utf-8")
        if block.language == "python":
            monkeypatch.setattr("sys.argv", ["train.py", "--config", "train.yaml", *on_cpu])
            exec(compile(block.text, "page", "exec"), names)
        for command in block.text.splitlines() if block.language == "bash" else ():
            arguments = shlex.split(command)
            assert arguments[0] == "inilora", command
            monkeypatch.setattr("sys.argv", arguments)
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, command
        return names

    return run_block


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None])[0].clone()


def same(one: nn.Module, other: nn.Module) -> bool:
    return torch.allclose(output(one), output(other), rtol=0, atol=1e-4)


def test_readme(run: Run, minilm: Path, folder: Path) -> None:
    (folder / "model").symlink_to(minilm)
    for block in blocks("README.md"):
        if block.mark == "after-training":
            trained = PeftModel.from_pretrained(AutoModel.from_pretrained("start/base"), "start/adapter")
            trained.save_pretrained("trained")
        names = run(block)
        if "model" in names:
            assert torch.equal(output(names["model"]), output(AutoModel.from_pretrained(minilm)))
            assert names["optimizer"].param_groups[0]["params"]
    assert same(AutoModel.from_pretrained("merged"), AutoModel.from_pretrained(minilm))


def test_notebook(minilm: Path, folder: Path) -> None:
    """Its code cells in order, each last line as a notebook would show it."""
    (folder / "model").symlink_to(minilm)
    cells = json.loads((DOCS / "example.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            *lines, last = ast.parse("".join(cell["source"])).body
            assert isinstance(last, ast.Expr)
            exec(compile(ast.Module(lines, []), "notebook", "exec"), names)
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
    factors, one, kept, attached = shown
    assert "384×384" in factors._repr_html_()
    assert one[2] < 1e-7
    assert list(kept) == [2, 8, 32]
    assert attached == (True, 12 * 2 * 8 * 384)


def test_every_file_that_the_pages_on_the_house_name_is_there() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for named in re.findall(r"`([\w./]+/[\w./]*|\w+\.py)`", text):
        places = [DOCS.parent / named, DOCS.parent / "inilora_kernels" / named]
        assert any(place.exists() for place in places) or "NAME" in named, named


def test_contributing_lists_every_make_target() -> None:
    targets = re.findall(r"^([\w-]+):", (DOCS.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [target for target in targets if f"`make {target}`" not in listed] == []


def test_every_benchmark_that_runs_by_itself_is_a_daily_command() -> None:
    commands = [(DOCS.parent / name).read_text(encoding="utf-8") for name in ("Makefile", "CONTRIBUTING.md")]
    for file in (DOCS.parent / "bench").glob("*.py"):
        if "__main__" in file.read_text(encoding="utf-8"):
            assert any(re.search(rf"-m bench\.{file.stem}\b", text) for text in commands), file.stem


def test_peft(run: Run, minilm: Path, folder: Path) -> None:
    (folder / "model").symlink_to(minilm)
    done = [run(block) for block in blocks("peft.md")]
    _, live, _, merged, _, residual, _, _, delta, plain, _ = [names.get("model") for names in done]
    original = AutoModel.from_pretrained(minilm)
    assert same(live, merged)
    assert not same(live, original)
    for model in (residual, delta, plain):
        assert same(model, original)
        assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    for name in ("residual-lora", "delta-lora"):
        assert same(PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), name), original)
    assert same(AutoModel.from_pretrained("delta-merged"), original)


def test_guide(run: Run, minilm: Path, folder: Path) -> None:
    config = AutoConfig.from_pretrained(minilm, is_decoder=True)
    BertLMHeadModel.from_pretrained(minilm, config=config).save_pretrained("model")
    AutoTokenizer.from_pretrained(minilm).save_pretrained("model")
    names = [run(block) for block in blocks("guide.md") if block.mark != "not-run-here"]
    trained, loaded, merged = (names[place][name] for place, name in ((4, "model"), (5, "loaded"), (7, "merged")))
    assert not same(trained, AutoModelForCausalLM.from_pretrained("model"))
    assert same(loaded, trained)
    assert same(merged, trained)
    assert Path("factors.png").stat().st_size > 10_000


def test_transformers(run: Run, minilm: Path, folder: Path) -> None:
    (folder / "model").symlink_to(minilm)
    _, _, trained, _, served = [run(block) for block in blocks("transformers.md")]
    assert same(served["classify"].model, trained["model"])
    assert not same(AutoModelForSequenceClassification.from_pretrained("base"), trained["model"])


def test_trl(run: Run, minilm: Path, folder: Path) -> None:
    config = AutoConfig.from_pretrained(minilm, is_decoder=True)
    BertLMHeadModel.from_pretrained(minilm, config=config).save_pretrained("model")
    AutoTokenizer.from_pretrained(minilm, eos_token="[SEP]").save_pretrained("model")
    _, trained, _, _, by_yaml, preferred, _, residual = [run(block) for block in blocks("trl.md")]
    original = AutoModelForCausalLM.from_pretrained("model")
    assert same(residual["model"], original)
    assert not same(trained["model"], original)
    assert same(PeftModel.from_pretrained(original, "lora"), trained["model"])
    assert same(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "from-yaml"), by_yaml["trainer"].model
    )
    assert preferred["dpo"].state.log_history[-1]["train_loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_lightning(run: Run, minilm: Path, folder: Path) -> None:
    (folder / "model").symlink_to(minilm)
    _, trained, _ = [run(block) for block in blocks("lightning.md")]
    original = AutoModel.from_pretrained(minilm)
    assert not same(trained["module"].model, original)
    assert same(PeftModel.from_pretrained(original, "lora"), trained["module"].model)
    assert same(AutoModel.from_pretrained("merged"), trained["module"].model)


@pytest.mark.parametrize("page", ["llama_factory.md", "axolotl.md", "ms_swift.md", "unsloth.md", "torchtune.md"])
def test_trainers_that_are_not_here(page: str, run: Run, llama: Path, folder: Path) -> None:
    (folder / "model").symlink_to(llama)
    original = AutoModelForCausalLM.from_pretrained(llama)
    model = None
    for block in blocks(page):
        if block.mark == "after-training":
            model.save_pretrained("trained")
            run(block)
            assert same(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), "lora"), model)
        elif block.language == "yaml" or (page, block.language, block.mark) in OF_A_FOLDER:
            model = load(page, block, run)
            assert same(model, original)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    assert parameter.requires_grad
                    parameter.data.mul_(1.1).add_(1e-3)  # stands for training
            assert not same(model, original)
        elif block.mark != "not-run-here":
            names = run(block)
            if "start" in names:
                check_rows(names["start"])
    assert model is not None


# Python that stands for what a trainer does with a folder.
OF_A_FOLDER = {("unsloth.md", "python", "not-run-here"), ("ms_swift.md", "python", "")}


def load(page: str, block: Block, run: Run) -> PeftModel:
    """The model that the page's trainer starts from, loaded as its source does it."""
    if page == "ms_swift.md":
        return run(block)["model"]
    if page == "unsloth.md":
        adapter = re.search(r'from_pretrained\("([^"]+)"', block.text)[1]
        return AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)
    config = yaml.safe_load(block.text)
    if "lora_model_dir" not in config and "adapter_name_or_path" not in config and page != "torchtune.md":
        return started(config)
    if page == "llama_factory.md":
        base, adapters = config["model_name_or_path"], config["adapter_name_or_path"].split(",")
    elif page == "axolotl.md":
        base, adapters = config["base_model"], [config["lora_model_dir"]]
    else:
        base, adapters = config["checkpointer"]["checkpoint_dir"], ["residual/adapter"]
        assert all((Path(base) / file).is_file() for file in config["checkpointer"]["checkpoint_files"])
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model = PeftModel.from_pretrained(model, adapters[-1], is_trainable=True)
    lora = model.peft_config["default"]
    lines = config.get("model", {}) | config
    for name, value in (("lora_r", lora.r), ("lora_rank", lora.r), ("lora_alpha", lora.lora_alpha)):
        assert lines.get(name, value) == value
    for name in ("lora_target_modules", "lora_attn_modules"):
        assert set(lines.get(name, lora.target_modules)) == set(lora.target_modules)
    return model


def started(config: dict[str, Any]) -> PeftModel:
    """The model that a trainer makes of its YAML without any adapter, started as our callback does it."""
    targets = config.get("lora_target_modules") or config["lora_target"].split(",")
    model = AutoModelForCausalLM.from_pretrained(config.get("base_model") or config["model_name_or_path"])
    lora = LoraConfig(
        r=config.get("lora_r") or config["lora_rank"], lora_alpha=config["lora_alpha"], target_modules=targets
    )
    return initialize_peft(get_peft_model(model, lora), "factors.safetensors")


def check_rows(start: dict[str, Tensor]) -> None:
    """torchtune's names, and its order of rows turned back into the model's (4 heads, 2 of keys, of 8)."""
    adapter = load_file("residual/adapter/adapter_model.safetensors")
    assert len(start) == len(adapter) == 8
    for layer in range(2):
        for projection in ("q_proj", "v_proj"):
            for ours, theirs in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
                expected = adapter[f"base_model.model.model.layers.{layer}.self_attn.{projection}.{ours}.weight"]
                found = start[f"layers.{layer}.attn.{projection}.{theirs}.weight"]
                if (projection, ours) == ("q_proj", "lora_B"):
                    assert not torch.equal(found, expected)
                    found = torch.cat([found[8 * head + odd : 8 * head + 8 : 2] for head in range(4) for odd in (0, 1)])
                assert torch.equal(found, expected)


def test_every_page_is_tested_and_linked() -> None:
    tested = {"peft.md", "transformers.md", "trl.md", "lightning.md"}
    tested |= {"llama_factory.md", "axolotl.md", "ms_swift.md", "unsloth.md", "torchtune.md"}
    assert {page.name for page in PAGES} == tested
    overview = (DOCS / "adapters.md").read_text(encoding="utf-8")
    assert all(f"(trainers/{page})" in overview for page in tested)


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    """mkdocs says of a page that its navigation lacks that it is not there, and goes on."""

    def pages(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        return [page for entry in (entries.values() if isinstance(entries, dict) else entries) for page in pages(entry)]

    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    # What docs/site/hooks.py makes of files at the repository's root, and of the notebook.
    made = {"index.md", "contributing.md", "changelog.md", "example.md"}
    assert sorted(pages(site["nav"])) == sorted({str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | made)


def test_links_to_elsewhere_are_whole() -> None:
    """Without a network no more can be known of them; links inside are checked by mkdocs."""
    files = [*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb"), *DOCS.parent.glob("*.md"), DOCS.parent / "mkdocs.yml"]
    found = {url for file in files for url in re.findall(r"https?://[^\s)>\"`]+", file.read_text(encoding="utf-8"))}
    assert found == {
        "https://arxiv.org/abs/2510.03731",
        "https://download.pytorch.org/whl/cpu",
        "https://github.com/huggingface/peft",
        "https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA",
        "https://semver.org",
    }
