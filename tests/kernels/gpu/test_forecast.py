"""A whole run's prediction: the bars that Table 5 sets it, what waits for what, and the direct solver."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bench.six_models import MODELS, Model, predicted
from inilora_kernels import estimate
from inilora_kernels.cli.main import application
from inilora_kernels.errors import OptionError
from inilora_kernels.kernels.cpu.cost_model import Machine
from inilora_kernels.kernels.gpu.cost_model import Matrix, reached
from inilora_kernels.kernels.gpu.forecast import HOST_BANDWIDTH, DirectWork, direct_seconds, pass_seconds, plan
from inilora_kernels.kernels.gpu.gpus import GPUS
from inilora_kernels.kernels.gpu.gram_layout import cached_bytes, gram_layout
from inilora_kernels.kernels.gpu.tiles import gram_tile
from inilora_kernels.solvers.krylov_batch import passes_expected, room

ROWS = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
ADA = GPUS["rtx4090"]
LLAMA = [Matrix((4096, 4096), 2, 8)] * 64


@ROWS
def test_table_5_is_predicted_thirty_times_below_the_paper(model: Model) -> None:
    assert model.minutes * 60 / predicted(model).seconds >= 30


@ROWS
@pytest.mark.parametrize(
    "worse",
    [
        {"cache_bandwidth": ADA.cache_bandwidth / 2},
        {"half": ADA.half / 2, "float32": ADA.float32 / 2},
        {"launch": 2.5 * ADA.launch},
    ],
    ids=["cache", "tensor cores", "launches"],
)
def test_the_bar_holds_where_one_assumption_is_off_by_two(model: Model, worse: dict[str, float]) -> None:
    """The cache's bandwidth, the share of the tensor cores and the launches are assumptions until measured."""
    itemsize = getattr(torch, model.dtype).itemsize
    forecast = plan([Matrix(shape, itemsize, 8) for shape in model.shapes], replace(ADA, **worse), 20_000)
    assert model.minutes * 60 / forecast.seconds >= 30


@ROWS
@pytest.mark.parametrize("gpu", GPUS)
def test_partial_sums_stay_below_fifteen_percent_of_w(model: Model, gpu: str) -> None:
    for group in predicted(model, gpu).groups:
        assert group.step.weight_bytes == sum(one.shape[0] * one.shape[1] * one.itemsize for one in group.matrices)
        assert group.step.partial_bytes < 0.15 * group.step.weight_bytes


@ROWS
@pytest.mark.parametrize("gpu", GPUS)
def test_memory_stays_below_the_bar(model: Model, gpu: str) -> None:
    forecast = predicted(model, gpu)
    assert forecast.memory <= 1.3 * model.weight_bytes
    # Also where a whole batch of 64 streams from DRAM at once.
    for group in forecast.groups:
        alone = plan([group.matrix], ADA, 20_000).memory
        assert alone <= 1.3 * group.matrix.shape[0] * group.matrix.shape[1] * group.matrix.itemsize


def test_what_the_kernels_do_not_take_is_refused() -> None:
    with pytest.raises(OptionError, match="rank ≤ 128"):
        plan([Matrix((768, 768), 4, 129)], ADA, 20_000)
    with pytest.raises(OptionError, match="no matrix"):
        plan([], ADA, 20_000)


def test_the_command_prints_the_plan(minilm: Path) -> None:
    shown = CliRunner().invoke(application, ["plan", str(minilm), "--gpu", "rtx4090", "--kernels"])
    assert shown.exit_code == 0
    for text in ("Predicted on RTX 4090", "12 × 384×384", "launches", "W read a step", "bound by", "not measured"):
        assert text in " ".join(shown.output.split())


def test_the_command_prints_json_for_mixed_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"q_proj": torch.zeros(64, 32).half(), "v_proj": torch.zeros(16, 32).double()}
    save_file({f"layers.0.{name}.weight": W for name, W in weights.items()}, path)
    shown = CliRunner().invoke(
        application, ["plan", str(path), "--gpu", "h100", "--rank", "4", "--steps", "7", "--json"]
    )
    whole = json.loads(shown.output)
    assert whole["predicted"] is True
    assert min(whole["seconds"].values()) > 0
    content = whole["gpu"]
    assert (content["gpu"], content["steps"], content["launches"]) == ("H100 SXM", 7, 28)
    assert [(group["shape"], group["bits"]) for group in content["groups"]] == [([64, 32], 16), ([16, 32], 32)]
    assert content["groups"][0]["step"]["weight_bytes"] == 64 * 32 * 2


