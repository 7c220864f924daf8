"""Models of the hub by their id, from a cache that is laid out as huggingface_hub does; the network is never asked."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModel
from safetensors.torch import save_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from inilora_kernels import FactorSet, approximate_model
from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.cli.main import application
from inilora_kernels.errors import CheckpointError, FactorFileError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets, tensors_of
from inilora_kernels.storage.authors_folder import save_inilora_pt

COMMIT, OLDER = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub reads the environment once, when it is imported."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, name: str = "org/model", commit: str = COMMIT, ref: str = "main") -> Path:
    """The folder of one revision of a repository in the cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    (repository / "blobs").mkdir(exist_ok=True)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def into_blobs(snapshot: Path) -> None:
    """Files of a snapshot are links to blobs."""
    for place, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = snapshot.parents[1] / "blobs" / f"{snapshot.name[:3]}{place}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))


def bert(folder: Path, seed: int = 0, **options: Any) -> BertModel:
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=36,
            max_position_embeddings=16,
        )
    )
    model.save_pretrained(folder, **options)
    return model


def test_factors_are_those_of_the_folder(tmp_path: Path, offline: Path) -> None:
    bert(tmp_path / "local")
    bert(cached(offline))
    into_blobs(offline / "models--org--model" / "snapshots" / COMMIT)
    given: dict[str, Any] = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    local = approximate_model(tmp_path / "local", **given)
    assert approximate_model("org/model", **given).to_bytes() == local.to_bytes()
    assert approximate_model(Path("org/model"), **given).to_bytes() == local.to_bytes()


def test_revisions(offline: Path) -> None:
    new, old = bert(cached(offline)), bert(cached(offline, commit=OLDER, ref="v1"), seed=1)
    name = "pooler.dense.weight"
    choose = tensors_of(None)
    assert torch.equal(open_checkpoint("org/model", choose=choose).read(name), new.pooler.dense.weight)
    for checkpoint in (
        open_checkpoint("org/model", revision="v1", choose=choose),
        open_checkpoint("org/model@v1", choose=choose),
        open_checkpoint("org/model", revision=OLDER, choose=choose),
    ):
        assert torch.equal(checkpoint.read(name), old.pooler.dense.weight)
        assert checkpoint.name == "org/model"


def test_shards_without_targets_are_not_needed(tmp_path: Path, offline: Path) -> None:
    """Embeddings and layer 1 are not in the cache: nothing asked for is in them."""
    snapshot = cached(offline)
    model = bert(snapshot)
    tensors = model.state_dict()
    (snapshot / "model.safetensors").unlink()
    layer = {name for name in tensors if ".layer.0." in name}
    save_file({name: tensors[name] for name in layer}, snapshot / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name in layer else 2}-of-00002.safetensors" for name in tensors}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    asked = [r"encoder.layer.0.attention.self.query"]
    checkpoint = open_checkpoint("org/model", choose=tensors_of(asked))
    targets = find_targets(checkpoint, asked)
    assert [target.module for target in targets] == asked
    assert set(checkpoint.absent) == tensors.keys() - layer
    with pytest.raises(CheckpointError, match=r"not all files that are needed"):
        open_checkpoint("org/model", choose=tensors_of(None))
    factors = approximate_model("org/model", rank=2, target_modules=asked, solver="krylov", cache=False, progress=False)
    save_inilora_pt(factors, tmp_path / "authors")
    (certified,) = FactorSet.load(tmp_path / "authors", "org/model").values()
    assert certified.source_sha256 == checkpoint.sha256("encoder.layer.0.attention.self.query.weight")


def test_pipeline(offline: Path) -> None:
    snapshot = cached(offline, "org/pipeline")
    for part, end in (("unet", "to_"), ("vae", "to_")):
        (snapshot / part).mkdir()
        tensors = {f"attn.{end}{kind}.weight": torch.randn(4, 6) for kind in "qv"}
        save_file(tensors, snapshot / part / "diffusion_pytorch_model.safetensors")
    (snapshot / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}))
    checkpoint = open_checkpoint("org/pipeline", choose=tensors_of(None))
    assert [target.module for target in find_targets(checkpoint)] == ["unet.attn.to_q", "unet.attn.to_v"]


