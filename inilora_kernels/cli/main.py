"""The command line: `inilora`."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console

from ..adapters.folder import TaskType
from ..adapters.layer import Form
from ..errors import InitializationError, OptionError
from ..factor_set import FactorSet
from ..storage.atomic import require_writable
from .arguments import options_from, with_options
from .cache import cache_application
from .plan import plan

application = typer.Typer(
    name="inilora",
    help="LoRA factors that start from the pretrained weights: B·A ≈ W, with a certificate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

application.add_typer(cache_application)
application.command()(plan)

Format = Literal["peft", "inilora-pt"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of the table.")]
Base = Annotated[Path | None, typer.Option(help="The original model's folder, of which the factors are.")]
Made = Annotated[Path, typer.Argument(help="A factor file, or a folder of the authors' {module}.weight.pt files.")]
Init = Annotated[Path, typer.Option("--init", help="The factors that training started from.")]
Folder = Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")]
Trained = Annotated[Path, typer.Argument(help="The adapter folder that the trainer saved.")]
Plot = Annotated[
    Path | None, typer.Option(help="Draw error by layer, spectra and convergence into this .png, .svg or .pdf.")
]


Every = Annotated[bool, typer.Option("--all", help="A row for each matrix, not for each kind.")]


@application.command()
@with_options
def approximate(
    model: Annotated[Path, typer.Argument(help="A model's folder, a weight file, or its hub id (org/name@revision).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The factor file to write (.safetensors).")],
    plot: Plot = None,
    every: Every = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Factorize a model's weights and write the factor file."""
    from ..approximate import approximate_model, approximate_ranks
    from ..model.checkpoint import open_checkpoint

    options = options_from(given)
    ranks = options["rank"]
    outputs = {one: _of_rank(output, one) for one in ranks} if isinstance(ranks, list) else {0: output}
    plots = {one: _of_rank(plot, one) if one and plot else plot for one in outputs}
    inputs = [entry.file for entry in open_checkpoint(model).tensors.values()] if model.exists() else []
    if given["start"] is not None:
        inputs.append(given["start"])
    for one, path in outputs.items():
        picture = plots[one]
        _require_no_input(path, inputs)
        require_writable(path)
        if picture is not None:
            _require_no_input(picture, [*inputs, path])
        _require_plot(picture)
    try:
        if isinstance(ranks, list):
            results = approximate_ranks(model, **options)
        else:
            results = {0: approximate_model(model, **options)}
    except KeyboardInterrupt as interrupted:
        print(f"inilora: {interrupted or 'stopped'}", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    for one, factors in results.items():
        factors.save(outputs[one])
        _draw(factors, plots[one], model)
    _show(list(results.values()), as_json, every)
    if not as_json:
        for path in outputs.values():
            _say(f"wrote {path}")


@application.command()
def inspect(
    file: Made,
    base: Annotated[
        Path | None, typer.Option(help="For an authors' folder: the model's folder, to compare with.")
    ] = None,
    plot: Plot = None,
    every: Every = False,
    as_json: Json = False,
) -> None:
    """Show what is in a factor file, how good it is, and how far its rank captures the singular spectrum."""
    from ..display.tables import spectrum_table

    _require_plot(plot)
    factors = FactorSet.load(file, base)
    _draw(factors, plot, base or file)
    _show([factors], as_json, every)
    spectrum = spectrum_table(factors, every=every)
    if spectrum is not None and not as_json:
        Console().print(spectrum)


@application.command()
def export(
    factors: Made,
    output: Folder,
    base: Base = None,
    form: Annotated[
        Form,
        typer.Option(
            help="residual: a base folder with R = W − BA and an adapter, which every trainer takes as they are; "
            "delta: the adapter, and its frozen negative, for the untouched base."
        ),
    ] = "residual",
    file_format: Annotated[
        Format, typer.Option("--format", help="peft: folders for trainers; inilora-pt: the authors' factor files.")
    ] = "peft",
    lora_alpha: Annotated[
        float | None, typer.Option(help="PEFT's lora_alpha. Default: the rank, a scaling of 1.")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by lora_alpha / √r.")] = False,
    lora_dropout: Annotated[float, typer.Option(help="PEFT's lora_dropout.")] = 0.0,
    task_type: Annotated[
        TaskType | None, typer.Option(help="PEFT's task_type. Default: the model's own class, as config.json has it.")
    ] = None,
) -> None:
    """Write factors as folders that a trainer reads."""
    if file_format == "inilora-pt":
        from ..storage.authors_folder import save_inilora_pt

        if lora_alpha is not None or rslora or lora_dropout or task_type is not None:
            raise OptionError("the authors' files hold A and B alone: --lora-alpha and the like go with --format peft")
        save_inilora_pt(FactorSet.load(factors, base), output)
        _say(f"wrote {output}")
        return
    if base is None:
        raise OptionError("give the model's folder, of which the factors are, as --base")
    from ..adapters.export import export_delta, export_residual

    write = export_residual if form == "residual" else export_delta
    write(base, FactorSet.load(factors, base), output, lora_alpha, rslora, lora_dropout, task_type)
    if form == "residual":
        _say(f"wrote {output / 'base'}, the model to train on, and {output / 'adapter'}, the adapter to go on from")
    else:
        _say(
            f"wrote {output / 'adapter'}, the adapter to go on from, and {output / 'initial'}, to stay frozen beside it"
        )


@application.command()
def convert(
    trained: Trained,
    init: Init,
    output: Folder,
    base: Base = None,
    rank: Annotated[
        int | None, typer.Option(help="Recompress to this rank. Default: exact, at twice the rank.")
    ] = None,
    every: Every = False,
    as_json: Json = False,
) -> None:
    """Make a plain LoRA for the original model of a trained adapter."""
    from ..adapters.convert import convert as convert_folder

    errors = convert_folder(trained, FactorSet.load(init, base), output, base, rank)
    if as_json:
        print(json.dumps({"truncation_error": errors}, indent=2))
    elif rank is not None:
        from ..display.tables import truncation_table

        Console().print(truncation_table(errors, rank, every=every))
    _say(f"wrote {output}")


@application.command()
def merge(trained: Trained, init: Init, output: Folder, base: Base = None) -> None:
    """Write the original model with a trained adapter merged into it."""
    from ..adapters.convert import export_merged

    export_merged(trained, FactorSet.load(init, base), output, base)
    _say(f"wrote {output}")


@application.command()
def methods(as_json: Json = False) -> None:
    """List the initializations that --method takes, with their formula and source."""
    from .methods import methods_json, methods_table

    if as_json:
        print(json.dumps(methods_json(), indent=2, ensure_ascii=False))
    else:
        Console().print(methods_table())


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def _of_rank(path: Path, rank: int) -> Path:
    """factors.safetensors → factors-r8.safetensors."""
    return path.with_name(f"{path.stem}-r{rank}{path.suffix}")


def _require_no_input(path: Path, inputs: Sequence[Path]) -> None:
    """Nobody means to write over the model, or the plot over the factors."""
    if path.resolve() in {one.resolve() for one in inputs}:
        raise OptionError(f"{path}: this run reads or writes that file already; give another name")


def _require_plot(path: Path | None) -> None:
    if path is not None:
        from ..display.plots import require_plot_path

        require_plot_path(path)
        require_writable(path)


def _draw(factors: FactorSet, path: Path | None, model: Path) -> None:
    if path is not None:
        from ..display.plots import plot

        plot(factors, factors.options, path, model.resolve().stem)


def _show(results: list[FactorSet], as_json: bool, every: bool) -> None:
    """Tables; or one JSON value, a list of them where there are several sets."""
    from ..display.reports import json_report

    if as_json:
        reports = [json_report(factors, factors.options) for factors in results]
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        for factors in results:
            Console().print(factors.table(every=every))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # The library's own are UserWarnings; what others deprecate is no concern of whoever runs a command.
    if category is UserWarning:
        print(f"inilora: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; one clear line and status 2 for whatever the library refuses, one line for a warning."""
    warnings.showwarning = _show_warning
    try:
        application()
    except InitializationError as error:
        print(f"inilora: {error}", file=sys.stderr)
        sys.exit(2)
