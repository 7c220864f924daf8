"""How the authors' public code puts instructions into text, for each data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# MetaMathQA's, in training and, with a sentence after it, in the test.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def metamathqa(row: Mapping[str, Any], end: str) -> list[tuple[str, bool]]:
    """Pieces of text, and whether they are learned."""
    return [(ALPACA.format(instruction=row["query"]), False), (row["response"] + end, True)]


def codealpaca(row: Mapping[str, Any], end: str) -> list[tuple[str, bool]]:
    """Without a template: the instruction and its input, then the answer.

    >>> codealpaca({"instruction": "Add.", "input": "1 2", "output": "3"}, "</s>")
    [('Add.\\n1 2', False), ('3</s>', True)]
    """
    asked = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
    return [(asked, False), (row["output"] + end, True)]


def sharegpt(row: Mapping[str, Any], end: str) -> list[tuple[str, bool]]:
    """Tulu's chat format.

    >>> sharegpt({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "</s>")
    [('<|user|>\\nHi\\n<|assistant|>\\n', False), ('Ho</s>\\n', True)]
    """
    pieces = []
    for turn in row["conversations"]:
        if turn["from"] == "human":
            pieces.append((f"<|user|>\n{turn['value'].strip()}\n<|assistant|>\n", False))
        elif turn["from"] == "gpt":
            pieces.append((f"{turn['value'].strip()}{end}\n", True))
    return pieces