def test_shards_of_a_pipelines_models(tmp_path: Path, offline: Path) -> None:
    """Two models whose shards have the same names; with a selection by full names, one shard of one of them."""
    snapshot = cached(offline, "org/pipeline")
    for part in ("transformer", "text_encoder"):
        (snapshot / part).mkdir()
        shards = {f"{place}.attn.to_q.weight": f"model-0000{place}-of-00002.safetensors" for place in (1, 2)}
        for name, file in shards.items():
            save_file({name: torch.randn(4, 6)}, snapshot / part / file)
        (snapshot / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (snapshot / "model_index.json").write_text(json.dumps({"transformer": ["", "T"], "text_encoder": ["", "E"]}))
    given: dict[str, Any] = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    asked = {"target_modules": ["transformer.2.attn.to_q"]}
    expected = approximate_model(snapshot, **asked, **given)
    needed = snapshot / "transformer/model-00002-of-00002.safetensors"
    for file in set(snapshot.rglob("*.safetensors")) - {needed}:
        file.unlink()
    factors = approximate_model("org/pipeline", **asked, **given)
    assert factors.to_bytes() == expected.to_bytes()
    save_inilora_pt(factors, tmp_path / "authors")
    assert FactorSet.load(tmp_path / "authors", "org/pipeline").keys() == factors.keys()


def run(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(application, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_by_id(offline: Path) -> None:
    """Of another revision too, which is another model here."""
    bert(cached(offline))
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=36)
    BertModel(config).save_pretrained(cached(offline, commit=OLDER, ref="v1"))
    assert run("plan", "org/model", "--rank", "4")["matrices"] == 4
    for asked in (["org/model@v1"], ["org/model", "--revision", "v1"], ["org/model", "--revision", OLDER]):
        assert run("plan", *asked, "--rank", "4", "--token", "hf_none")["matrices"] == 2
    assert run("plan", "org/model", "--rank", "4", "-t", "query")["matrices"] == 2


def test_inspect_by_id(tmp_path: Path, offline: Path) -> None:
    """The authors' folder does not say whose factors it holds: --base does, and gives each its loss."""
    bert(cached(offline))
    given: dict[str, Any] = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
    factors = approximate_model("org/model", **given)
    save_inilora_pt(factors, tmp_path / "authors")
    assert "query" in json.dumps(run("inspect", tmp_path / "authors", "--base", "org/model"))
    result = CliRunner().invoke(application, ["inspect", str(tmp_path / "authors"), "--base", "org/nothing"])
    assert isinstance(result.exception, CheckpointError)
    assert str(result.exception).startswith("org/nothing: no such file or folder here")


def test_the_cache_and_offline_mode_of_the_environment(tmp_path: Path) -> None:
    """A process of its own, with what users set: HF_HOME and HF_HUB_OFFLINE."""
    bert(cached(tmp_path / "home" / "hub"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    script = "from inilora_kernels.cli.main import main; main()"
    for name, found in (("org/model", True), ("org/nothing", False)):
        command = [sys.executable, "-c", script, "plan", name, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == found, done.stderr
        assert found or "HF_HUB_OFFLINE" in done.stderr


@pytest.mark.parametrize("name", ["org/nothing", "nothing-here", "org/model@v2"])
def test_not_in_the_cache(offline: Path, name: str) -> None:
    bert(cached(offline))
    with pytest.raises(CheckpointError, match="no such file or folder here") as error:
        open_checkpoint(name, choose=tensors_of(None))
    assert name in str(error.value)


def test_no_network(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of huggingface_hub's HTTP client are no OSErrors."""
    client = pytest.importorskip("httpx2")

    def unreachable(*_: object, **__: object) -> list[str]:
        raise client.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    model = bert(cached(offline))
    checkpoint = open_checkpoint("org/model", choose=tensors_of(None))
    assert torch.equal(checkpoint.read("pooler.dense.weight"), model.pooler.dense.weight)
    with pytest.raises(CheckpointError, match=r"org/nothing: .*Name or service not known"):
        open_checkpoint("org/nothing", choose=tensors_of(None))


def test_folders_go_before_ids(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(cached(offline))
    monkeypatch.chdir(tmp_path)
    local = bert(tmp_path / "org" / "model", seed=1)
    assert torch.equal(open_checkpoint("org/model").read("pooler.dense.weight"), local.pooler.dense.weight)


@pytest.mark.parametrize(
    "path",
    ["./org/model", "/org/model", "../nothing", "~/model", "modle/", "org/modle/", "a/b/c", "model.pt", "org/a.gguf"],
)
def test_paths_are_not_asked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: pytest.fail("asked"))
    result = CliRunner().invoke(application, ["plan", path])
    assert isinstance(result.exception, CheckpointError)
    for ask in (open_checkpoint, approximate_model):
        with pytest.raises(CheckpointError, match="or the id of a model on the hub"):
            ask(path)


def test_a_slip_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "llama").mkdir(parents=True)
    for given, meant in (
        ("modles/llama/", "models"),
        ("./models/lama", "llama"),
        ("models/lama", "llama"),
        ("modells", "models"),
        ("~/models/llama", str(tmp_path / "models/llama")),
    ):
        with pytest.raises(CheckpointError, match=f'did you mean "{meant}"'):
            open_checkpoint(given)


@pytest.mark.parametrize("name", ["org/model", "model"])
def test_everything_that_takes_a_base_takes_an_id(tmp_path: Path, offline: Path, name: str) -> None:
    original = bert(cached(offline, name))
    into_blobs(offline / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT)
    factors = tmp_path / "factors.safetensors"
    approximate_model(name, rank=2, solver="krylov", cache=False, progress=False).save(factors)
    export_delta(name, factors, tmp_path / "delta")
    export_residual(name, factors, tmp_path / "residual")
    for form, base in (("delta", name), ("residual", name), ("delta", None), ("residual", None)):
        errors = convert(tmp_path / form / "adapter", factors, tmp_path / f"{form} of {base}", base)
        assert set(errors.values()) == {0.0}
        export_merged(tmp_path / form / "adapter", factors, tmp_path / f"{form} of {base} merged", f"{name}@{COMMIT}")
        merged = BertModel.from_pretrained(tmp_path / f"{form} of {base} merged")
        assert all(map(torch.equal, original.state_dict().values(), merged.state_dict().values()))
    for folder in ("delta/adapter", f"residual of {name}", "residual of None"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (name, COMMIT), folder
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / f"delta of {name}"))
    ids = torch.arange(10)[None]
    assert torch.equal(loaded.eval()(ids)[0], original.eval()(ids)[0])


def test_an_adapter_needs_the_shards_that_have_factors(tmp_path: Path, offline: Path) -> None:
    """Its export in the delta form, and back to a plain LoRA; what copies the model needs all of it."""
    bert(cached(offline), max_shard_size="8KB")
    snapshot = offline / "models--org--model" / "snapshots" / COMMIT
    shards = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    query = "encoder.layer.1.attention.self.query"
    asked: dict[str, Any] = {"rank": 2, "target_modules": [query], "solver": "krylov", "cache": False}
    factors = approximate_model("org/model", **asked, progress=False)
    export_delta("org/model", factors, tmp_path / "of all")
    for shard in set(shards.values()) - {shards[f"{query}.weight"]}:
        (snapshot / shard).unlink()
    export_delta("org/model", factors, tmp_path / "delta")
    for file in sorted(file for file in (tmp_path / "delta").rglob("*") if file.is_file()):
        assert file.read_bytes() == (tmp_path / "of all" / file.relative_to(tmp_path / "delta")).read_bytes()
    for place, base in enumerate((None, "org/model", f"org/model@{COMMIT}")):
        convert(tmp_path / "delta/adapter", factors, tmp_path / f"lora {place}", base)
    config = json.loads((tmp_path / "lora 0/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", COMMIT)
    for copies in (
        lambda: export_residual("org/model", factors, tmp_path / "out"),
        lambda: export_merged(tmp_path / "delta/adapter", factors, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="this shard is missing"):
            copies()
    with pytest.raises(FactorFileError, match="the factors are not of this model"):
        export_delta("org/model", FactorSet({"other": factors[query]}, {}), tmp_path / "out")


def test_a_base_that_is_not_on_the_hub(tmp_path: Path, offline: Path) -> None:
    bert(cached(offline))
    factors = approximate_model("org/model", rank=2, solver="krylov", cache=False, progress=False)
    export_delta("org/model", factors, tmp_path / "delta")
    for function in (export_delta, export_residual):
        with pytest.raises(CheckpointError, match="no such file or folder here"):
            function("org/nothing", factors, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file or folder here"):
        convert(tmp_path / "delta" / "adapter", factors, tmp_path / "out", "org/nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://huggingface.co/org/name", "org/name: org/name"),
        ("https://huggingface.co/org/name/tree/v2", "org/name: org/name@v2"),
        ("hf://org/name", "org/name: org/name"),
        ("org/name:v2", "@revision: org/name@v2"),
        ("hf.co/org/name", "org/name: org/name"),
        ("org/name:Q4_K_M", "hf download org/name --include '*Q4_K_M*' --local-dir OUT`, and give the file"),
        ("org/name/model.gguf", "hf download org/name model.gguf`, and give the path it prints"),
        ("org/name/unet", "hf download org/name --include 'unet/*' --local-dir OUT`, and give OUT/unet"),
    ],
)
def test_what_looks_like_an_id_is_answered_with_the_id(given: str, meant: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(meant)):
        open_checkpoint(given)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "access is limited to users who accepted its terms; accept them at hf.co/org/name"),
        (404, "RepoNotFound", "no such model on the hub; a private one needs a token"),
        (401, "RepoNotFound", "no such model on the hub; a private one needs a token"),
        (
            401,
            "Invalid credentials in Authorization header",
            "the hub does not know the token; give a valid one, or log in anew",
        ),
        (404, "RevisionNotFound", "the hub's org/name has no revision v9"),
    ],
)
def test_what_the_hub_refuses(status: int, code: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the errors that huggingface_hub makes of the hub's answers."""
    client: Any = importlib.import_module(huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    if client.__name__ == "requests":
        pytest.skip("huggingface_hub before 1 has another client")
    request = client.Request("GET", "https://huggingface.co/api/models/org/name")
    header = "X-Error-Message" if " " in code else "X-Error-Code"
    answer = client.Response(status, headers={header: code}, request=request)

    def refused(*_: object, **__: object) -> None:
        huggingface_hub.utils.hf_raise_for_status(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        open_checkpoint("org/name", revision="v9")
