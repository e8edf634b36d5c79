"""How many workers share a GPU: what nvidia-smi says, what is decided from it, and what `run` does then."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from search.attributes import FAULT, WORKER
from search.host import resources
from search.host.process import this_process
from search.host.resources import available_memory
from search.launch import gpu_sharing as gpus
from search.launch import local as launch
from search.launch import nvidia_smi
from search.launch.base import StudyLocation
from search.launch.gpu_sharing import GIB, GpuLoad, HostLoad, is_measured, why_no_more_workers
from search.launch.local import LocalWorkers, WorkerPlan, local_launcher
from search.launch.nvidia_smi import GpuReader, GpuSample, gpu_key, parse_gpus
from search.ledger.attempts import Attempt, begin_attempt, finish_attempt
from search.ledger.budget import request_budget
from search.ledger.leases import Ledger, lease_slot
from search.ledger.registry import DeviceOption, list_workers, register_worker, take_device
from search.run.options import RunOptions
from search.storage.url import storage_url
from support.bench import draw, opened_ledger
from support.command import Command

UUID = "5c1f2ab0-63d1-9e9c-0b1a-7f00a2c0ffee"
"""As torch prints it."""


# The parser.


def test_what_nvidia_smi_prints_is_read() -> None:
    text = f"GPU-{UUID.upper()}, 41, 9011, 81559\nGPU-00000000-0000-0000-0000-000000000001, 0, 3, 24564\n"
    first, second = parse_gpus(text)
    assert first == GpuSample(UUID, 41, 9011 * 2**20, 81559 * 2**20)
    assert (second.key, second.utilisation) == ("00000000-0000-0000-0000-000000000001", 0)


@pytest.mark.parametrize("word", ["[N/A]", "[Not Supported]", "N/A", "[Unknown Error]", "", "[GPU requires reset]"])
def test_what_is_not_said_is_none(word: str) -> None:
    assert parse_gpus(f"GPU-{UUID}, {word}, 9011, 81559") == (GpuSample(UUID, None, 9011 * 2**20, 81559 * 2**20),)
    assert parse_gpus(f"GPU-{UUID}, 5, {word}, {word}") == (GpuSample(UUID, 5, None, None),)


@pytest.mark.parametrize("text", ["", "\n\n", "No devices were found\n", "NVIDIA-SMI has failed, since ...\n"])
def test_other_lines_are_no_gpus(text: str) -> None:
    assert parse_gpus(text) == ()


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    assert all(sample.key for sample in parse_gpus(text))


def test_torchs_and_the_drivers_names_of_a_gpu_are_one() -> None:
    assert gpu_key(f" GPU-{UUID.upper()} ") == gpu_key(UUID) == UUID
    assert gpu_key(f"MIG-{UUID}") != UUID


# The decision.

IDLE = GpuLoad(workers=1, samples=10, seconds=20, trials=3, busy=41, used=9 * GIB, total=80 * GIB, largest=9 * GIB)


ROOMY = HostLoad(workers=1, cores=16, memory=64 * GIB)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"busy": 69.5}, None),
        ({"busy": 70}, "busy enough"),
        ({"workers": 3, "gain": 1.1}, None),
        ({"workers": 2, "gain": None}, None),
        ({"workers": 4, "gain": 2.0}, "4 are the most"),
        ({"workers": 7}, "4 are the most"),
        ({"workers": 2, "gain": 1.09}, "with the second one it trains only 1.09 times as many images"),
        ({"ran_out": True}, "a trial ran out of its memory"),
        ({"largest": 50 * GIB, "used": 20 * GIB}, "a worker takes up to 50 GiB, and 1.3 times that is not free"),
        ({"total": 24 * GIB, "used": 12 * GIB, "largest": 12 * GIB}, "1.3 times that is not free"),
        ({"total": 28 * GIB, "used": 12 * GIB, "largest": 12 * GIB}, None),
    ],
)
def test_a_gpu_gets_another_worker(changes: dict[str, Any], why: str | None) -> None:
    decided = why_no_more_workers(replace(IDLE, **changes), ROOMY, at_work=1, waiting=100)
    assert decided is None if why is None else why in (decided or "")


@pytest.mark.parametrize(
    ("host", "at_work", "waiting", "why"),
    [
        (replace(ROOMY, cores=4), 1, 100, None),
        (replace(ROOMY, cores=3), 1, 100, "every worker wants 2 of the host's 3 cores"),
        (replace(ROOMY, workers=8), 1, 100, "every worker wants 2"),
        (replace(ROOMY, memory=2 * GIB - 1), 1, 100, "it wants 2 GiB of the host's memory"),
        (ROOMY, 3, 3, None),
        (ROOMY, 3, 2, "fewer configurations wait than workers are there"),
    ],
)
def test_host_and_budget_have_a_say(host: HostLoad, at_work: int, waiting: int, why: str | None) -> None:
    decided = why_no_more_workers(IDLE, host, at_work, waiting)
    assert decided is None if why is None else why in (decided or "")


def test_a_worker_of_a_small_network_is_told_with_its_fraction() -> None:
    load = replace(IDLE, total=2 * GIB, used=int(0.75 * GIB), largest=int(1.25 * GIB))
    assert "up to 1.2 GiB" in (why_no_more_workers(load, ROOMY, 1, 100) or "")


@pytest.mark.parametrize(
    ("changes", "enough"),
    [({}, True), ({"samples": 9}, False), ({"seconds": 19.9}, False), ({"trials": 2}, False),
     ({"workers": 2, "trials": 5}, False), ({"workers": 2, "trials": 6}, True)],
)  # fmt: skip
def test_nothing_is_decided_from_little(changes: dict[str, Any], enough: bool) -> None:
    assert is_measured(replace(IDLE, **changes)) is enough


memory = st.integers(0, 200 * GIB)
loads = st.builds(
    GpuLoad,
    workers=st.integers(1, 6),
    samples=st.integers(10, 150),
    seconds=st.floats(20, 1e4),
    trials=st.integers(18, 200),
    busy=st.floats(0, 100),
    used=memory,
    total=memory,
    largest=memory,
    ran_out=st.booleans(),
    gain=st.none() | st.floats(0, 4),
)


hosts = st.builds(HostLoad, workers=st.integers(1, 32), cores=st.integers(1, 256), memory=memory)


@given(loads, hosts, st.integers(1, 40), st.integers(0, 200))
def test_a_worker_is_added_only_where_everything_has_room(
    load: GpuLoad, host: HostLoad, at_work: int, waiting: int
) -> None:
    if why_no_more_workers(load, host, at_work, waiting) is None:
        assert load.workers < 4
        assert load.total - load.used >= 1.3 * load.largest
        assert load.busy < 70
        assert not load.ran_out
        assert host.cores >= 2 * (host.workers + 1)
        assert host.memory >= 2 * GIB
        assert waiting >= at_work


@given(loads, hosts, st.integers(1, 40), st.integers(0, 200), memory, memory)
def test_more_free_memory_never_costs_a_worker(
    load: GpuLoad, host: HostLoad, at_work: int, waiting: int, freed: int, host_freed: int
) -> None:
    if why_no_more_workers(load, host, at_work, waiting) is None:
        roomier = replace(load, used=max(0, load.used - freed))
        more = replace(host, memory=host.memory + host_freed)
        assert why_no_more_workers(roomier, more, at_work, waiting) is None


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n"}, 8),
        ({"meminfo": "MemAvailable: 8388608 kB\n", "memory.max": "max\n", "memory.current": "5"}, 8),
        ({"meminfo": "MemAvailable: 8388608 kB\n", "memory.max": str(4 * GIB), "memory.current": str(3 * GIB),
          "memory.stat": f"anon 1\ninactive_file {GIB}\n"}, 2),
        ({"meminfo": "MemAvailable: 8388608 kB\n", "memory.max": str(4 * GIB), "memory.current": str(5 * GIB)}, 0),
        ({}, 0),
    ],
)  # fmt: skip
def test_free_memory_is_held_to_the_containers_share(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], gib: int
) -> None:
    def read_text(path: Path) -> str:
        if path.name not in files:
            raise FileNotFoundError
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == gib * GIB


# The reader.


def script(folder: Path, body: str) -> tuple[str, ...]:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return (str(path),)


def read_until(reader: GpuReader, done: Callable[[], bool]) -> list[tuple[GpuSample, ...]]:
    answers = []
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        if answer := reader.read_gpus():
            answers.append(answer)
        time.sleep(0.005)
    return answers


def test_the_reader_never_waits_and_reads_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "EVERY_SECONDS", 0.2)
    command = script(tmp_path, f"echo x >> {tmp_path}/calls; sleep 0.4; echo 'GPU-{UUID}, 41, 1, 2'")
    reader = GpuReader(command)
    begun = time.monotonic()
    assert reader.read_gpus() == reader.read_gpus() == ()
    assert time.monotonic() - begun < 0.4
    calls = tmp_path / "calls"
    answers = read_until(reader, lambda: calls.exists() and calls.read_text().count("x") == 2)
    reader.close()
    assert answers[0] == (GpuSample(UUID, 41, 2**20, 2**21),)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        ("echo 'No devices were found'; exit 6", "ended with status 6 and shows no GPU: No devices were found"),
        ("exit 0", "ended with status 0 and shows no GPU"),
        (f"echo 'GPU-{UUID}, 41, 1, 2'; exit 15", "ended with status 15"),
        ("sleep 60", "gave no answer within 0.2 s"),
    ],
)
def test_a_reader_that_fails_says_why_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, trouble: str
) -> None:
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_SECONDS", 0.2 if "sleep" in body else 20)
    reader = GpuReader(
        script(tmp_path, f"echo x >> {tmp_path}/calls; exec 2>&1; {body.replace('sleep', 'exec sleep')}")
    )
    assert read_until(reader, lambda: reader.trouble is not None) == []
    assert trouble in (reader.trouble or "")
    assert reader.read_gpus() == ()
    assert (tmp_path / "calls").read_text() == "x\n"


def test_closing_ends_what_still_runs(tmp_path: Path) -> None:
    reader = GpuReader(script(tmp_path, "exec sleep 60"))
    reader.read_gpus()
    child = reader._child
    assert child is not None
    reader.close()
    assert child.poll() == -9
    reader.close()


# What `run` does with it.


class FakeChild:
    pid = 4_000_000

    def poll(self) -> None:
        return None

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Machine:
    """One GPU under a fake nvidia-smi, and workers on it that train as a test says."""

    def __init__(self, ledger: Ledger, study: optuna.Study, folder: Path) -> None:
        self.ledger, self.study, self.folder = ledger, study, folder
        self.told: list[str] = []
        self.started: list[int] = []
        self.attempts: dict[str, Attempt] = {}
        self.local = LocalWorkers(ledger, self.plan(), self.told.append)

    def plan(self) -> WorkerPlan:
        return WorkerPlan(("cuda:0",), 1, (), storage_url("sqlite:///gpus.db"), Path("logs"), shares_gpus=True)

    def shows(self, utilisation: object, used_gib: float, uuid: str = f"GPU-{UUID}") -> None:
        (self.folder / "answer").write_text(f"{uuid}, {utilisation}, {used_gib * 1024:.0f}, {80 * 1024}\n")

    def come(self, number: int | None) -> None:
        worker = register_worker(self.ledger, this_process(), number, this_process().key)
        take_device(self.ledger, worker, [DeviceOption("cuda:0", "NVIDIA Fake", UUID)])
        self._begin(worker)

    def _begin(self, worker: str) -> None:
        taken = lease_slot(self.ledger, worker)
        assert taken is not None
        name = next(row for row in list_workers(self.ledger) if row.id == worker).name
        attempt = begin_attempt(self.ledger, self.study, taken, {}, {WORKER: name})
        assert attempt is not None
        draw(attempt)
        self.attempts[worker] = attempt

    def train(self, trials: int, speed: float = 1000.0, peak: int = 0, fault: str | None = None) -> None:
        """Each worker ends so many trials, and is at another one then."""
        for _ in range(trials):
            for worker, attempt in list(self.attempts.items()):
                for name, value in {"images_per_second": speed, "seconds": 10.0, "peak_memory_bytes": peak}.items():
                    attempt.trial.set_user_attr(name, value)
                if fault is not None:
                    attempt.trial.set_user_attr(FAULT, fault)
                finish_attempt(self.ledger, attempt, TrialState.COMPLETE, 0.5)
                self._begin(worker)

    def tend(self, done: Callable[[], bool], remaining: int = 60) -> None:
        """Until something holds."""
        until = time.monotonic() + 20
        while not done():
            assert time.monotonic() < until, self.told
            self.local.maintain(list_workers(self.ledger), 0, remaining)
            time.sleep(0.005)

    def tend_until_told(self, count: int) -> None:
        self.tend(lambda: len(self.told) >= count)

    def sees_all_train(self) -> None:
        """Until it measures the workers that are there now."""
        ids = {row.id for row in list_workers(self.ledger)}

        def measured() -> bool:
            assert self.local._monitor is not None
            gpu = self.local._monitor._gpus.get(UUID)
            return gpu is not None and gpu.phase is not None and gpu.phase.workers == ids

        self.tend(measured)


@pytest.fixture
def machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with cores and memory for any number of workers, on which time passes fast."""
    script(home, f"echo x >> {home}/calls; cat {home}/answer")
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "EVERY_SECONDS", 0.0)
    for name, value in {"SPAN_SECONDS": 0.0, "SPACING_SECONDS": 0.0, "SAMPLES": 3}.items():
        monkeypatch.setattr(gpus, name, value)
    for module in (launch, resources):
        monkeypatch.setattr(module, "available_cores", lambda: 32)
    monkeypatch.setattr(launch, "available_memory", lambda: 64 * GIB)
    with opened_ledger(storage_url(f"sqlite:///{home / 'gpus.db'}")) as (ledger, study):
        request_budget(ledger, 60)
        machine = Machine(ledger, study, home)

        def spawn(plan: WorkerPlan, number: int) -> FakeChild:
            assert plan.devices[number] == "cuda:0"
            machine.started.append(number)
            return FakeChild()

        monkeypatch.setattr(launch, "spawn_worker", spawn)
        machine.shows(41, 9)
        machine.tend(lambda: machine.started == [0])
        yield machine
        machine.local._children.clear()
        machine.local.stop()


