"""A language model fine-tuned on word problems, cheaply enough for one core.

Adapters sit in the layers from `first_layer` on. What the layers below compute for a problem is the same in every run,
so it is computed once, and a step starts from it: exact, as nothing below trains. The vocabulary's logits are
computed for the answers' tokens alone.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from ..movie_reviews import movie_reviews
from .rows import Row
from .run import Run
from .systems import prepare
from .word_problems import Problem, problems

# Sentences of the movie reviews, by whose loss forgetting is seen; problems that exact match is measured on.
OUTSIDE, EXACT, NEW_TOKENS = 32, 200, 192
_AT_ONCE, _ASKED_AT_ONCE = 16, 40


@dataclass(frozen=True)
class Example:
    """A problem's tokens, where its answer starts among them, and what the layers below `first_layer` make of them.

    activations: (tokens, hidden), in the base model's dtype.
    """

    problem: Problem
    tokens: Tensor
    answer: int
    activations: Tensor


def finetune_language(run: Run, model: Path) -> Row:
    """Train on the 70 templates; measure the answers' loss on new problems of theirs and on the 15 held out.

    A part's loss is the mean over its problems of the mean loss of an answer's tokens.
    """
    begin = time.monotonic()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    assert run.train_size is not None
    assert run.evaluation_size is not None
    limits = {"first_layer": run.first_layer, "max_length": run.max_length}
    examples = partial(_examples, model, dtype=run.dtype, attention=run.attention, **limits)
    train = examples("train", run.train_size)
    validation = examples("validation", run.evaluation_size)
    test = examples("test", run.evaluation_size) if run.test else []
    network, found = prepare(run, model, 0)
    network.config.use_cache = False
    prepared = time.monotonic()
    history = _train(network, run, train)
    trained = time.monotonic()
    metrics: dict[str, dict[str, float]] = {"validation": {"loss": fmean(_losses(network, run, validation))}}
    per_example: list[float] = []
    if run.test:
        per_example = _losses(network, run, test)
        metrics["test"] = {"loss": fmean(per_example), "outside loss": _outside_loss(network, model)}
    answers: list[tuple[int, str | None, str | None]] = []
    for name in run.evaluations:
        assert name == "exact-match", name
        answers = _answers(network, model)
        metrics["test"][name] = fmean(found == expected for _, found, expected in answers)
    done = time.monotonic()
    return {
        "run": run.record(),
        "scores": metrics.get("test", {}),
        "validation_score": -metrics["validation"]["loss"],
        "metrics": metrics,
        "per_example": [round(value, 5) for value in per_example],
        "groups": [example.problem.template for example in test],
        "answers": answers,
        "training_loss": history,
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "factors": found,
        "examples": {"train": len(train), "validation": len(validation), "test": len(test)},
        "seconds": {"prepare": prepared - begin, "train": trained - prepared, "evaluate": done - trained},
        "transformers": transformers.__version__,
    }


@lru_cache(maxsize=4)
def _examples(
    model: Path, part: str, size: int, *, dtype: str, attention: str | None, first_layer: int, max_length: int
) -> list[Example]:
    """Problems of at most max_length tokens, with the activations below first_layer."""
    tokenizer = _tokenizer(model)
    options = {} if attention is None else {"attn_implementation": attention}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    found = []
    for problem in problems(part, 2 * size):
        prompt = tokenizer(problem.prompt)["input_ids"]
        tokens = torch.tensor(prompt + tokenizer(problem.worked + tokenizer.eos_token)["input_ids"])
        if len(tokens) <= max_length and len(found) < size:
            with torch.no_grad(), _only(network, slice(0, first_layer), norm=False):
                activations = network.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
            found.append(Example(problem, tokens, len(prompt), activations.clone()))
    return found


def _train(network: Any, run: Run, examples: Sequence[Example]) -> list[list[float]]:
    """`max_steps` steps over the examples, in an order that the seed decides; every step's loss."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.lr, weight_decay=run.weight_decay)
    warmup = math.ceil(run.warmup_ratio * run.max_steps)
    schedule = get_scheduler(run.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=run.max_steps)
    history = []
    network.train()
    for step, batch in enumerate(_batches(examples, run), 1):
        loss = torch.cat(_token_losses(network, run, batch)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, run.max_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append([step, float(loss.detach())])
    return history


def _batches(examples: Sequence[Example], run: Run) -> Iterator[list[Example]]:
    """Batches of similar length, so that little is padded; each example once before any comes again."""
    draw = random.Random(run.seed)
    size = run.batch_size
    left: list[list[Example]] = []
    for _ in range(run.max_steps):
        if not left:
            order = draw.sample(list(examples), len(examples))
            for start in range(0, len(order) - size + 1, 4 * size):
                together = sorted(order[start : start + 4 * size], key=lambda example: len(example.tokens))
                left += [together[at : at + size] for at in range(0, len(together) - size + 1, size)]
            draw.shuffle(left)
        yield left.pop()


def _token_losses(network: Any, run: Run, batch: Sequence[Example]) -> list[Tensor]:
    """The loss of every token of each example's answer."""
    mask = pad_sequence([torch.ones(len(example.tokens), dtype=torch.long) for example in batch], batch_first=True)
    inputs = pad_sequence([example.activations for example in batch], batch_first=True)
    rows, places, targets = [], [], []
    for row, example in enumerate(batch):
        answer = len(example.tokens) - example.answer
        rows += [row] * answer
        places += range(example.answer - 1, len(example.tokens) - 1)
        targets.append(example.tokens[example.answer :])
    with _only(network, slice(run.first_layer, None)), torch.autocast("cpu", torch.bfloat16, run.dtype == "bfloat16"):
        hidden = network.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        logits = network.lm_head(hidden[rows, places])
    losses = nn.functional.cross_entropy(logits.float(), torch.cat(targets), reduction="none")
    return list(losses.split([len(target) for target in targets]))


@torch.no_grad()
def _losses(network: Any, run: Run, examples: Sequence[Example]) -> list[float]:
    """The mean loss of each example's answer, in the order of the examples."""
    network.eval()
    by_length = sorted(range(len(examples)), key=lambda at: len(examples[at].tokens))
    found = [math.nan] * len(examples)
    for start in range(0, len(by_length), _AT_ONCE):
        places = by_length[start : start + _AT_ONCE]
        for place, losses in zip(places, _token_losses(network, run, [examples[at] for at in places]), strict=True):
            found[place] = float(losses.mean())
    return found


@torch.no_grad()
def _outside_loss(network: Any, model: Path) -> float:
    """The mean loss of a token of the first sentences of the movie reviews."""
    tokenizer = _tokenizer(model)
    texts = [tokenizer.eos_token + review.text for review in movie_reviews()[:OUTSIDE]]
    total, tokens = 0.0, 0
    for start in range(0, len(texts), _AT_ONCE):
        batch = tokenizer(texts[start : start + _AT_ONCE], return_tensors="pt", padding=True, padding_side="right")
        with torch.autocast("cpu", torch.bfloat16, network.dtype == torch.bfloat16):
            logits = network(**batch, use_cache=False).logits[:, :-1]
        kept = batch["attention_mask"][:, 1:].bool()
        total += float(
            nn.functional.cross_entropy(logits[kept].float(), batch["input_ids"][:, 1:][kept], reduction="sum")
        )
        tokens += int(kept.sum())
    return total / tokens


@torch.no_grad()
def _answers(network: Any, model: Path) -> list[tuple[int, str | None, str | None]]:
    """Of each held-out problem the template, the number that the greedy answer ends in, and the right one."""
    tokenizer = _tokenizer(model)
    # Of similar length together, so that little is padded.
    asked = sorted(problems("test", EXACT), key=lambda problem: len(problem.prompt))
    answers = []
    network.config.use_cache = True
    for start in range(0, len(asked), _ASKED_AT_ONCE):
        batch = asked[start : start + _ASKED_AT_ONCE]
        prompts = tokenizer([one.prompt for one in batch], return_tensors="pt", padding=True, padding_side="left")
        with torch.autocast("cpu", torch.bfloat16, network.dtype == torch.bfloat16):
            said = network.generate(
                **prompts, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(said[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [
            (one.template, final_number(text), final_number(one.worked)) for text, one in zip(texts, batch, strict=True)
        ]
    network.config.use_cache = False
    return answers


def final_number(text: str) -> str | None:
    """What stands after "####", as written there.

    >>> final_number("3 + 4 = 7 pens\\n#### 7\\n"), final_number("7")
    ('7', None)
    """
    found = re.search(r"####\s*(\S+)", text)
    return found and found[1]


@contextmanager
def _only(network: Any, layers: slice, norm: bool = True) -> Iterator[None]:
    """The model with these layers alone, with or without the norm after the last."""
    body = network.model
    whole, last = body.layers, body.norm
    body.layers = whole[layers]
    body.norm = last if norm else nn.Identity()
    try:
        yield
    finally:
        body.layers, body.norm = whole, last


def _tokenizer(model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
