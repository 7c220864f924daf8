"""Data sets, tokenized once: GLUE's tasks, the movie reviews, and instructions for language models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..movie_reviews import movie_reviews
from . import prompts

# For each task of GLUE: its text columns and the metrics of evaluation.py, the score first.
GLUE = {
    "cola": (("sentence",), ("matthews",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "sst2": (("sentence",), ("accuracy",)),
}
MOVIES = {"movie-sentiment": ("accuracy",), "movie-rating": ("pearson", "spearman")}

# For each set of instructions: the file under the data folder, and how a row becomes text.
INSTRUCTIONS = {
    "metamathqa": ("MetaMathQA/MetaMathQA-395K.json", prompts.metamathqa),
    "codealpaca": ("CodeAlpaca-20k/code_alpaca_20k.json", prompts.codealpaca),
    "sharegpt": ("ShareGPT/ShareGPT_V3_unfiltered_cleaned_split.json", prompts.sharegpt),
}


@dataclass(frozen=True)
class Task:
    """The parts of a data set, tokenized, with labels, lengths and what is measured on them.

    labels: classes; 1: a regression; 0: a language model.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    labels: int
    metrics: tuple[str, ...]


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The model's, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@lru_cache(maxsize=4)
def load_task(
    name: str, model: Path, folder: Path | None, max_length: int, train_size: int | None, evaluation_size: int | None
) -> Task:
    """A data set by its name.

    folder: for GLUE holds `glue/{task}/` as on the Hugging Face hub, for instructions the files of INSTRUCTIONS; the
        movie reviews' own folder, or None for the cache.
    """
    tokenizer = load_tokenizer(model)
    if name in MOVIES:
        parts = _movies(name, folder, tokenizer, max_length)
        labels, metrics = (2 if name == "movie-sentiment" else 1), MOVIES[name]
    elif name in GLUE:
        assert folder is not None, f"{name}: give --data, a folder with glue/{name}/"
        parts = _glue(name, folder, tokenizer, max_length)
        labels, metrics = (1 if name == "stsb" else 2), GLUE[name][1]
    else:
        assert folder is not None, f"{name}: give --data, a folder with {INSTRUCTIONS[name][0]}"
        parts = {"train": _instructions(name, folder, tokenizer, max_length, train_size)}
        labels, metrics = 0, ()
    return Task(
        train=_first(parts["train"], train_size),
        validation=_by_length(_first(parts.get("validation"), evaluation_size)),
        test=_by_length(_first(parts.get("test"), evaluation_size)),
        labels=labels,
        metrics=metrics,
    )


def _movies(name: str, folder: Path | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Dataset]:
    """Sentences of at most max_length tokens, split by a hash of their text: half for training, a fifth for
    validation, the rest for the test. The two classes are ratings above and below 0.
    """
    # In the order of the hashes, because the release has the positive reviews first.
    places = {_place(review.text): review for review in movie_reviews(folder) if review.rating != 0}
    reviews = dict(sorted(places.items()))
    tokens = tokenizer([review.text for review in reviews.values()])["input_ids"]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for (place, review), ids in zip(reviews.items(), tokens, strict=True):
        part = "train" if place < 0.5 else "validation" if place < 0.7 else "test"
        if len(ids) <= max_length:
            label = int(review.rating > 0) if name == "movie-sentiment" else review.rating
            parts[part].append({"input_ids": ids, "labels": label})
    return {part: _dataset(examples) for part, examples in parts.items()}


def _place(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _glue(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Dataset]:
    """GLUE's training and validation parts; its test part has no labels."""
    columns = GLUE[name][0]
    parts = {}
    for part in ("train", "validation"):
        files = sorted(str(file) for file in (folder / "glue" / name).glob(f"{part}*.parquet"))
        assert files, f"{folder / 'glue' / name}: no {part}*.parquet there"
        rows = load_dataset("parquet", data_files=files, split="train")
        tokens = tokenizer(*(list(rows[column]) for column in columns), truncation=True, max_length=max_length)
        parts[part] = _dataset(
            {"input_ids": ids, "labels": label} for ids, label in zip(tokens["input_ids"], rows["label"], strict=True)
        )
    return parts


def _instructions(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, size: int | None
) -> Dataset:
    """The first rows as text; what is learned are the answers."""
    file, text_of = INSTRUCTIONS[name]
    rows = load_dataset("json", data_files=str(folder / file), split="train")
    examples = []
    for row in rows.select(range(min(size or len(rows), len(rows)))):
        ids, labels = _tokenize(text_of(row, str(tokenizer.eos_token)), tokenizer)
        if any(label != -100 for label in labels[:max_length]):
            examples.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return _dataset(examples)


def _tokenize(pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the whole text, and the labels: -100, no label, up to as many tokens as what comes before an answer
    has by itself, as the authors' code counts them.
    """
    ids: list[int] = list(tokenizer("".join(text for text, _ in pieces))["input_ids"])
    labels = [-100] * len(ids)
    before, start = "", 0
    for text, learned in pieces:
        before += text
        end = len(tokenizer(before)["input_ids"])
        if learned:
            labels[start:end] = ids[start:end]
        start = end
    return ids, labels


def _dataset(examples: Iterable[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{**example, "length": len(example["input_ids"])} for example in examples])


def _first(part: Dataset | None, size: int | None) -> Any:
    return part if part is None or size is None else part.select(range(min(size, len(part))))


def _by_length(part: Dataset | None) -> Dataset | None:
    """Longest first, so that an evaluation batch pads little; no metric depends on the order."""
    return part if part is None else part.sort("length", reverse=True)
