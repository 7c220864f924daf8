"""Every place where models are, from there to a trained adapter and back; `python -m tests.adapters.places` draws the
table of docs/compatibility.md, and why something is refused, from these runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import lightning
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..mixtures import mixture
from .quantized_checkpoints import gguf_file, llama
from .stored_kinds import Kind, draw
from .test_shared_weights import ZAMBA
from .vision_towers import IMAGES, load_open_clip, load_timm, save_open_clip, save_timm

_F32 = torch.finfo(torch.float32).eps
_EVERY = frozenset({"read"})
_EXPORTS = frozenset({"residual", "delta"})  # what comes after is not tried
_LIVE = frozenset({"start live", "residual live"})
_FILES = frozenset({"residual", "merge"})  # which copy the model's folder
_COMMIT = "1" * 40


def _loaded(folder: Path, name: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """By transformers; of a place that it does not load itself, from the copy next to it."""
    original = folder.with_name("original")
    folder = original if folder.name == "model" and original.is_dir() else folder
    return getattr(transformers, name).from_pretrained(folder, device_map="cpu", **options).eval()


def _small() -> Any:
    return llama(torch.float32)


def _original(folder: Path) -> Any:
    """A LLaMA, which a copy next to the place holds too."""
    model = _small()
    model.save_pretrained(folder.with_name("original"))
    return model


def _sharded(folder: Path) -> None:
    _small().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def _without_index(folder: Path) -> None:
    _original(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors.index.json").unlink()


def _variant(folder: Path) -> None:
    _small().half().save_pretrained(folder, variant="fp16")


def _load_variant(folder: Path) -> Any:
    return _loaded(folder, variant="fp16" if any(folder.glob("*.fp16.*")) else None)


@contextlib.contextmanager
def _offline_hub() -> Iterator[None]:
    """huggingface_hub reads the environment once, when it is imported."""
    with tempfile.TemporaryDirectory() as cache:
        constants = huggingface_hub.constants
        with mock.patch.multiple(constants, HF_HUB_CACHE=cache, HF_HUB_OFFLINE=True):
            yield


def _on_the_hub(folder: Path) -> None:
    _small().save_pretrained(folder)
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(_COMMIT)
    shutil.copytree(folder, repository / "snapshots" / _COMMIT)


def _state_dict(folder: Path) -> dict[str, Tensor]:
    return _loaded(folder).state_dict()  # type: ignore[no-any-return]


def _wrapped(folder: Path, prefix: str) -> None:
    model = _original(folder)
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, folder / "pytorch_model.bin")


def _distributed(folder: Path) -> None:
    model = _original(folder)
    dcp.save(dict(model.state_dict()), checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder)


class _Lightning(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(batch)[0].square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _lightning(folder: Path) -> None:
    module = _Lightning(_original(folder))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(1, 11).view(1, 10), batch_size=1))
    trainer.save_checkpoint(folder / "last.ckpt")


def _root(folder: Path) -> Path:
    """The folder with the copy of the original, of a place or of what was exported from it."""
    return next(parent for parent in folder.parents if (parent / "original").is_dir())


def _with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """With the weights of an exported folder; the original's own otherwise."""
    if folder.name != "model":
        model.load_state_dict(load_file(next(folder.glob("*.safetensors"))), strict=False)
    return model.eval()


def _load_lightning(folder: Path) -> nn.Module:
    return _with_weights(_Lightning(_loaded(_root(folder) / "original")), folder)


def _sentence_transformer(folder: Path, inner: str) -> None:
    """Both layouts of sentence-transformers, by hand: its newer one has the model in the folder itself."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(folder / inner)
    kinds = [{"idx": 0, "name": "0", "path": inner, "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(kinds))


def _load_bert(folder: Path) -> Any:
    inner = folder / "0_Transformer"
    return _loaded(inner if inner.is_dir() else folder, "AutoModel")


# LLaMA's and Mistral's own names of a layer's parts.
_OWN = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _named_by_its_authors(model: Any) -> dict[str, Tensor]:
    tensors = {}
    for name, value in model.state_dict().items():
        own = name.removeprefix("model.")
        for theirs, ours in _OWN.items():
            own = own.replace(f".{theirs}.", f".{ours}.")
        own = own.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        tensors[own] = value.clone()
    return tensors


class _OwnNames(nn.Module):
    """transformers' LLaMA with the modules named as its authors' code names them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        model = _loaded(_root(folder) / "original")
        self.__dict__["model"] = model
        self.layers, self.others = nn.ModuleList(), nn.ModuleList([model.lm_head])
        self.others += [getattr(model.model, name) for name in ("embed_tokens", "norm", "rotary_emb")]
        for layer in model.model.layers:
            ours = nn.Module()
            for theirs, own in _OWN.items():
                part, _, last = own.rpartition(".")
                if part and not hasattr(ours, part):
                    ours.add_module(part, nn.Module())
                ours.get_submodule(part).add_module(last, layer.get_submodule(theirs))
            self.layers.append(ours)

    def forward(self, ids: Tensor) -> Any:
        for layer, ours in zip(self.__dict__["model"].model.layers, self.layers, strict=True):
            for theirs, own in _OWN.items():
                part, _, last = theirs.rpartition(".")
                setattr(layer.get_submodule(part), last, ours.get_submodule(own))
        return self.__dict__["model"](ids)


