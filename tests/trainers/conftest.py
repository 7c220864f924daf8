"""A task on real text for every trainer: is a movie review's sentence positive?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from bench.movie_reviews import Review

STEPS = 16
BATCH = 8
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def same_start() -> None:
    set_seed(0)


@pytest.fixture(scope="session")
def clear_reviews(reviews: list[Review]) -> list[Review]:
    """As many as one run sees, of those on which people agreed that they are positive or negative."""
    return [review for review in reviews if abs(review.rating) > 1.5 and len(review.text) < 120][: STEPS * BATCH]


@pytest.fixture(scope="session")
def classifier(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a new head for two classes, saved: the base of every run."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(minilm: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def dataset(clear_reviews: list[Review], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """input_ids, attention_mask, labels: rows of one length, so that a batch needs no more padding."""
    encoded = tokenizer([review.text for review in clear_reviews], padding="max_length", truncation=True, max_length=32)
    labels = [int(review.rating > 0) for review in clear_reviews]
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": labels}).with_format("torch")


@pytest.fixture
def logits(dataset: Dataset) -> Logits:
    """What a model says of the first reviews."""

    def of(model: nn.Module) -> Tensor:
        rows = dataset[:8]
        with torch.no_grad():
            return model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.clone()

    return of
