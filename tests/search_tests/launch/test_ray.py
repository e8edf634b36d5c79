"""Workers as tasks of a Ray cluster: what each takes, and a real cluster of several nodes whose nodes come and go."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from data.errors import RunError, UserError
from search.attributes import CAUSE, CONFIRM_SUFFIX, SLOT
from search.host.environment import required
from search.host.process import PARENT_VARIABLE
from search.launch.base import StudyLocation
from search.ledger.budget import count_budget, request_budget
from search.ledger.leases import Ledger, open_ledger
from search.ledger.registry import list_workers, read_logs
from search.storage.connect import storage_opened
from search.storage.url import storage_url
from support.bench import TIMES, enter, opened_ledger
from support.command import Command

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from search.launch import ray_cluster
    from search.launch.ray_cluster import (
        ClusterOptions,
        WorkerResources,
        connected_cluster,
        worker_capacity,
        worker_resources,
    )
    from search.launch.ray_launcher import RayWorkers

ROOT = Path(__file__).parents[3]


pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


# What a worker takes


GPU_NODE = {"CPU": 16.0, "GPU": 2.0}
CPU_NODE = {"CPU": 6.0}


@pytest.mark.parametrize(
    ("nodes", "device", "per_gpu", "cpus", "share", "room"),
    [
        ([GPU_NODE, CPU_NODE], "auto", None, None, WorkerResources(1, 1), 2),
        ([GPU_NODE, GPU_NODE], "cuda", 2, None, WorkerResources(1, 0.5), 8),
        ([GPU_NODE], "auto", 3, None, WorkerResources(1, 0.3333), 6),
        ([GPU_NODE], "auto", 4, 8.0, WorkerResources(8, 0.25), 2),
        ([GPU_NODE, CPU_NODE], "cpu", None, None, WorkerResources(4, 0), 5),
        ([CPU_NODE], "auto", None, None, WorkerResources(4, 0), 1),
        ([{"CPU": 2.0}, {"CPU": 1.0}], "auto", None, None, WorkerResources(2, 0), 1),
        ([{"CPU": 2.0}, {"CPU": 1.0}], "auto", None, 0.5, WorkerResources(0.5, 0), 6),
        ([{"memory": 1.0}], "auto", None, None, WorkerResources(1, 0), 0),
        ([CPU_NODE], "cuda", None, None, WorkerResources(1, 1), 0),
    ],
)
def test_a_worker_takes_a_share_of_a_node(
    nodes: list[dict[str, float]],
    device: str,
    per_gpu: int | None,
    cpus: float | None,
    share: WorkerResources,
    room: int,
) -> None:
    assert worker_resources(nodes, device, per_gpu, cpus) == share
    assert worker_capacity(nodes, share) == room


def test_a_gpu_by_its_number_is_rays_to_choose() -> None:
    with pytest.raises(UserError, match=r"--device takes auto, cpu or cuda, not 'cuda:1'"):
        worker_resources([GPU_NODE], "cuda:1", None, None)


def test_what_a_node_may_install_has_versions() -> None:
    needs = required()
    assert any(need.startswith("torch==") for need in needs)
    assert not any(need.startswith(("ray", "pytest")) for need in needs)
    assert all("==" in need for need in needs)


# The command line


@pytest.mark.parametrize("words", [("--ray-address", "auto"), ("--cpus-per-worker", "2"), ("--ray-install",)])
def test_rays_options_go_with_ray(search: Command, tiny: Path, words: tuple[str, ...]) -> None:
    ended = search("run", "--study", tiny, "--dataset", "digits", *words)
    assert ended.status == 2
    assert "go with --launcher ray" in ended.err


def test_no_ray_is_one_line(search: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "search.launch.ray_cluster", None)
    ended = search("run", "--study", tiny, "--dataset", "digits", "--launcher", "ray")
    assert ended.status == 2
    assert 'pip install "block-search[ray]"' in ended.err


@pytest.mark.parametrize(
    ("address", "way_out"), [("127.0.0.1:1", "start one with"), ("ray://127.0.0.1:1", "set RAY_AUTH_MODE=token")]
)
def test_no_cluster_is_one_line(
    search: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, address: str, way_out: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ("--launcher", "ray", "--ray-address", address)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("nobody answers")))
    ended = search("run", "--study", tiny, "--dataset", "digits", *words)
    assert ended.status == 2
    assert f"no Ray cluster at --ray-address {address}: nobody answers; " in ended.err
    assert way_out in ended.err
    assert ended.err.count("\n") == 1


# A process that ends with the one that started it


def test_a_command_ends_with_the_process_that_it_belongs_to(home: Path) -> None:
    opened_here = "import time; from search.host.process import end_with_parent; end_with_parent(); time.sleep(60)"
    program = f"""
