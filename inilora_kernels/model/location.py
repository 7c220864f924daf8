"""Where a model is: a path on this machine, or an id on the hub. Without torch, for the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..suggestions import did_you_mean

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)

_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def located(given: str | os.PathLike[str]) -> Path:
    """The path that was given; an absolute one where only a path can be meant and nothing has that name.

    Path forgets the "./" and the last "/" by which a mistyped folder differs from a hub id.

    >>> located("org/model") == Path("org/model"), located("./nothing").is_absolute(), located("nothing/").is_absolute()
    (True, True, True)
    """
    text, path = os.fspath(given), Path(given)
    only_a_path = text.startswith((".", "~")) or text.endswith(("/", os.sep))
    return path.absolute() if only_a_path and not os.path.lexists(path) else path


def hub_id(path: Path) -> tuple[str, str | None] | None:
    """The id and the revision of a model on the hub, "org/name@revision"; None for what only a path can be.

    >>> hub_id(Path("org/model@v1")), hub_id(Path("gpt2")), hub_id(Path("a/b/c")), hub_id(Path("model.safetensors"))
    (('org/model', 'v1'), ('gpt2', None), None, None)
    """
    match = _ID.fullmatch(path.as_posix())
    if match is None or path.name.startswith(".") or path.suffix in WEIGHT_SUFFIXES:
        return None
    return match["id"], match["revision"]


def near_names(path: Path) -> str:
    """'; did you mean "model"?' if next to the first part of a path that is missing something has nearly its name."""
    if "~" in path.parts:
        home = Path(os.path.expanduser(Path(*path.parts[path.parts.index("~") :])))
        return f'; did you mean "{home}"?' if os.path.exists(home) else ""
    for part in [*reversed(path.parents), path]:
        if not os.path.lexists(part):
            try:
                with os.scandir(part.parent) as found:
                    names = [one.name for one in found if one.is_dir() or Path(one.name).suffix in WEIGHT_SUFFIXES]
            except OSError:
                return ""
            return did_you_mean(part.name, names)
    return ""
