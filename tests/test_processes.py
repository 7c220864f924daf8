"""A run shared among processes: the same bytes as from one, nothing computed twice, and one's error ends all."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from inilora_kernels import approximate, approximate_model, processes
from inilora_kernels.errors import BackendError, InitializationError, ProcessError, WeightError
from inilora_kernels.factors import Factors
from inilora_kernels.kernels.loading import load_backend
from inilora_kernels.processes import Job, meet, shares, torchruns_job

main_job = importlib.import_module("inilora_kernels.approximate")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": 48, "k": 24, "v": 16}
    tensors = {
        f"layers.{layer}.{kind}_proj.weight": torch.randn(size, 40, generator=generator)
        for layer in range(3)
        for kind, size in sizes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def together(size: int, everywhere: bool, run: Any) -> list[Any]:
    """What `run` returned or raised in each member of a job: threads that share a store, as processes do."""
    store = HashStore()

    def member(rank: int) -> Any:
        job = Job(rank, size, meet(store, rank, size), everywhere)
        token = processes._joined.set(job)
        try:
            with job.reporting():
                return run()
        except InitializationError as error:
            return error
        finally:
            processes._joined.reset(token)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


@pytest.mark.parametrize("options", [{"solver": "krylov"}, {"steps": 30}, {"rank": "energy:0.3", "solver": "krylov"}])
@pytest.mark.parametrize("size", [2, 5])
def test_the_same_bytes_as_by_one(model: Path, size: int, options: dict[str, Any]) -> None:
    options = {"rank": 4, "target_modules": "all-linear", "cache": False, "progress": False} | options
    alone = approximate_model(model, **options).to_bytes()
    for everywhere in (True, False):
        found = together(size, everywhere, lambda: approximate_model(model, **options))
        assert found[0].to_bytes() == alone
        assert {one.to_bytes() == alone for one in found[1:]} == {everywhere}


def test_nothing_is_computed_twice(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    keep = main_job.cache.keep

    def counted(key: str, factors: Any) -> None:
        kept.append(key)
        keep(key, factors)

    monkeypatch.setattr(main_job.cache, "keep", counted)
    run = lambda: approximate_model(model, 2, "all-linear", solver="krylov", progress=False)  # noqa: E731
    first = together(3, False, run)[0].to_bytes()
    assert len(kept) == len(set(kept)) == 9
    assert together(2, True, run)[1].to_bytes() == first
    assert len(kept) == 9


def test_an_error_of_one_ends_all_with_one_message(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require = main_job.require_converged

    def diverged(module: str, factors: Any) -> None:
        if module == "layers.1.k_proj":
            raise WeightError("layers.1.k_proj: diverged")
        require(module, factors)

    monkeypatch.setattr(main_job, "require_converged", diverged)
    found = together(3, False, lambda: approximate_model(model, 2, "all-linear", steps=5, cache=False, progress=False))
    assert [str(error) for error in found if isinstance(error, WeightError)] == ["layers.1.k_proj: diverged"]
    assert isinstance(found[0], InitializationError)


def test_a_member_without_the_model_ends_all(model: Path, tmp_path: Path) -> None:
    paths = iter([model, tmp_path / "not here"])
    found = together(2, False, lambda: approximate_model(next(paths), 2, solver="krylov", progress=False))
    assert all(isinstance(error, InitializationError) for error in found)
    assert [str(error).split(":")[0] for error in found if not isinstance(error, ProcessError)] == [
        str(tmp_path / "not here")
    ]


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """What torchrun sets, and a store in which this process is alone."""
    monkeypatch.setattr(processes.dist, "rendezvous", lambda _: iter([(HashStore(), 0, 1)]))
    for name, value in {"WORLD_SIZE": "8", "MASTER_ADDR": "localhost", **variables}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("local_rank", "device"), [("0", 0), ("3", 3), ("5", 1)])
def test_each_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, device: int
) -> None:
    """On four simulated GPUs; of more processes than GPUs, several take one. The backend names it, for all threads."""
    pytest.importorskip("triton")
    taken = [7]
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "set_device": taken.append,
        "current_device": lambda: taken[-1],
        "get_device_capability": lambda _: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    launched(monkeypatch, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE="8")
    with torchruns_job():
        assert load_backend("auto").device == torch.device("cuda", device)


def test_each_process_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for size in ("2", "8", "100"):
        launched(monkeypatch, LOCAL_RANK="1", LOCAL_WORLD_SIZE=size)
        with torchruns_job():
            pass
    assert threads == [12, 3, 1]


@pytest.mark.parametrize("variable", ["LOCAL_RANK=first", "LOCAL_RANK=-1", "LOCAL_WORLD_SIZE=0", "WORLD_SIZE=two"])
def test_what_torchrun_never_sets(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    name, _, value = variable.partition("=")
    rendezvous = processes.dist.rendezvous
    launched(monkeypatch, RANK="0", MASTER_PORT="0", **{name: value})
    if name == "WORLD_SIZE":
        monkeypatch.setattr(processes.dist, "rendezvous", rendezvous)
    with pytest.raises(BackendError, match="torchrun"), torchruns_job():
        pass


def test_what_killed_processes_left_in_the_store_is_not_read() -> None:
    store = HashStore()
    for attempt in range(3):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(lambda rank: meet(store, rank, 3), range(3)))
        assert not any(one.check(["found"]) for one in stores)
        stores[attempt].set("found", str(attempt))
        assert {one.get("found") for one in stores} == {str(attempt).encode()}


def test_shares_are_balanced() -> None:
    costs = [float(cost) for cost in range(1, 100)]
    loads = [sum(costs[place] for place in part) for part in shares(costs, 8)]
    assert max(loads) <= 4 / 3 * sum(costs) / 8
    assert max(loads) - min(loads) <= max(costs)
    assert sorted(place for part in shares(costs, 8) for place in part) == list(range(99))
    assert shares([1.0], 3) == [[0], [], []]


def test_the_deal_goes_by_rank_0s_prediction(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On unequal machines each would predict something else, and matrices would be computed twice or never."""
    expected = alone(model)
    predicted = iter([[float(i + 1) for i in range(9)], [float(9 - i) for i in range(9)]])
    monkeypatch.setattr(main_job, "costs", lambda *_: next(predicted))
    run = lambda: approximate_model(model, 4, "all-linear", solver="krylov", cache=False, progress=False)  # noqa: E731
    found = together(2, True, run)
    assert {one.to_bytes() for one in found} == {expected}