def test_an_idle_gpu_gets_a_second_worker_and_a_third_where_that_paid(machine: Machine) -> None:
    machine.come(0)
    machine.sees_all_train()
    machine.train(4)
    machine.tend(lambda: machine.started == [0, 1])
    assert machine.told == ["cuda:0: 41 % busy, 9 of 80 GiB used: a second worker starts"]
    assert machine.local.plan.threads == 16
    machine.shows(55, 17.5)
    machine.tend(lambda: machine.folder.joinpath("calls").read_text().count("x") > 30)
    assert machine.started == [0, 1]  # until the second one trains too, nothing is decided
    machine.come(1)
    machine.sees_all_train()
    machine.train(4, speed=800.0)
    machine.tend(lambda: machine.started == [0, 1, 2])
    assert machine.told[1:] == ["cuda:0: 55 % busy, 18 of 80 GiB used: a third worker starts"]


def test_a_second_worker_that_brought_nothing_is_the_last(machine: Machine) -> None:
    machine.come(0)
    machine.sees_all_train()
    machine.train(4)
    machine.tend_until_told(1)
    machine.come(1)
    machine.sees_all_train()
    machine.train(4, speed=540.0)
    machine.tend_until_told(2)
    why = "no further worker: with the second one it trains only 1.08 times as many images"
    assert machine.told[1] == f"cuda:0: 41 % busy, 9 of 80 GiB used: {why}"
    machine.train(4, speed=5000.0)  # chance does not open the question again
    machine.tend(lambda: machine.folder.joinpath("calls").read_text().count("x") > 40)
    assert (machine.started, len(machine.told)) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("utilisation", "used", "peak", "fault", "why"),
    [
        (97, 9.0, 0, None, "97 % busy, 9 of 80 GiB used: no further worker: it is busy enough"),
        (41, 60.0, 0, None, "no further worker: a worker takes up to 60 GiB, and 1.3 times that is not free"),
        (41, 9.0, 70 * GIB, None, "no further worker: a worker takes up to 70 GiB"),  # between two samples
        (41, 9.0, 0, "out of memory", "no further worker: a trial ran out of its memory"),
    ],
)
def test_a_gpu_without_room_keeps_one_worker_and_says_so_once(
    machine: Machine, utilisation: int, used: float, peak: int, fault: str | None, why: str
) -> None:
    machine.shows(utilisation, used)
    machine.come(0)
    machine.sees_all_train()
    machine.train(4, peak=peak, fault=fault)
    machine.tend_until_told(1)
    machine.tend(lambda: machine.folder.joinpath("calls").read_text().count("x") > 20)
    assert machine.started == [0]
    assert len(machine.told) == 1
    assert why in machine.told[0]


