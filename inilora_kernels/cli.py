"""The command line: `inilora`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import InitializationError
from .factors import FactorSet
from .files import require_writable

application = typer.Typer(
    name="inilora",
    help="LoRA factors that start from the pretrained weights: B·A ≈ W, with a certificate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of the table.")]
Plot = Annotated[Path | None, typer.Option(help="Draw error by layer and convergence into this .png, .svg or .pdf.")]


@application.command()
def approximate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, a .safetensors or a torch .bin file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The factor file to write (.safetensors).")],
    rank: Annotated[int, typer.Option(help="Rank r of the factors.")] = 8,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-modules",
            "-t",
            help="As in PEFT: a name (repeat the option for more), one regular expression, or all-linear. "
            "Default: query and value projections.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Initialization; `inilora methods` lists them.")] = "inilora",
    solver: Annotated[
        str, typer.Option(help="adam: the paper's trajectory; krylov: the same minimum in seconds.")
    ] = "adam",
    steps: Annotated[int, typer.Option(help="Adam steps a matrix.")] = 20_000,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 5e-4,
    step_size: Annotated[int, typer.Option(help="StepLR: steps between two decays.")] = 5_000,
    gamma: Annotated[float, typer.Option(help="StepLR: factor of a decay.")] = 0.9,
    loss: Annotated[
        str, typer.Option(help="mse: the paper's mean; frobenius: the sum, which converges better.")
    ] = "mse",
    init_std: Annotated[str, typer.Option(help="Start's deviation: kind, global, or a number.")] = "kind",
    tol: Annotated[float | None, typer.Option(help="Stop a matrix once its excess is below this.")] = None,
    checkpoint_steps: Annotated[
        list[int] | None, typer.Option(help="Keep the factors of this step too (repeat for more).")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, cpu or reference.")] = "auto",
    concurrency: Annotated[int, typer.Option(help="Most matrices in memory at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random start.")] = 0,
    device: Annotated[str | None, typer.Option(help="A torch device, such as cuda:1.")] = None,
    cache: Annotated[bool, typer.Option(help="Find finished matrices again, keep new ones.")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on standard error.")] = True,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Factorize a model's weights and write the factor file."""
    from .approximate import approximate_model

    require_writable(output)
    if plot is not None:
        _require_plot(plot)
    factors = approximate_model(
        model,
        rank,
        _target_modules(target_modules),
        method=method,
        solver=solver,
        steps=steps,
        lr=lr,
        step_size=step_size,
        gamma=gamma,
        loss=loss,
        init_std=_number_or_name(init_std),
        tol=tol,
        checkpoint_steps=tuple(checkpoint_steps or ()),
        backend=backend,
        concurrency=concurrency,
        seed=seed,
        device=device,
        cache=cache,
        progress=progress,
    )
    factors.save(output)
    _show(factors, plot, as_json)
    if not as_json:
        Console(stderr=True).print(f"wrote {output}", highlight=False)


@application.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A factor file.")],
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Show what is in a factor file and how good it is."""
    if plot is not None:
        _require_plot(plot)
    _show(FactorSet.load(file), plot, as_json)


def _target_modules(given: list[str] | None) -> list[str] | str | None:
    """One plain name is a suffix; one that is no plain name is a regular expression, as PEFT takes a string."""
    if (
        given
        and len(given) == 1
        and (given[0] == "all-linear" or not given[0].replace(".", "").replace("_", "").isalnum())
    ):
        return given[0]
    return given or None


def _number_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _require_plot(path: Path) -> None:
    from .report import require_plot_path

    require_plot_path(path)
    require_writable(path)


def _show(factors: FactorSet, plot_path: Path | None, as_json: bool) -> None:
    from .report import json_report, plot, table

    if plot_path is not None:
        plot(factors, plot_path)
    if as_json:
        print(json.dumps(json_report(factors), indent=2))
    else:
        Console().print(table(factors))


@application.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, a .safetensors or a torch .bin file.")],
    gpu: Annotated[str, typer.Option(help="rtx4090, a100, h100, h200, b200 or mi300x.")] = "rtx4090",
    rank: Annotated[int, typer.Option(help="Rank r of the factors.")] = 8,
    steps: Annotated[int, typer.Option(help="Adam steps a matrix.")] = 20_000,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--target-modules", "-t", help="As for `approximate`. Default: query and value projections."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict what the adam solver would cost on a GPU: launches, bytes a step, time, and what bounds it."""
    from .checkpoint import open_checkpoint
    from .kernels.plan import Matrix, gpu_named, json_plan, plan_table
    from .kernels.plan import plan as predict
    from .targets import find_targets

    chosen = gpu_named(gpu)
    targets = find_targets(open_checkpoint(model), _target_modules(target_modules))
    # The backend reads float64 weights as float32.
    matrices = [Matrix(target.shape, min(4, target.dtype.itemsize), rank) for target in targets]
    result = predict(matrices, chosen, steps)
    if as_json:
        print(json.dumps(json_plan(result), indent=2))
    else:
        Console().print(plan_table(result))


def main() -> None:
    """Run the command line; one clear line and status 2 for whatever the library refuses."""
    try:
        application()
    except InitializationError as error:
        print(f"inilora: {error}", file=sys.stderr)
        sys.exit(2)