def _load_own_names(folder: Path) -> nn.Module:
    return _with_weights(_OwnNames(folder), folder)


def _consolidated(folder: Path, *, file: str) -> None:
    tensors = _named_by_its_authors(_original(folder))
    folder.mkdir()
    (folder / "params.json").write_text('{"dim": 128, "n_layers": 2, "n_heads": 4}')
    if file.endswith(".pth"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)


def _zamba(folder: Path) -> None:
    torch.manual_seed(0)
    transformers.ZambaForCausalLM(transformers.ZambaConfig(**ZAMBA)).save_pretrained(folder)


def _mixtral(folder: Path) -> None:
    """On disk each expert's matrices are by themselves, in the model in one parameter."""
    mixture("mixtral").save_pretrained(folder)


# What is answered with what to give


def _in_parts(folder: Path) -> None:
    folder.mkdir()
    for part in ("00", "01"):
        torch.save(_named_by_its_authors(_small()), folder / f"consolidated.{part}.pth")


def _deepspeed(folder: Path) -> None:
    (folder / "global_step10").mkdir(parents=True)
    (folder / "zero_to_fp32.py").touch()
    torch.save({}, folder / "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def _adapter(folder: Path) -> None:
    folder.mkdir()
    save_file({"a.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')


def _part_of_gguf(folder: Path) -> None:
    import gguf

    gguf_file(folder)
    whole = folder / "model.gguf"
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "part.gguf", "llama", split_max_tensors=100)
    writer.add_uint16("split.count", 2)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(folder / "part.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole.unlink()


def _place(title: str, write: Callable[[Path], None], load: Callable[[Path], Any] = _loaded, **options: Any) -> Kind:
    return Kind(title, write, load, **{"live": "transformers'", "refused": frozenset(), "eps": _F32, **options})


_TORCHS: dict[str, Any] = {"inputs": IMAGES, "live": "its layers, by hand"}

PLACES = [
    _place("a folder of transformers, in shards", _sharded),
    _place("its shards without an index", _without_index),
    _place("its file of a `variant`", _variant, _load_variant, eps=torch.finfo(torch.float16).eps),
    _place("a model on the hub by its id, offline", _on_the_hub, given=lambda _: "org/model", around=_offline_hub),
    _place("a live model", _sharded, given=_loaded, refused=_EXPORTS),
    _place("a state dict", _sharded, given=_state_dict, refused=_EXPORTS),
    _place("a file of DistributedDataParallel, `module.`", partial(_wrapped, prefix="module."), refused=_EXPORTS),
    _place("a file of torch.compile, `_orig_mod.`", partial(_wrapped, prefix="_orig_mod."), refused=_EXPORTS),
    _place("torch's distributed checkpoint", _distributed),
    _place("Lightning's `.ckpt`", _lightning, _load_lightning),
    _place("sentence-transformers", partial(_sentence_transformer, inner=""), _load_bert),
    _place(
        "sentence-transformers, `0_Transformer`",
        partial(_sentence_transformer, inner="0_Transformer"),
        _load_bert,
        refused=_FILES,
    ),
    _place("`consolidated.safetensors`", partial(_consolidated, file="consolidated.safetensors"), _load_own_names),
    _place("one `consolidated.00.pth`", partial(_consolidated, file="consolidated.00.pth"), _load_own_names),
    _place("timm", save_timm, load_timm, **_TORCHS),
    _place("open_clip, its MLPs", save_open_clip, load_open_clip, options={"target_modules": ["c_fc"]}, **_TORCHS),
    _place("open_clip, its attention", save_open_clip, load_open_clip, refused=_EXPORTS | _LIVE, **_TORCHS),
    _place(
        "experts by themselves (Mixtral)",
        _mixtral,
        partial(_loaded, experts_implementation="eager"),  # torch groups no matrices of float64
        refused=frozenset({"residual", "residual live"}),
        options={"target_parameters": ["experts.down_proj"]},
    ),
    _place("linear layers that share one weight (Zamba)", _zamba, refused=_FILES | {"residual live"}),
    _place("LLaMA's own weights in several parts", _in_parts, refused=_EVERY),
    _place("a folder of DeepSpeed", _deepspeed, refused=_EVERY),
    _place("an adapter by mistake", _adapter, refused=_EVERY),
    _place("a part of a split GGUF file", _part_of_gguf, refused=_EVERY),
]

HEADER = """\
| where | live model | read | start live | residual | delta | convert | merge |
|---|---|---|---|---|---|---|---|
"""
WHY = "What is refused, and what is said:\n\n"


def main() -> None:
    """Write the table into docs/compatibility.md."""
    draw(PLACES, HEADER, WHY)


if __name__ == "__main__":
    main()
