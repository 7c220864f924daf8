"""What transformers knows of a config, without running code of the model's folder."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from inilora_kernels.errors import CheckpointError, TargetError
from inilora_kernels.model.architecture import _layers, describe
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .models import ENCODER, LLAVA, VISION, build, found
from .refused import refusal


def test_a_broken_installation_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((llama / "config.json").read_text())
    # The class first: to restore it, monkeypatch has to import it.
    monkeypatch.setattr(transformers, "LlamaForCausalLM", property(lambda _: 1 / 0), raising=False)
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    with pytest.warns(UserWarning, match=r"transformers .* cannot build LlamaForCausalLM"):
        assert describe(config, ["model.layers.0.self_attn.q_proj"]) is None


def test_without_a_class_in_the_config_the_weights_tell(llama: Path) -> None:
    """As torch.save and config.save_pretrained leave a model: an adapter for the bare one fits no model with a head."""
    config = json.loads((llama / "config.json").read_text())
    del config["architectures"]
    query = "model.layers.0.self_attn.q_proj"
    whole = describe(config, [query, "lm_head"])
    bare = describe(config, [query])
    assert [type(one.model).__name__ for one in (whole, bare) if one] == ["LlamaForCausalLM", "LlamaModel"]


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


def test_language_model_in_a_vision_model(tmp_path: Path) -> None:
    """Its checkpoint's names are not those of the live model."""
    targets = found(build("LlavaForConditionalGeneration", **LLAVA), tmp_path)
    assert sum(target.module.startswith("language_model.model.layers") for target in targets) == 4
    assert sum(target.module.startswith("vision_tower") for target in targets) in (2, 4)


def test_weight_that_transformers_splits_on_loading(tmp_path: Path) -> None:
    """Dinov2's `weights_in` becomes `gate_proj` and `up_proj`: it is none of the live model's matrices."""
    build("Dinov2Model", **VISION, use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"weights_in, and Dinov2Model splits or permutes it.*the live model"):
        find_targets(open_checkpoint(tmp_path), ["weights_in"])
    with pytest.warns(UserWarning, match=r"left out encoder\.layer\.0\.mlp\.weights_in.* splits or permutes"):
        targets = find_targets(open_checkpoint(tmp_path), "all-linear")
    assert len(targets) == 2 * 5


def test_config_of_another_model(tmp_path: Path) -> None:
    build("BertModel", **ENCODER).save_pretrained(tmp_path / "small")
    build("BertModel", **{**ENCODER, "hidden_size": 32}).config.save_pretrained(tmp_path / "small")
    assert "do not belong together" in refusal(tmp_path / "small", CheckpointError)


def test_config_never_runs_code_or_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("BertModel", **ENCODER)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    assert len(find_targets(open_checkpoint(tmp_path))) == 4


def test_a_class_of_linear_with_a_forward_of_its_own_counts_if_it_runs() -> None:
    """DeepSeek-V4's o_a_proj views its input in groups: it got an adapter, and the model's first forward crashed."""

    class Grouped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bgi,goi->bgo", x, self.weight.view(2, 3, 4))

    class Rounding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16().to(x.dtype))

    with torch.device("meta"):
        model: Any = BertModel(BertConfig(**ENCODER))
        model.pooler.dense = Grouped(4, 6)
        model.encoder.layer[0].output.dense = Rounding(36, 24)
    forms = {name: layer.form for name, layer in _layers(model).items()}
    assert forms["pooler.dense"] == "other"
    assert forms["encoder.layer.0.output.dense"] == forms["encoder.layer.1.output.dense"] == "linear"
