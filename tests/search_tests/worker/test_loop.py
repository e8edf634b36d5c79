"""One worker's loop over slots, with trainings replaced where a fault must happen on cue."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import search.worker.trial
from data.errors import RunError, UserError
from data.split import Split, load_split
from model import checkpoint
from model.checkpoint import CheckpointWriter
from model.config import FitConfig
from model.fit import FitState, NonFiniteLossError
from model.result import EpochResult
from search import study as studies
from search.analysis.noise import seed_noise
from search.attributes import CAUSE, FAULT, SLOT
from search.config.study_file import PrunerConfig, StudyConfig, find_study
from search.events import Event, Note, TrialFinished
from search.ledger.budget import count_budget, request_budget
from search.ledger.leases import Ledger, open_ledger
from search.ledger.registry import list_workers
from search.storage.connect import open_storage
from search.storage.rdb import RetryingStorage
from search.storage.url import storage_url
from search.study import DatasetRecord, StudyRecord
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StoppedError, StopRequest

STORAGE = "sqlite:///worker.db"


@pytest.fixture
def split(home: Path) -> Split:
    return load_split("digits", home, 0, torch.device("cpu"))


@pytest.fixture
def config(tiny: Path) -> StudyConfig:
    return find_study(str(tiny))[1]


@pytest.fixture
def storage(home: Path) -> Iterator[RetryingStorage]:
    storage = open_storage(storage_url(STORAGE))
    yield storage
    storage.engine.dispose()


@pytest.fixture
def new_study(storage: RetryingStorage, split: Split) -> Callable[..., tuple[optuna.Study, Ledger]]:
    """Creates a study on digits with its budget."""

    def create(config: StudyConfig, name: str = "s") -> tuple[optuna.Study, Ledger]:
        record = StudyRecord(name, config, DatasetRecord("digits", split.fingerprint, split.classes, 9, 1, False))
        studies.create(storage, record, {})
        ledger, study = open_ledger(storage, name, config.workers)
        request_budget(ledger, config.trials, len(config.start))
        return study, ledger

    return create


def work_in_process(
    name: str = "s",
    max_trials: int | None = None,
    stop: StopRequest | None = None,
    show: Callable[[Event], None] | None = None,
) -> int:
    options = WorkerOptions(storage_url(STORAGE), name, "cpu", Path("none"), Path("out"), max_trials=max_trials)
    return run_worker(options, show or (lambda _: None), stop or StopRequest())


def scripted(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """Replace the training by ``script(call)``, which gives the accuracies of its epochs or raises."""
    calls = iter(range(1000))

    def fit(network: object, split: object, config: FitConfig, *, state: FitState) -> Iterator[EpochResult]:
        call = next(calls)
        for epoch, accuracy in enumerate(script(call), start=1):
            if epoch <= state.epoch:
                continue
            state.epoch = epoch
            yield EpochResult(epoch, 1.0, 0.5, 1.0, accuracy, 100.0, 0.1, 0.1)

    monkeypatch.setattr(search.worker.trial, "fit", fit)


def outcomes(events: list[Event]) -> list[str]:
    return [event.outcome for event in events if isinstance(event, TrialFinished)]


NewStudy = Callable[..., tuple[optuna.Study, Ledger]]


def test_a_trial_stores_what_a_reader_needs(config: StudyConfig, new_study: NewStudy) -> None:
    study, _ = new_study(config)
    assert work_in_process() == 4
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    for number, trial in enumerate(study.trials):
        attributes = trial.user_attrs
        assert attributes[SLOT] == number
        assert attributes["worker"].rpartition(":")[0]
        assert attributes["parameters"] > 0
        assert attributes["flops"] > 0
        assert attributes["seconds"] > 0
        assert attributes["images_per_second"] > 0
        assert attributes["peak_memory_bytes"] > 2**20
        assert attributes["config"]["fit"]["epochs"] == 2
        assert attributes["config"]["network"]["widths"][0] == trial.params["width"]
        assert [epoch["validation_accuracy"] for epoch in attributes["curve"]] == list(
            trial.intermediate_values.values()
        )
        assert list(trial.intermediate_values) == [1, 2]
        assert trial.value == trial.intermediate_values[2]
    assert study.trials[0].params["blocks"] == 2
    assert study.trials[0].params["lr"] == 0.1
    assert not list(Path("out/checkpoints").iterdir())


def test_known_good_configurations_come_first_and_once(config: StudyConfig, new_study: NewStudy) -> None:
    new_study(config)
    study, ledger = new_study(config)
    request_budget(ledger, config.trials, len(config.start))
    work_in_process()
    assert [trial.user_attrs.get("start") for trial in study.trials] == [0, None, None, None]
    assert study.trials[0].system_attrs["fixed_params"] == {"blocks": 2, "lr": 0.1}
    studies.update(study, config.model_copy(update={"trials": 6, "start": (*config.start, {"blocks": 1})}))
    request_budget(ledger, 6, 2)
    work_in_process()
    assert [trial.user_attrs.get("start") for trial in study.trials[4:]] == [1, None]
    assert study.trials[4].params["blocks"] == 1


def test_early_on_a_configuration_is_trained_again_from_other_seeds_and_never_stopped(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda call: (0.9 - 0.01 * call, 0.9 - 0.01 * call))  # each worse than all before
    pruner = PrunerConfig(kind="median", startup_trials=1, warmup_epochs=0, audit=0)
    study, _ = new_study(config.model_copy(update={"trials": 40, "pruner": pruner}))
    work_in_process(max_trials=7)
    first, *others = study.trials
    assert [trial.params == first.params for trial in others] == [True, True, False, False, False, False]
    assert [trial.state.name for trial in others] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED", "PRUNED", "PRUNED"]
    assert len({trial.user_attrs["config"]["fit"]["seed"] for trial in study.trials}) == 7
    noise = seed_noise(study.trials)
    assert noise is not None
    assert noise.freedom == 2


def test_two_studies_with_one_seed_are_the_same_study(config: StudyConfig, new_study: NewStudy) -> None:
    (first, _), (second, _) = new_study(config, "a"), new_study(config, "b")
    for name in ("a", "b"):
        work_in_process(name)
    assert [t.params for t in first.trials] == [t.params for t in second.trials]
    assert [t.intermediate_values for t in first.trials] == [t.intermediate_values for t in second.trials]
    third, _ = new_study(config.model_copy(update={"seed": 1}), "c")
    work_in_process("c")
    assert [t.params for t in first.trials] != [t.params for t in third.trials]


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(config: StudyConfig, new_study: NewStudy) -> None:
    (whole, _), (parted, _) = new_study(config, "whole"), new_study(config, "parted")
    work_in_process("whole")
    for trials in (1, 2, None):
        work_in_process("parted", max_trials=trials)
    assert [t.params for t in whole.trials] == [t.params for t in parted.trials]
    assert [t.value for t in whole.trials] == [t.value for t in parted.trials]


def test_a_bad_trial_is_pruned(config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = PrunerConfig(kind="median", startup_trials=2, warmup_epochs=0)
    scripted(monkeypatch, lambda call: [0.1, 0.2] if call == 3 else [0.5, 0.6])
    study, _ = new_study(config.model_copy(update={"pruner": pruner}))
    events: list[Event] = []
    work_in_process(show=events.append)
    assert outcomes(events) == ["complete"] * 3 + ["pruned"]
    assert study.trials[3].state == TrialState.PRUNED
    assert study.trials[3].intermediate_values == {1: 0.1}


def test_without_a_pruner_every_trial_runs_to_its_end(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda call: [0.5 / (call + 1)] * 2)
    new_study(config.model_copy(update={"pruner": PrunerConfig(kind="none", startup_trials=0, warmup_epochs=0)}))
    events: list[Event] = []
    work_in_process(show=events.append)
    assert outcomes(events) == ["complete"] * 4


def test_divergence_is_a_result_with_its_cause(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call == 1:
            raise NonFiniteLossError("loss is nan in epoch 1")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study, ledger = new_study(config)
    assert work_in_process() == 4
    count = count_budget(ledger)
    assert (count.complete, count.pruned, count.infeasible, count.failed_attempts) == (3, 1, 0, 0)
    assert study.trials[1].user_attrs[CAUSE].startswith("non-finite loss")
    assert study.trials[1].user_attrs[FAULT] == "non-finite loss"


def allocator_error() -> Exception:
    """What torch really raises where the host's memory does not suffice."""
    try:
        torch.empty(1 << 58)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte of memory")