def test_without_nvidia_smi_there_is_one_worker_and_one_note(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.folder / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(machine.folder))
    machine.come(0)
    machine.tend_until_told(1)
    machine.train(4)
    for _ in range(20):
        machine.local.maintain(list_workers(machine.ledger), 0, 60)
    assert machine.started == [0]
    text = "nvidia-smi cannot be run (No such file or directory), so no further worker will share a GPU"
    assert machine.told == [f"{text}; --workers-per-gpu sets a number"]


@pytest.mark.parametrize(("utilisation", "uuid"), [("[N/A]", f"GPU-{UUID}"), (41, "GPU-another")])
def test_what_cannot_be_known_is_said_once(machine: Machine, utilisation: object, uuid: str) -> None:
    machine.shows(utilisation, 9, uuid)
    machine.come(0)
    machine.train(4)
    machine.tend_until_told(1)
    machine.tend(lambda: machine.folder.joinpath("calls").read_text().count("x") > 20)
    text = "nvidia-smi does not say how busy it is (as under MIG), so no further worker will share it"
    assert (machine.started, machine.told) == ([0], [f"cuda:0: {text}"])


def test_workers_that_an_earlier_run_added_are_counted(machine: Machine) -> None:
    machine.come(0)
    machine.come(1)
    machine.sees_all_train()
    machine.train(4)
    machine.tend(lambda: machine.started == [0, 2])
    assert machine.local.plan.devices == ("cuda:0",) * 3


