"""The factor folders of IniLoRA's authors: one `{module}.weight.pt` per matrix, in their own letters.

Each file holds a dict with 'A' = U (d×r) and 'B' = Pᵀ (r×k), so W ≈ A·B there: their A is our B, their B our A. Next to
it there may be `{module}.weight.loss.pt` with {'loss': the mean squared error of each step}. Ours holds sampled steps:
'step' says which, and 'steps' how many the run took.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FactorFileError, OptionError
from ..factors import Certificate, Factors
from .atomic import whole_folder, write_whole
from .reading import FLOATS, is_there, reporting, require_regular, require_stored

SUFFIX = ".weight.pt"
LOSS_SUFFIX = ".weight.loss.pt"

# What the authors' training code takes off a module's name.
_HEAD = "roberta."
# The most steps that a factor file records.
_MOST_STEPS = 2**53


def save_inilora_pt(factors: Mapping[str, Factors], folder: str | Path) -> None:
    """Write a folder that the authors' training code reads, with the sampled losses.

    Names are those of a model without a task's head, as their decomposition writes them: their training code takes
    `roberta.` off a module's name before it looks for the file.

    Raises OptionError for a part of a fused weight or a Conv1D, which the format cannot express, for names that no file
    can have and two that are one without the head, and OutputError.
    """
    files: dict[str, str] = {}
    for name, part in factors.items():
        if part.rows or part.transposed or "/" in name:
            raise OptionError(
                f"{name}: a part of a fused weight or a transposed one does not fit into the authors' format"
            )
        if not name.isprintable():
            raise OptionError(f"{name!r}: no name of a file; the authors' format has one for each module")
        other = files.setdefault(name.removeprefix(_HEAD), name)
        if other != name:
            raise OptionError(f"{name} and {other} have the same file in the authors' format; export one of them")
    with whole_folder(Path(folder)) as whole:
        for module, part in factors.items():
            name = module.removeprefix(_HEAD)
            _save(whole / f"{name}{SUFFIX}", {"A": part.B.contiguous(), "B": part.A.contiguous()})
            if part.history:
                entries = part.B.shape[0] * part.A.shape[1]
                content: dict[str, Any] = {"loss": [loss / entries for _, loss in part.history]}
                content |= {"step": [step for step, _ in part.history], "steps": part.certificate.steps}
                _save(whole / f"{name}{LOSS_SUFFIX}", content)


def load_inilora_pt(folder: str | Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors by module, and the options, from such a folder; only tensors are loaded, and no code is run.

    The certificates are NaN and the sha256 of the weights is empty, since the folder has neither; `certified` computes
    them from the model.

    Raises FactorFileError: no such files, a damaged one, or one without A and B.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.glob(f"*{SUFFIX}"))
    if not files:
        raise FactorFileError(
            f"{folder}: a folder without factors (*{SUFFIX}); give a factor file, or what the authors' code wrote"
        )
    modules = {file.name.removesuffix(SUFFIX): _load(file) for file in files}
    options = {"method": "inilora", "source": "inilora-pt"}
    return modules, options


def _load(file: Path) -> Factors:
    content = _torch_load(file)
    A, B = content.get("B"), content.get("A")
    nothing = FactorFileError(f"{file}: no 'A' (d×r) and 'B' (r×k) in it; write it again")
    if not (isinstance(A, Tensor) and isinstance(B, Tensor) and A.ndim == B.ndim == 2):
        raise nothing
    if A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise nothing
    for letter, factor in (("A", B), ("B", A)):
        require_stored(factor, file, letter, FactorFileError)
        if factor.dtype not in FLOATS or not factor.float().isfinite().all():
            raise FactorFileError(
                f"{file}: {letter} holds NaN, Inf or more than float32 does, or {str(factor.dtype).partition('.')[2]}, "
                f"not float16 to float64; decompose that matrix again"
            )
    history: list[tuple[int, float]] = []
    steps = 0
    loss_file = file.with_name(file.name.removesuffix(SUFFIX) + LOSS_SUFFIX)
    if is_there(loss_file):
        history, steps = _history(loss_file, B.shape[0] * A.shape[1])
    unknown = float("nan")
    return Factors(
        A=A.detach().float().contiguous(),
        B=B.detach().float().contiguous(),
        certificate=Certificate(loss=unknown, optimum=unknown, energy=unknown, steps=steps),
        source_sha256="",
        history=tuple(history),
    )


def _history(file: Path, entries: int) -> tuple[list[tuple[int, float]], int]:
    """The (step, loss) pairs, with the loss summed over a matrix's entries, not averaged; and the steps in all."""
    found = _torch_load(file)
    try:
        losses = [float(loss) * entries for loss in found.get("loss", [])]
        numbers = [int(step) for step in found.get("step", range(len(losses)))]
        steps = int(found.get("steps", len(losses)))
        if not all(map(math.isfinite, losses)) or not all(0 <= step <= _MOST_STEPS for step in (*numbers, steps)):
            raise ValueError("a loss is NaN or Inf, or a step is negative")
        return list(zip(numbers, losses, strict=True)), steps
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise FactorFileError(f"{file}: 'loss' is not a list of numbers ({error}); remove that file") from error


def _torch_load(file: Path) -> dict[str, Any]:
    require_regular(file, FactorFileError)
    try:
        with reporting(file, FactorFileError):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FactorFileError:
        raise
    except Exception as error:
        # torch raises whatever its unpickler meets; a hostile file and a broken one look alike.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise FactorFileError(f"{file}: damaged, or holds objects other than tensors ({reason})") from error
    if not isinstance(content, dict):
        raise FactorFileError(f"{file}: holds a {type(content).__name__}, not the dict with 'A' and 'B'")
    return content


def _save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
