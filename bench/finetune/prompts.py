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


# ShareGPT's names of who speaks.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}


def sharegpt(row: Mapping[str, Any], end: str) -> list[tuple[str, bool]]:
    """Tulu's chat format; nothing of a conversation with others than a user and an assistant (system, bing).

    >>> sharegpt({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "</s>")
    [('<|user|>\\n', False), ('Hi\\n', False), ('<|assistant|>\\n', False), ('Ho</s>', True)]
    >>> sharegpt({"conversations": [{"from": "bing", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "</s>")
    []
    """
    turns = row["conversations"]
    if any(turn["from"] not in _SPEAKERS for turn in turns):
        return []
    pieces: list[tuple[str, bool]] = []
    before = ""
    for turn in turns:
        speaker = _SPEAKERS[turn["from"]]
        answer = speaker == "assistant"
        # Whose turn it is is learned too, but not after a user.
        pieces.append((f"<|{speaker}|>\n", answer and before != "user"))
        pieces.append((f"{turn['value'].strip()}{end if answer else ''}\n", answer))
        before = speaker
    return [*pieces[:-1], *((text.rstrip("\n"), learned) for text, learned in pieces[-1:])]
