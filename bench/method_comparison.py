"""Our starts in PEFT's own comparison of methods, huggingface/peft's method_comparison/MetaMathQA: an outside anchor.

    python -m bench.method_comparison write PEFT/method_comparison/MetaMathQA
    python -m bench.method_comparison run PEFT/method_comparison/MetaMathQA \\
        experiments/inilora-study/llama-3.2-3B-inilora-rank32-lr_0.0001

`write` adds a folder of experiments there, `run` runs one with PEFT's own run.py. PEFT's code stays as it is: its
`utils.get_model` ends with `get_peft_model`, and here `initialize_peft` comes after that; data, training, generation,
scores and result files are PEFT's. Install PEFT from that checkout first (pip install -e).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import peft
import typer
from torch import nn

from inilora_kernels import approximate_model, initialize_peft

# What `run` reads next to PEFT's own adapter_config.json and training_params.json.
START = "start.json"
# A learning rate of PEFT's LoRA, 1e-4, and its neighbours: so that a start that does best at another rate can show it.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
STARTS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "inilora": {"method": "inilora", "solver": "krylov"},
    "pissa": {"method": "pissa"},
    "inilora-alpha": {"method": "inilora-alpha"},
    "inilora-beta-uniform": {"method": "inilora-beta-uniform"},
}
# Rank, alpha and targets as in PEFT's experiments/lora/llama-3.2-3B-rank32.
CONFIG = peft.LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM")

app = typer.Typer(add_completion=False)


@app.command()
def write(folder: Annotated[Path, typer.Argument(help="method_comparison/MetaMathQA of a checkout of PEFT.")]) -> None:
    """Write an experiment for each start and learning rate, LoRA's too."""
    for path, start, rate in experiments():
        place = folder / path
        CONFIG.save_pretrained(place)
        # PEFT's default weight decay of 0.1 pulls A and B towards zero. LoRA's BA starts there; other starts subtract
        # BA as it was, so W itself would shrink. Hence no decay, for any of them.
        parameters = {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.0}}
        (place / "training_params.json").write_text(json.dumps(parameters, indent=2) + "\n")
        if start is not None:
            (place / START).write_text(json.dumps(start, indent=2) + "\n")
        print(place)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="method_comparison/MetaMathQA of a checkout of PEFT.")],
    experiment: Annotated[str, typer.Argument(help="experiments/METHOD/NAME there.")],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="PEFT's own option.")] = False,
) -> None:
    """Run an experiment with PEFT's run.py; its result goes where PEFT puts it."""
    sys.path.insert(0, str(folder.resolve()))
    os.chdir(folder)
    start = Path(experiment) / START
    if start.is_file():
        import utils

        utils.get_model = started(utils.get_model, json.loads(start.read_text()))
    sys.argv = ["run.py", experiment, *(["-v"] if verbose else [])]
    runpy.run_path("run.py", run_name="__main__")


def experiments() -> Iterator[tuple[Path, dict[str, Any] | None, float]]:
    """Each experiment's path, start and learning rate.

    >>> sum(1 for _ in experiments()), str(next(experiments())[0])
    (25, 'experiments/inilora-study/llama-3.2-3B-lora-rank32-lr_1e-05')
    """
    for name, start in STARTS.items():
        for rate in RATES:
            yield Path("experiments", "inilora-study", f"llama-3.2-3B-{name}-rank32-lr_{rate:g}"), start, rate


def started(get_model: Callable[..., nn.Module], start: dict[str, Any]) -> Callable[..., nn.Module]:
    """PEFT's get_model, whose adapter then starts from factors of the model's own weights, in the delta form."""

    def get_started_model(**options: Any) -> nn.Module:
        model = get_model(**options)
        config: Any = model.peft_config["default"]  # type: ignore[union-attr, index]
        factors = approximate_model(
            options["model_id"], rank=config.r, target_modules=list(config.target_modules), progress=False, **start
        )
        initialize_peft(model, factors, form="delta")  # type: ignore[arg-type]
        return model

    return get_started_model


if __name__ == "__main__":
    app()