MEMORY_ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory"), allocator_error()]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_what_does_not_fit_is_tried_once_more_with_its_parameters(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def script(call: int) -> list[float]:
        if call == 1:
            raise error
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study, ledger = new_study(config)
    assert work_in_process() == 4
    failed, again = study.trials[1:3]
    assert failed.state == TrialState.FAIL
    assert failed.value is None
    assert failed.user_attrs[FAULT] == "out of memory"
    assert again.state == TrialState.COMPLETE
    assert (again.params, again.user_attrs[SLOT]) == (failed.params, failed.user_attrs[SLOT])
    count = count_budget(ledger)
    assert (count.done, count.failed_attempts, count.infeasible) == (4, 1, 0)


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_what_does_not_fit_alone_either_is_infeasible_and_never_a_score(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def script(call: int) -> Iterator[float]:
        if call in (1, 2):
            yield from (0.9,)
            raise error
        yield from (0.5, 0.5)

    scripted(monkeypatch, script)
    study, ledger = new_study(config)
    assert work_in_process() == 4
    infeasible = study.trials[2]
    assert infeasible.state == TrialState.PRUNED
    assert infeasible.value is None
    assert infeasible.user_attrs[FAULT] == "infeasible"
    assert infeasible.constraints == {"fits into memory": 1.0}
    count = count_budget(ledger)
    assert (count.complete, count.pruned, count.infeasible, count.failed_attempts) == (3, 1, 1, 1)
    best = studies.best_trial(study)
    assert best is not None
    assert best.value == 0.5


def test_a_broken_configuration_gives_way_to_another_one(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call in (1, 2):
            raise ZeroDivisionError("this network cannot be built")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study, ledger = new_study(config)
    assert work_in_process() == 4
    first, second, other = study.trials[1:4]
    assert [trial.user_attrs[SLOT] for trial in (first, second, other)] == [1, 1, 1]
    assert first.params == second.params != other.params
    assert first.user_attrs[FAULT] == "error"
    assert (count_budget(ledger).complete, count_budget(ledger).failed_attempts) == (4, 2)


def test_a_bug_stops_the_worker_after_five_in_a_row_with_the_traceback_kept(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call >= 1:
            raise ZeroDivisionError("a bug")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study, ledger = new_study(config)
    with pytest.raises(RunError, match="5 attempts in a row failed, the last one with: ZeroDivisionError: a bug"):
        work_in_process()
    count = count_budget(ledger)
    assert (count.done, count.failed_attempts, count.running, count.waiting) == (1, 5, 0, 3)
    assert "in script" in study.trials[-1].user_attrs["traceback"]
    with pytest.raises(RunError, match="attempts in a row failed"):
        work_in_process()
    assert count_budget(ledger).failed_attempts == 6


def test_a_broken_gpu_ends_its_worker_and_no_other(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    _, ledger = new_study(config)
    with pytest.raises(RunError, match="GPU cannot be used by this process any more"):
        work_in_process()
    assert work_in_process() == 3
    assert count_budget(ledger).done == 4


def test_a_worker_asked_to_go_hands_its_trial_back(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()

    def script(call: int) -> list[float]:
        if call == 1:
            stop.request("preempted: somebody said so")
        return [0.5, 0.5]

    study, ledger = new_study(config)
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        scripted(patched, script)
        work_in_process(stop=stop)
    count = count_budget(ledger)
    assert (count.done, count.waiting, count.running, count.failed_attempts) == (1, 3, 0, 1)
    assert study.trials[1].user_attrs[CAUSE] == "preempted: somebody said so"
    assert study.trials[1].user_attrs[FAULT] == "preempted"
    assert [row.state for row in list_workers(ledger)] == ["left"]
    assert work_in_process() == 3
    assert study.trials[2].params == study.trials[1].params


@pytest.mark.parametrize("disk", ["fast", "slow"])
def test_a_trial_goes_on_after_its_last_attempts_last_epoch(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """Also if a checkpoint is still being written when the worker is asked to stop; none is left behind."""
    if disk == "slow":
        write = checkpoint._write
        monkeypatch.setattr(checkpoint, "_write", lambda *given: (time.sleep(0.3), write(*given)))
    (whole, _), (parted, ledger) = new_study(config, "whole"), new_study(config, "parted")
    work_in_process("whole")
    stop, notes = StopRequest(), []

    def show(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    real = CheckpointWriter.save

    def save_and_stop(self: CheckpointWriter, network: Any, state: FitState, about: Any) -> None:
        real(self, network, state, about)
        if state.epoch == 1:
            stop.request("preempted")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "save", save_and_stop)
        with pytest.raises(StoppedError):
            work_in_process("parted", stop=stop)
    work_in_process("parted", show=show)
    assert "trial 1 goes on after epoch 1, from its last attempt's checkpoint" in notes
    first, second = parted.trials[:2]
    assert list(first.intermediate_values) == [1]
    assert list(second.intermediate_values) == [1, 2]
    assert [trial.intermediate_values for trial in parted.trials[1:]] == [t.intermediate_values for t in whole.trials]
    assert [trial.params for trial in parted.trials[1:]] == [trial.params for trial in whole.trials]
    assert count_budget(ledger).done == 4
    assert not list(Path("out/checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["absent", "truncated", "of other images"])
def test_without_its_checkpoint_a_trial_starts_afresh(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (whole, _), (parted, _) = new_study(config, "whole"), new_study(config, "parted")
    work_in_process("whole")
    stop = StopRequest()
    real = CheckpointWriter.save

    def save_and_stop(self: CheckpointWriter, network: Any, state: FitState, about: Any) -> None:
        if damage == "of other images":
            about = {**about, "identity": {**about["identity"], "images": "others"}}
        real(self, network, state, about)
        stop.request("preempted")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "save", save_and_stop)
        with pytest.raises(StoppedError):
            work_in_process("parted", stop=stop)
    (checkpoint,) = Path("out/checkpoints").iterdir()
    if damage == "absent":
        checkpoint.unlink()
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    work_in_process("parted")
    assert [t.intermediate_values for t in parted.trials[1:]] == [t.intermediate_values for t in whole.trials]


def test_a_checkpoint_that_cannot_be_written_is_a_warning(config: StudyConfig, new_study: NewStudy) -> None:
    Path("out").write_text("a file where the folder should be")
    _, ledger = new_study(config)
    notes: list[Event] = []
    assert work_in_process(show=lambda event: notes.append(event)) == 4
    assert any(isinstance(note, Note) and "no checkpoint" in note.text for note in notes)
    assert count_budget(ledger).done == 4


def test_a_worker_whose_lease_went_to_another_writes_nothing_more(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a minute in which the machine was asleep."""
    study, ledger = new_study(config.model_copy(update={"trials": 1, "start": ()}))
    first_has_begun, second_is_done = threading.Event(), threading.Event()

    def script(call: int) -> Iterator[float]:
        yield 0.5
        if call == 0:
            first_has_begun.set()
            assert second_is_done.wait(60)
        yield 0.7 if call == 0 else 0.6

    scripted(monkeypatch, script)
    monkeypatch.setattr("search.artifacts.resume.read_about", lambda _: None)
    notes: list[Event] = []
    done: list[int] = []
    sleeper = threading.Thread(target=lambda: done.append(work_in_process(show=notes.append)))
    sleeper.start()
    assert first_has_begun.wait(60)
    from search.ledger.heartbeat import mark_dead

    (row,) = list_workers(ledger)
    mark_dead(ledger, row.id, "taken for dead")
    assert work_in_process() == 1
    second_is_done.set()
    sleeper.join(60)
    assert done == [0]
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].intermediate_values == {1: 0.5}
    assert study.trials[1].value == 0.6
    assert "taken for dead" in study.trials[0].user_attrs[CAUSE]
    assert count_budget(ledger).done == 1
    assert any(isinstance(note, Note) and "went to another worker" in note.text for note in notes)


def test_a_worker_alone_on_its_device_waits_for_the_others(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not fit beside a neighbour is tried again only when the neighbour is done, and then nobody else is."""
    monkeypatch.setattr("search.worker.loop.POLL_SECONDS", 0.05)
    monkeypatch.setattr("search.worker.slot.DEVICE_POLL_SECONDS", 0.0125)
    _, ledger = new_study(config.model_copy(update={"trials": 6, "start": ()}))
    busy, beside, lock = 0, [], threading.Lock()
    failed: list[int] = []

    def fit(network: object, split: object, config: FitConfig, *, state: FitState) -> Iterator[EpochResult]:
        nonlocal busy
        with lock:
            busy += 1
            fails = busy == 2 and not failed
            failed.extend([config.seed] * fails)
        try:
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            for epoch in (1, 2):
                time.sleep(0.2)
                if config.seed in failed:
                    beside.append(busy)
                state.epoch = epoch
                yield EpochResult(epoch, 1.0, 0.5, 1.0, 0.5, 100.0, 0.1, 0.1)
        finally:
            with lock:
                busy -= 1

    monkeypatch.setattr(search.worker.trial, "fit", fit)
    done: list[int] = []
    pair = [threading.Thread(target=lambda: done.append(work_in_process())) for _ in range(2)]
    for worker in pair:
        worker.start()
    for worker in pair:
        worker.join(60)
    assert sum(done) == 6
    assert beside == [1, 1]
    assert (count_budget(ledger).complete, count_budget(ledger).failed_attempts) == (6, 1)


@pytest.mark.parametrize("deaths", [("memory_kills", 2), ("deaths", 10)])
def test_what_kills_its_worker_again_and_again_is_infeasible(
    config: StudyConfig, new_study: NewStudy, deaths: tuple[str, int]
) -> None:
    from search.storage.tables import SLOTS

    study, ledger = new_study(config)
    with ledger.engine.begin() as connection:
        connection.execute(SLOTS.update().where(SLOTS.c.slot == 2).values({deaths[0]: deaths[1]}))
    assert work_in_process() == 4
    assert study.trials[2].user_attrs[FAULT] == "infeasible"
    assert count_budget(ledger).infeasible == 1


def test_a_worker_on_other_images_is_refused_and_takes_nothing(config: StudyConfig, new_study: NewStudy) -> None:
    study, ledger = new_study(config)
    dataset = study.user_attrs["dataset"]
    study.set_user_attr("dataset", {**dataset, "fingerprint": "0" * 64})
    with pytest.raises(UserError, match="was begun on other images"):
        work_in_process()
    assert count_budget(ledger).waiting == 4
    (row,) = list_workers(ledger)
    assert row.exit_reason is not None
    assert "other images" in row.exit_reason


def test_a_worker_without_the_images_is_refused_and_takes_nothing(
    config: StudyConfig, new_study: NewStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.errors import DataError

    study, ledger = new_study(config)
    study.set_user_attr("dataset", {**study.user_attrs["dataset"], "name": "cifar10"})
    monkeypatch.setattr("data.cifar10.can_fetch", lambda _: False)
    with pytest.raises(DataError, match="no CIFAR-10 in none"):
        work_in_process()
    assert count_budget(ledger).waiting == 4


def test_code_that_reads_the_space_differently_is_refused(config: StudyConfig, new_study: NewStudy) -> None:
    study, _ = new_study(config)
    definition = study.user_attrs["definition"]
    study.set_user_attr("space_hash", "another")
    with pytest.raises(UserError, match="made by another version of this project"):
        work_in_process()
    study.set_user_attr("definition", {**definition, "novelty": 1})
    with pytest.raises(UserError, match="made by another version of this project"):
        work_in_process()


def test_other_versions_are_a_warning(config: StudyConfig, new_study: NewStudy) -> None:
    study, _ = new_study(config)
    study.set_user_attr("environment", {"torch": "1.0", "commit": "unknown"})
    notes: list[Event] = []
    work_in_process(show=notes.append)
    assert any(isinstance(note, Note) and "the study began with torch 1.0" in note.text for note in notes)


def test_a_worker_for_a_study_that_is_not_there(storage: RetryingStorage) -> None:
    with pytest.raises(UserError, match="no study 's': this storage has no study yet"):
        work_in_process()