def test_at_the_end_of_the_budget_nobody_is_added(machine: Machine) -> None:
    machine.come(0)
    machine.sees_all_train()
    machine.train(4)
    machine.tend(lambda: bool(machine.told), remaining=1)  # which is at work already
    assert "fewer configurations wait than workers are there" in machine.told[0]


# Who asks for it.


@pytest.mark.parametrize(
    ("device", "workers", "per_gpu", "devices", "shares"),
    [
        ("cuda", None, None, ("cuda:0",), True),
        ("cuda", None, 1, ("cuda:0",), False),
        ("cuda", None, 2, ("cuda:0",) * 2, False),
        ("cuda", 3, None, ("cuda:0",) * 3, False),
        ("cpu", None, None, None, False),
        ("cpu", 2, None, ("cpu",) * 2, False),
    ],
)
def test_only_gpus_are_shared_by_measurement_and_only_where_no_number_is_given(
    home: Path, device: str, workers: int | None, per_gpu: int | None, devices: tuple[str, ...] | None, shares: bool
) -> None:
    storage = storage_url("sqlite:///x.db")
    start_launcher = local_launcher(["cuda:0" if device == "cuda" else "cpu"], workers, per_gpu)
    with opened_ledger(storage) as (ledger, _):
        local = start_launcher(ledger, StudyLocation(storage, "x", Path("data"), Path("out")), print)
        assert isinstance(local, LocalWorkers)
        assert local.plan.shares_gpus is shares
        assert devices is None or local.plan.devices == devices
        assert (local._monitor is not None) is shares


@pytest.mark.parametrize(
    ("words", "number"), [((), None), (("--workers-per-gpu", "auto"), None), (("--workers-per-gpu", "2"), 2)]
)
def test_the_command_line_asks_for_it_by_default(
    search: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], number: int | None
) -> None:
    asked: list[RunOptions] = []

    def run(options: RunOptions, show: object) -> None:
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("search.run.run.run", run)
    search("run", *words)
    assert [options.workers_per_gpu for options in asked] == [number]
