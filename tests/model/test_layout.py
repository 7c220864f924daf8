"""Where libraries and trainers put weights: folders that they wrote, or files under the names that they use."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from inilora_kernels import approximate_model, export_delta, lora_model
from inilora_kernels.errors import TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from .checkpoints import TENSORS, holds, refusal


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "open_clip_model.safetensors",
        "consolidated.safetensors",
        "a-model-by-hand.safetensors",
    ],
)
def test_safetensors_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    assert holds(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.fp16.bin", "open_clip_pytorch_model.bin", "consolidated.00.pth", "m.pt"],
)
def test_torch_files_under_any_name(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    assert holds(tmp_path)
    assert holds(tmp_path / name)


def test_plain_weights_go_before_a_variant(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert holds(tmp_path)


def test_several_variants_are_not_chosen_from(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        save_file(TENSORS, tmp_path / f"model.{variant}.safetensors")
    assert "several variants" in refusal(tmp_path)
    assert holds(tmp_path / "model.bf16.safetensors")


def shards(folder: Path, *, variant: str = "") -> dict[str, str]:
    weight_map = {}
    for place, (name, tensor) in enumerate(TENSORS.items(), 1):
        shard = f"model-{place:05}-of-{len(TENSORS):05}{variant}.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    return weight_map


def test_shards_of_a_variant(tmp_path: Path) -> None:
    weight_map = shards(tmp_path, variant=".fp16")
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    assert holds(tmp_path)


def test_shards_of_a_variant_as_transformers_names_them(tmp_path: Path) -> None:
    """`model.fp16-00001-of-00014.safetensors` since transformers 5."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in model.state_dict().items())


def test_one_shard_is_a_part_of_the_model(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.warns(UserWarning, match="one of 3 shards, each with a part of the model; give the folder"):
        open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_a_wrappers_state_dict(tmp_path: Path, prefix: str) -> None:
    """DistributedDataParallel and torch.compile: the factors are the model's; transformers would load none of it."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    model.config.save_pretrained(tmp_path)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    factors = approximate_model(tmp_path, rank=2, solver="krylov", cache=False, progress=False)
    assert list(factors) == [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    with pytest.raises(TargetError, match=rf"every name begins with {prefix}, .* would load none of these weights"):
        export_delta(tmp_path, factors, tmp_path / "out")
    ids = torch.arange(8)[None]
    expected = model.eval()(ids)[0]
    assert torch.equal(lora_model(model, factors)(ids)[0], expected)


@pytest.mark.skipif(transformers.__version__ < "5", reason="before 5, transformers takes no such name")
def test_the_file_that_config_json_names(tmp_path: Path) -> None:
    """`transformers_weights`, since transformers 5: loaded in place of model.safetensors."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in loaded.items())
    for wrong in ("gone.safetensors", "config.json", 3):
        (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": wrong}))
        assert f"transformers_weights {wrong!r}" in refusal(tmp_path)


def test_a_factor_file_beside_the_only_weights(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    factors = approximate_model(tmp_path, rank=2, solver="krylov", cache=False, progress=False)
    factors.save(tmp_path / "factors.safetensors")
    assert holds(tmp_path)


def test_a_folder_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "x.pt").mkdir()
    assert "no weights here" in refusal(tmp_path)
    assert "found x.pt/" in refusal(tmp_path)


def test_an_adapter_beside_the_model_is_told(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="transformers would load that adapter with it"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path)
    assert holds(tmp_path)


def test_missing_shard_without_an_index(tmp_path: Path) -> None:
    (tmp_path / sorted(shards(tmp_path).values())[2]).unlink()
    assert "shard 3 of 00004 is missing" in refusal(tmp_path)


def test_same_tensor_in_two_shards_without_an_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    assert "are in another shard too" in refusal(tmp_path)


def test_llamas_own_parts(tmp_path: Path) -> None:
    for part in ("00", "01"):
        torch.save(TENSORS, tmp_path / f"consolidated.{part}.pth")
    assert "convert_llama_weights_to_hf" in refusal(tmp_path)


# Pipelines


def pipeline(folder: Path) -> Path:
    """A diffusers pipeline: an index, and a folder for each model."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, file in (
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ):
        (folder / name).mkdir(parents=True)
        ends = ("q_proj", "v_proj") if name == "text_encoder" else ("to_q", "to_v")
        save_file({f"blocks.0.attn.{end}.weight": torch.randn(6, 4) for end in ends}, folder / name / file)
        index[name] = ["diffusers", "Model"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_pipeline_of_diffusers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pipeline(tmp_path))
    assert [target.module for target in find_targets(checkpoint)] == [
        "text_encoder.blocks.0.attn.q_proj",
        "text_encoder.blocks.0.attn.v_proj",
        "unet.blocks.0.attn.to_q",
        "unet.blocks.0.attn.to_v",
    ]
    alone = open_checkpoint(tmp_path / "unet")
    name = "blocks.0.attn.to_q.weight"
    assert torch.equal(checkpoint.read(f"unet.{name}"), alone.read(name))
    assert checkpoint.sha256(f"unet.{name}") == alone.sha256(name)


def test_pipeline_without_its_denoiser(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]}))
    assert "without the folders of transformer" in refusal(tmp_path)


# sentence-transformers


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_both_layouts_of_sentence_transformers(tmp_path: Path, inner: str) -> None:
    (tmp_path / inner).mkdir(exist_ok=True)
    save_file(TENSORS, tmp_path / inner / "model.safetensors")
    (tmp_path / inner / "config.json").write_text('{"model_type": "of-its-own"}')
    modules = [{"idx": 0, "name": "0", "path": inner, "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert holds(tmp_path)
    config = open_checkpoint(tmp_path).config
    assert config is not None
    assert config["model_type"] == "of-its-own"


# Trainers' checkpoints


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 6), "v_proj": torch.nn.Linear(4, 6)})
        self.save_hyperparameters({"rate": 1e-3})

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return torch.stack([layer(batch).sum() for layer in self.model.values()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_lightning(tmp_path: Path) -> None:
    module = Module()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(2, 4)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for path in (tmp_path, tmp_path / "last.ckpt"):
        checkpoint = open_checkpoint(path)
        assert [target.module for target in find_targets(checkpoint)] == ["model.q_proj", "model.v_proj"]
        assert torch.equal(checkpoint.read("model.q_proj.weight"), module.model["q_proj"].weight)  # type: ignore[arg-type]


def test_deepspeed_is_answered_with_its_converter(tmp_path: Path) -> None:
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "latest").write_text("global_step10")
    (tmp_path / "zero_to_fp32.py").touch()
    torch.save({}, tmp_path / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    command = f"python {tmp_path / 'zero_to_fp32.py'} {tmp_path} OUT"
    assert command in refusal(tmp_path)
    assert command in refusal(tmp_path / "global_step10")


def test_adapter_is_answered_with_its_base(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert "give its base model, org/model" in refusal(tmp_path)