import os, subprocess, sys
os.environ[{PARENT_VARIABLE!r}] = str(os.getpid())
child = subprocess.Popen([sys.executable, "-c", {opened_here!r}])
print(child.pid, flush=True)
child.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    middle = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert middle.stdout is not None
    child = psutil.Process(int(middle.stdout.readline()))
    time.sleep(1.0)
    assert child.is_running()
    middle.kill()
    middle.communicate()
    assert _gone(child)


def _gone(process: psutil.Process) -> bool:
    for _ in range(100):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


# A real cluster


@pytest.fixture
def nodes(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head that runs no worker, and room for two workers on each of two nodes."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # unix sockets have short names
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 2000}
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(nodes: Nodes, node: Any) -> None:
    """As a power cut does it: everything on the node at once, the workers' own processes too."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    nodes.remove_node(node, allow_graceful=False)


@dataclass
class Run:
    """``python -m search run`` as a process."""

    process: subprocess.Popen[str]
    out: Path

    def text(self) -> str:
        return self.out.read_text()

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.2)

    def end(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.text()) from None


@pytest.fixture
def start(home: Path, tiny: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run on digits with trials of some seconds."""
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 20\ntrain_images = 200"))
    tiny.write_text(tiny.read_text() + "\n[workers]\nheartbeat = 0.5\nlost_after = 6\n")
    runs = []

    def call(*words: str) -> Run:
        out = home / f"run-{len(runs)}.txt"
        with out.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "search", "run", "--study", "tiny.toml", "--dataset", "digits", *words],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=file, stderr=file, text=True,
            )  # fmt: skip
        runs.append(Run(process, out))
        return runs[-1]

    yield call
    for one in runs:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@contextlib.contextmanager
def study_of(url: URL, name: str = "tiny") -> Iterator[tuple[Ledger, Any]]:
    with storage_opened(url) as storage:
        yield open_ledger(storage, name, TIMES)


