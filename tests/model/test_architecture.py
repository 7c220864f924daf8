"""What transformers knows of a config, without running code of the model's folder."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import transformers

from inilora_kernels.model.architecture import describe


def test_a_broken_installation_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((llama / "config.json").read_text())
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    monkeypatch.setattr(transformers, "LlamaForCausalLM", property(lambda _: 1 / 0), raising=False)
    with pytest.warns(UserWarning, match=r"transformers .* cannot build LlamaForCausalLM"):
        assert describe(config, ["model.layers.0.self_attn.q_proj"]) is None


def test_no_code_of_the_models_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json with auto_map: transformers asks on standard input, and a y there ran the folder's code."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    config = {
        "model_type": "blip_text_model",
        "auto_map": {"AutoModel": "evil.Evil"},
        "_name_or_path": str(tmp_path),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        describe(config, ["0.q_proj"])
    assert not (tmp_path / "canary").exists()