@ROWS
@pytest.mark.parametrize("gpu", GPUS)
def test_the_host_is_a_twentieth_of_the_run_at_most(model: Model, gpu: str) -> None:
    """What the device waits for: the first upload, later ones that no step hides, milestones, graphs."""
    forecast = predicted(model, gpu)
    # A run of a third of a second, RoBERTa Base on a B200, waits 25 ms: an H200's host took 55 µs a captured launch.
    assert forecast.host <= max(0.05 * forecast.seconds, 0.025)


def test_only_the_first_upload_of_many_is_waited_for() -> None:
    (group,) = plan(LLAMA, ADA, 20_000).groups
    assert group.waves == 64
    assert group.copying == pytest.approx(4096 * 4096 * 2 / HOST_BANDWIDTH)
    # A run of one step hides no more than its losses take.
    (short,) = plan(LLAMA, ADA, 1).groups
    assert 64 * group.copying - short.losses - short.seconds <= short.copying < 64 * group.copying


def test_waves_are_those_that_will_run() -> None:
    """Neighbours of other shapes fill a wave up: what `divide` does is what is predicted."""
    mixed = [Matrix((4096, 4096), 2, 8)] * 32 + [Matrix((1024, 4096), 2, 8)] * 32
    forecast = plan(mixed, ADA, 20_000)
    assert sum(group.count for group in forecast.groups) == 64
    assert any("4096×4096, " in group.shapes for group in forecast.groups)
    assert plan(mixed, GPUS["h100"], 20_000).groups[0].shapes == "32 × 4096×4096, 32 × 1024×4096"


def direct_work(shape: tuple[int, int], rank: int) -> DirectWork:
    return DirectWork(shape, 2, rank, room(min(shape), [rank]), passes_expected(rank, min(shape)))


def test_a_pass_of_the_direct_solver_reads_w_from_memory_once_where_it_fits_the_cache() -> None:
    def of(gpu: str) -> float:
        layout = gram_layout(
            [(4096, 4096)] * 16, 2, gram_tile("sm_89", 2), cached_bytes(GPUS[gpu]), GPUS[gpu].multiprocessors
        )
        return pass_seconds(layout, 2, GPUS[gpu])

    size = 16 * 4096 * 4096 * 2
    assert of("rtx4090") == pytest.approx(size / (0.9 * ADA.dram) + size / (0.7 * ADA.cache_bandwidth), rel=0.4)
    # An H100's cache holds none of them: twice from DRAM.
    assert of("h100") == pytest.approx(2 * size / (reached(GPUS["h100"]).dram * GPUS["h100"].dram), rel=0.05)


def test_the_direct_solver_is_predicted_far_below_the_steps() -> None:
    works = [direct_work((4096, 4096), 8)] * 64
    for gpu in GPUS.values():
        optimum, factors = (direct_seconds(works, gpu, factors=wanted) for wanted in (False, True))
        assert optimum <= factors < 0.1 * plan(LLAMA, gpu, 20_000).seconds
    # What no batch takes is counted too.
    assert direct_seconds([direct_work((384, 384), 8)] * 12, ADA, factors=True) > 0.1


def test_a_plan_takes_the_optimum_and_the_direct_solver_from_the_card() -> None:
    works = [estimate.Work((4096, 4096), 2, 8)] * 64
    slow = Machine(1e9, 1e9, 1e9, 1)
    on_card = estimate.seconds(works, "krylov", 0, machine=slow, card=ADA)
    assert on_card < 0.01 * estimate.seconds(works, "krylov", 0, machine=slow)
    adam = estimate.seconds(works, "adam", 20_000, machine=slow, card=ADA)
    assert adam == pytest.approx(
        estimate.reading_seconds(works, slow)
        + estimate.direct_on_card(works, ADA, factors=False)
        + plan(LLAMA, ADA, 20_000).seconds
    )