def done(url: URL) -> int:
    try:
        with study_of(url) as (ledger, _):
            return count_budget(ledger).done
    except (KeyError, UserError):
        return 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_is_lost_and_one_joins_in_mid_study(
    nodes: Nodes, start: Callable[..., Run], postgres_url: str, home: Path
) -> None:
    """Exact budget, nothing lost; the finale trains on the cluster, too, and the model is here in the end."""
    url = storage_url(postgres_url)
    run = start(
        "--trials", "12", "--storage", postgres_url, "--launcher", "ray", "--ray-address", nodes.address,
        "--cpus-per-worker", "1", "--max-retrain-epochs", "2",
    )  # fmt: skip
    run.wait_for(lambda: done(url) >= 3)
    with study_of(url) as (ledger, _):
        assert sum(row.lives for row in list_workers(ledger)) == 4
        told = [log for log in read_logs(ledger).values() if log.lines]
        assert told
        assert all(log.location and "ray logs task --id" in log.location for log in told)
    kill_node(nodes, next(iter(nodes.worker_nodes)))
    before = done(url)
    run.wait_for(lambda: "Ray: 2 nodes with room for 2; 2 workers" in run.text())
    run.wait_for(lambda: done(url) > before)
    nodes.add_node(num_cpus=3)
    assert run.end() == 0, run.text()
    assert "Ray: 3 nodes with room for 4; 4 workers" in run.text()
    assert "Ray: 3 nodes with room for 5; 5 workers" in run.text()
    with study_of(url) as (ledger, study):
        count = count_budget(ledger)
        assert (count.requested, count.done, count.running, count.waiting) == (12, 12, 0, 0)
        ended = [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        assert sorted(trial.user_attrs[SLOT] for trial in ended) == list(range(12))
        lost = [trial for trial in study.trials if trial.state == TrialState.FAIL]
        assert lost, "nobody was at work on the node that was lost"
        assert all(trial.user_attrs[CAUSE] for trial in lost)
        assert not any(row.lives for row in list_workers(ledger))
    with study_of(url, f"tiny{CONFIRM_SUFFIX}") as (ledger, _):
        assert count_budget(ledger).remaining == 0
    summary = json.loads((home / "studies/tiny/summary.json").read_text())
    assert summary["retrain"]["test_accuracy"]["n"] >= 1
    assert summary["holdout_reads"] == summary["retrain"]["test_accuracy"]["n"]
    assert (home / "studies/tiny/best/model.safetensors").exists()
    assert not any(process.name().startswith("ray::carry") for process in psutil.process_iter())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_head_is_lost_and_another_cluster_goes_on(
    nodes: Nodes, start: Callable[..., Run], postgres_url: str, home: Path
) -> None:
    url = storage_url(postgres_url)
    words = ("--trials", "5", "--storage", postgres_url, "--no-finale")
    run = start(*words, "--launcher", "ray", "--ray-address", nodes.address, "--cpus-per-worker", "1")
    run.wait_for(lambda: done(url) >= 1)
    nodes.shutdown()
    assert run.end() == 1
    assert "the Ray cluster is gone" in run.text()
    assert "Traceback" not in run.text()
    again = start(*words)  # on this machine alone
    assert again.end() == 0, again.text()
    with study_of(url) as (ledger, _):
        count = count_budget(ledger)
        assert (count.done, count.running, count.waiting) == (5, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_hands_all_trials_back(nodes: Nodes, start: Callable[..., Run], postgres_url: str) -> None:
    url = storage_url(postgres_url)
    run = start(
        "--trials", "12", "--storage", postgres_url, "--no-finale", "--cpus-per-worker", "1",
        "--launcher", "ray", "--ray-address", nodes.address, "--workers", "5",
    )  # fmt: skip
    run.wait_for(lambda: done(url) >= 1)
    assert "5 workers, 1 of which wait until the cluster grows" in run.text()
    run.process.send_signal(signal.SIGINT)
    assert run.end(60) == 130
    with study_of(url) as (ledger, study):
        count = count_budget(ledger)
        assert (count.running, count.done + count.waiting) == (0, 12)
        assert not any(row.lives for row in list_workers(ledger))
        back = [trial for trial in study.trials if trial.state == TrialState.FAIL]
        assert all(trial.user_attrs["fault"] == "preempted" for trial in back)


# The launcher on a real cluster, with workers that cannot work


@pytest.fixture
def ledger(home: Path) -> Iterator[Ledger]:
    with opened_ledger(storage_url(f"sqlite:///{home / 'ray.db'}"), TIMES) as (ledger, _):
        request_budget(ledger, 3)
        yield ledger


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_share_a_gpu_by_fractions_and_stay_away_where_they_end_badly(
    ledger: Ledger, nodes: Nodes, home: Path
) -> None:
    """A GPU by Ray's count: it places tasks by such numbers, whatever a node has."""
    nodes.add_node(num_cpus=2, num_gpus=1)
    nodes.wait_for_nodes()
    url, told = storage_url(f"sqlite:///{home / 'ray.db'}"), []
    with connected_cluster(ClusterOptions(nodes.address, url, per_gpu=2, cpus=0.5)) as where:
        assert (where.kind, where.share) == ("cuda", WorkerResources(0.5, 0.5))
        # No such study: every worker says so and leaves with status 2.
        study = StudyLocation(url, "absent", home, home / "out")
        local = RayWorkers(ledger, where, study, told.append)
        free = []
        with pytest.raises(UserError, match="no study 'absent'"):
            for _ in range(600):
                local.maintain(list_workers(ledger), 0, 3)
                free.append(ray.available_resources().get("GPU", 0.0))
                time.sleep(0.1)
        assert any("Ray: 4 nodes with room for 2; 2 workers" in line for line in told)
        assert min(free) == 0.0  # both at once
        assert any("worker 0 has left: no study 'absent'" in line for line in told)
        local.stop()
    assert not ray.is_initialized()


def test_a_cluster_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: (_ for _ in ()).throw(RuntimeError("GCS is away")))
    with pytest.raises(RunError, match=r"the Ray cluster is gone \(GCS is away\); nothing stored is lost"):
        ray_cluster.alive_nodes()


def test_workers_of_a_cluster_are_not_this_machines(ledger: Ledger) -> None:
    from search.host.process import this_process
    from search.launch.local import adopt_orphans, is_local
    from search.ledger.registry import register_worker

    register_worker(ledger, this_process(), 0, "ray-0123")
    enter(ledger)
    assert not any(is_local(row) for row in list_workers(ledger))
    assert adopt_orphans(ledger) == 0
