"""A language model on word problems: the shortcut for one core against a whole forward pass, and what a row says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.finetune import language
from bench.finetune.run import Run
from bench.finetune.training import finetune
from bench.finetune.word_problems import Problem

from .test_recipes import TINY, tokenizer

RUN = Run(
    "word-problems",
    "inilora-beta-uniform",
    lr=1e-2,
    seed=11,
    rank=2,
    form="delta",
    first_layer=1,
    train_size=4,
    evaluation_size=3,
    max_length=64,
    batch_size=2,
    max_steps=2,
)


def some_problems(part: str, size: int) -> list[Problem]:
    made = [Problem(at % 2, f"{at} + 1?", f"{at} + 1 = {at + 1}\n#### {at + 1}") for at in range(size)]
    # Too long, and left out.
    return [Problem(9, "x" * 80, "#### 0"), *made]


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    settings = {**TINY, "num_hidden_layers": 2}
    config = LlamaConfig(**settings, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(pairs=False).save_pretrained(tmp_path)
    monkeypatch.setattr(language, "problems", some_problems)
    monkeypatch.setattr(language, "EXACT", 3)
    monkeypatch.setattr(language, "NEW_TOKENS", 4)
    return tmp_path


def test_the_loss_is_that_of_a_whole_forward_pass(llama: Path) -> None:
    row = finetune(Run(**{**RUN.record(), "lr": 0.0}), llama, None)
    network = LlamaForCausalLM.from_pretrained(llama)
    expected = []
    for problem in some_problems("test", 3)[1:]:
        prompt, answer = (tokenizer(pairs=False)(text)["input_ids"] for text in (problem.prompt, problem.worked))
        ids = torch.tensor([[*prompt, *answer, 2]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            expected.append(float(network(input_ids=ids, labels=labels).loss))
    # Five decimals are kept; without a learning rate the factors leave the model as it was.
    assert row["per_example"] == pytest.approx(expected, abs=1e-5)
    assert row["groups"] == [0, 1, 0]


def test_a_row_has_every_answer_and_what_would_have_been_right(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.from_record({**RUN.record(), "evaluations": ["exact-match"]})
    # The model's words replaced: right for one problem of four.
    said = iter(["so #### 1", "7", "#### 7 pens", "#### 8"])
    monkeypatch.setattr(type(tokenizer(pairs=False)), "batch_decode", lambda _, ids, **__: [next(said) for _ in ids])
    row = json.loads(json.dumps(finetune(run, llama, None)))
    assert [step for step, _ in row["training_loss"]] == [1, 2]
    assert row["answers"] == [[0, "1", "1"], [1, None, "2"], [0, "7", "3"], [9, "8", "0"]]
    assert row["scores"]["exact-match"] == fmean([1, 0, 0, 0])