def test_who_waits_for_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call on the main process alone would wait in silence for half an hour."""
    monkeypatch.setattr(processes, "_PATIENCE", 0.0)
    monkeypatch.setattr(processes, "_LONGEST_MEETING", 0.01)
    with pytest.warns(UserWarning, match="not rank 0 alone"), pytest.raises(ProcessError, match="make the same call"):
        meet(HashStore(), 0, 2)


def test_results_larger_than_what_a_store_takes_at_once() -> None:
    """TCPStore ends the connection at more than 8 MiB: factors of rank 128 of a 16384² matrix have 16."""
    server = TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    stores = [server, TCPStore("localhost", server.port, 2, is_master=False)]
    found = approximate(torch.ones(30, 20), 1, solver="krylov")
    large = [replace(found, A=torch.full((8, 320_000), float(rank)), B=torch.ones(9, 8)) for rank in range(2)]

    def gathered(rank: int) -> dict[str, Factors]:
        return Job(rank, 2, stores[rank], everywhere=True).gather({f"m{rank}": large[rank]}, {"m0": 0, "m1": 1})

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(gathered, range(2)):
            assert all(torch.equal(results[f"m{rank}"].A, large[rank].A) for rank in range(2))
    assert not stores[1].check(["result/0/0/2"])


TRAINER = """
    import os, sys, torch.distributed as dist
    from inilora_kernels import approximate_model
    dist.init_process_group("gloo")
    factors = approximate_model(sys.argv[1], 4, "all-linear", solver="krylov", progress=False)
    factors.save(f"{sys.argv[2]}-{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()
"""
KILLED = """
    import os, signal, sys
    from inilora_kernels.factor_set import FactorSet
    from inilora_kernels.processes import Job
    from inilora_kernels.storage import cache
    from inilora_kernels.cli.main import main
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    os.environ["INILORA_CACHE"] = f"{os.environ['INILORA_CACHE']}-{rank}"  # nodes without a shared folder
    def die(moment):
        if (rank, attempt, moment) == (os.environ["VICTIM"], "0", os.environ["MOMENT"]):
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    keep, together, gather, save = cache.keep, Job.together, Job.gather, FactorSet.save
    def keep_and_die(key, factors):
        keep(key, factors)
        with open(os.environ["LOG"], "a") as log:
            log.write(key + "\\n")
        die("solving")
    cache.keep = keep_and_die
    Job.together = lambda job, name, mine: die(name) or together(job, name, mine)
    Job.gather = lambda job, *results: die("gathering") or gather(job, *results)
    FactorSet.save = lambda *given: die("writing") or save(*given)
    main()
"""


SLOW = """
    import os, pathlib
    from inilora_kernels import processes
    from inilora_kernels.storage import cache
    from inilora_kernels.cli.main import main
    waits, keep, gather = pathlib.Path(os.environ["LOG"]), cache.keep, processes.Job.gather
    def keep_late(key, factors):
        while os.environ["RANK"] == "1" and not waits.exists():
            os.sched_yield()
        keep(key, factors)
    def gather_and_tell(job, mine, owners):
        if job.rank == 0:
            waits.touch()
        return gather(job, mine, owners)
    cache.keep, processes.Job.gather = keep_late, gather_and_tell
    main()
"""
NO_MODEL = """
    import os, sys
    from inilora_kernels.cli.main import main
    if os.environ["RANK"] == "1":
        sys.argv[2] += "-of-another-node"
    main()
"""
KRYLOV = ("--rank", "4", "-t", "all-linear", "--solver", "krylov")


def start(tmp_path: Path, script: str, *arguments: str | Path, launch: list[str], **environment: str) -> Any:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(file), *map(str, arguments)],
        # torchrun leaves a folder with the logs of its processes.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": str(tmp_path),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(tmp_path: Path, size: int, script: str, *arguments: str | Path, **environment: str) -> None:
    launch = ["--standalone", f"--nproc-per-node={size}", "--max-restarts=1"]
    run = start(tmp_path, script, *arguments, launch=launch, **environment)
    stderr = run.communicate()[1]
    assert run.returncode == 0, stderr


def alone(model: Path) -> bytes:
    return approximate_model(model, 4, "all-linear", solver="krylov", cache=False, progress=False).to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_trainers_own_gloo_processes(model: Path, tmp_path: Path, size: int) -> None:
    torchrun(tmp_path, size, TRAINER, model, tmp_path / "out")
    assert {(tmp_path / f"out-{rank}").read_bytes() for rank in range(size)} == {alone(model)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "moment", "signal"),
    [
        *((victim, moment, "SIGKILL") for moment in ("survey", "solving", "gathering") for victim in "012"),
        ("0", "writing", "SIGKILL"),
        ("0", "writing", "SIGHUP"),
        ("1", "gathering", "SIGHUP"),
        ("2", "solving", "SIGTERM"),
    ],
)
def test_torchrun_restarts_what_was_killed(model: Path, tmp_path: Path, victim: str, moment: str, signal: str) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    dying = {"VICTIM": victim, "MOMENT": moment, "LOG": str(log), "SIGNAL": signal}
    torchrun(tmp_path, 3, KILLED, "approximate", model, "-o", out, *KRYLOV, **dying)
    assert out.read_bytes() == alone(model)
    keys = log.read_text().split()
    assert len(keys) == len(set(keys)) == 9


@pytest.mark.slow
def test_two_nodes_without_a_shared_folder(model: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launch = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    nodes = []
    for node in range(2):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / model.name).write_bytes(model.read_bytes())
        nodes.append(
            start(
                folder,
                "from inilora_kernels.cli.main import main; main()",
                *("approximate", folder / model.name, "-o", folder / "out", *KRYLOV),
                launch=[*launch, "--local-addr=localhost"],
                INILORA_CACHE=str(folder / "cache"),
            )
        )
    said = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    written = [tmp_path / f"node{node}" / "out" for node in range(2)]
    assert [out.read_bytes() for out in written if out.exists()] == [alone(model)]


@pytest.mark.slow
def test_a_slow_process_is_waited_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torchrun(tmp_path, 2, SLOW, "approximate", model, "-o", out, *KRYLOV, LOG=str(tmp_path / "rank 0 is done"))
    assert out.read_bytes() == alone(model)


@pytest.mark.slow
def test_a_process_without_the_model_is_named_once(model: Path, tmp_path: Path) -> None:
    launch = ["--standalone", "--nproc-per-node=3"]
    run = start(tmp_path, NO_MODEL, "approximate", model, "-o", tmp_path / "out", *KRYLOV, launch=launch)
    said = run.communicate()[1]
    assert run.returncode != 0
    assert said.count(f"inilora: {model}-of-another-node: ") == 1, said
    assert not (tmp_path / "out").exists()
