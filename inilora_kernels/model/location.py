"""Where a model is: a path on this machine, or an id on the hub. Without torch, for the command line.

What is neither there nor on the hub is refused in hub.py, which asks it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from ..suggestions import near_names

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)

_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def located(given: str | os.PathLike[str]) -> Path:
    """The path that was given; an absolute one where only a path can be meant and nothing has that name.

    Path forgets the "./" and the last "/" by which a mistyped folder differs from a hub id. Raises CheckpointError for
    an empty text, and for what is no path.

    >>> located("org/model") == Path("org/model"), located("./nothing").is_absolute(), located("nothing/").is_absolute()
    (True, True, True)
    """
    if not isinstance(given, (str, os.PathLike)):
        raise CheckpointError(
            f"the model is given by its path or hub id here, not as a {type(given).__name__}; save it by its "
            f"save_pretrained and give that folder, or start the one in memory by lora_model"
        )
    text, path = os.fspath(given), Path(given)
    if not text.strip():
        # Path("") is the folder where one happens to be; a variable that is not set must not choose it.
        raise CheckpointError("the model's path is empty; give its folder, its weight file or its id on the hub")
    only_a_path = "://" not in text and (text.startswith((".", "~")) or text.endswith(("/", os.sep)))
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


def near_models(path: Path) -> str:
    """'; did you mean "org/name"?' for the address of a model's page; otherwise what has nearly this name here.

    >>> near_models(Path("https://huggingface.co/org/name/tree/main"))
    '; did you mean "org/name"?'
    """
    host = 1 if path.parts[:1] in (("https:",), ("http:",)) else 0
    if path.parts[host : host + 1] in (("huggingface.co",), ("hf.co",)) and len(path.parts) >= host + 3:
        return f'; did you mean "{path.parts[host + 1]}/{path.parts[host + 2]}"?'
    return near_names(path, WEIGHT_SUFFIXES)
