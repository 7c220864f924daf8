"""`inilora plan`: what a run would take."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, cast

import typer

from ..errors import OptionError
from ..kernels.gpu.gpus import GPUS, gpu_named
from ..options import ModelOptions, Options, meaning_of, require_count
from .arguments import CHOOSING, Json, ModelPath, options_from, with_options


@partial(with_options, only=CHOOSING)
def plan(
    model: ModelPath,
    *,
    gpu: Annotated[str | None, typer.Option(help=f"Predict for a GPU too: {', '.join(GPUS)}.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them, with one torchrun process on each.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank r of the factors.")] = cast(int, Options.rank),
    steps: Annotated[int, typer.Option(help=meaning_of("steps"))] = Options.steps,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="With --gpu: each kernel's launches, bytes and bottleneck, for tuning."),
    ] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Predict what a run would take, by each solver, on this machine or a GPU."""
    require_count("rank", rank)
    require_count("steps", steps)
    card = None if gpu is None else gpu_named(gpu)
    require_count("gpus", gpus)
    if gpus > 1 and card is None:
        raise OptionError(f"--gpus {gpus}: of which kind? Give --gpu too: {', '.join(GPUS)}")
    if kernels and card is None:
        raise OptionError(f"--kernels describes a GPU's kernels; give --gpu too: {', '.join(GPUS)}")
    from .planning import show_plan

    asked = ModelOptions(rank=rank, **options_from(given))
    show_plan(model, asked, steps, card, gpus, kernels=kernels, as_json=as_json)
