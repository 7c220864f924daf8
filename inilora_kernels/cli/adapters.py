"""The commands around training: export before it, convert and merge after it.

What they need is imported when they run, so that --help does not wait seconds for peft and torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from ..choices import FORMS, TASK_TYPES, TaskType
from ..errors import OptionError
from ..model.location import located
from ..places import folder_to_write, given_path
from ..suggestions import require_choice
from .arguments import Every, FactorFile, Json

FORMATS = ("peft", "inilora-pt")
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=located,
        help="The original model, a folder or hub id: the one that the factors were computed from.",
    ),
]
Init = Annotated[
    Path,
    typer.Option("--init", metavar="PATH", parser=given_path, help="The factors that training started from."),
]
Folder = Annotated[
    Path, typer.Option("-o", "--output", metavar="PATH", parser=folder_to_write, help="The folder to write.")
]
Insist = Annotated[
    bool,
    typer.Option("--insist", help="Accept the factors even if the adapter does not seem to have started from them."),
]
Trained = Annotated[
    Path,
    typer.Argument(metavar="TRAINED", parser=given_path, help="The adapter folder that the trainer saved."),
]


def export(
    factors: FactorFile,
    *,
    output: Folder,
    base: Base = None,
    form: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMS),
            autocompletion=lambda: list(FORMS),
            help="residual: a base folder with R = W − BA and an adapter, which any trainer takes; "
            "delta: the adapter, and its frozen copy to subtract, for the untouched base.",
        ),
    ] = "residual",
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            autocompletion=lambda: list(FORMATS),
            help="peft: folders for trainers; inilora-pt: the authors' factor files.",
        ),
    ] = "peft",
    lora_alpha: Annotated[
        float | None, typer.Option(help="PEFT's lora_alpha. Default: the rank, a scaling of 1.")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by lora_alpha / √r.")] = False,
    lora_dropout: Annotated[float, typer.Option(help="PEFT's lora_dropout.")] = 0.0,
    task_type: Annotated[
        str | None,
        typer.Option(
            autocompletion=lambda: list(TASK_TYPES),
            help=f"PEFT's task_type: {', '.join(TASK_TYPES)}. Default: the model's own class, from config.json.",
        ),
    ] = None,
) -> None:
    """Write factors as folders that a trainer reads."""
    from ..adapters.export import export_delta, export_residual
    from ..factor_set import FactorSet
    from ..storage.authors_folder import save_inilora_pt
    from .output import say

    require_choice("form", form, FORMS)
    require_choice("format", file_format, FORMATS)
    if task_type is not None:
        require_choice("task_type", task_type, TASK_TYPES)
    if file_format == "inilora-pt":
        if form != "residual" or lora_alpha is not None or rslora or lora_dropout or task_type is not None:
            raise OptionError(
                "the authors' files hold A and B alone: --form, --lora-alpha and the like go with --format peft"
            )
        save_inilora_pt(FactorSet.load(factors, base), output)
        say(f"wrote {output}")
        return
    if base is None:
        raise OptionError("name the model that the factors were computed from, its folder or hub id, as --base")
    write = export_residual if form == "residual" else export_delta
    write(
        base,
        FactorSet.load(factors, base),
        output,
        lora_alpha=lora_alpha,
        use_rslora=rslora,
        lora_dropout=lora_dropout,
        task_type=cast("TaskType | None", task_type),
    )
    if form == "residual":
        say(f"wrote {output / 'base'}, the model to train on, and {output / 'adapter'}, the adapter to continue from")
    else:
        say(f"wrote {output / 'adapter'}, the adapter to continue from, for the model as it is")


def convert(
    trained: Trained,
    *,
    init: Init,
    output: Folder,
    base: Base = None,
    rank: Annotated[
        int | None, typer.Option(help="Recompress to this rank. Default: exact, at twice the rank.")
    ] = None,
    insist: Insist = False,
    every: Every = False,
    as_json: Json = False,
) -> None:
    """Make a plain LoRA for the original model of a trained adapter."""
    from ..adapters.convert import convert as convert_folder
    from ..display.tables import truncation_table
    from ..factor_set import FactorSet
    from .output import print_table, say

    errors = convert_folder(trained, FactorSet.load(init, base), output, base, rank, insist)
    if as_json:
        print(json.dumps({"truncation_error": errors}, indent=2))
    elif rank is not None:
        print_table(truncation_table(errors, rank, every=every))
    say(f"wrote {output}")


def merge(trained: Trained, init: Init, output: Folder, base: Base = None, insist: Insist = False) -> None:
    """Write the original model with a trained adapter merged into it."""
    from ..adapters.convert import export_merged
    from ..factor_set import FactorSet
    from .output import say

    export_merged(trained, FactorSet.load(init, base), output, base, insist)
    say(f"wrote {output}")
