"""The loop over trials, with trainings replaced where a fault must happen on cue."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import search.trial
from data.split import Split, load_split
from model.config import FitConfig
from model.fit import NonFiniteLossError
from model.result import EpochResult
from search import study as studies
from search.errors import RunError
from search.events import Event, TrialFinished
from search.ledger import CAUSE, budget
from search.storage import open_storage, storage_url
from search.study import DatasetRecord, StudyRecord
from search.study_file import PrunerConfig, StudyConfig, find_study
from search.worker import search as work


@pytest.fixture
def split(home: Path) -> Split:
    return load_split("digits", home, 0, torch.device("cpu"))


@pytest.fixture
def config(tiny: Path) -> StudyConfig:
    return find_study(str(tiny))[1]


def new_study(config: StudyConfig, name: str = "s") -> optuna.Study:
    record = StudyRecord(name, config, DatasetRecord("digits", "f", ("0", "1"), 9, 1, False))
    return studies.create(open_storage(storage_url("sqlite:///worker.db")), record, {})


def scripted(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """Replace the training by ``script(call)``, which gives the accuracies of its epochs or raises."""
    calls = iter(range(1000))

    def fit(network: object, split: object, config: FitConfig) -> Iterator[EpochResult]:
        call = next(calls)
        for epoch, accuracy in enumerate(script(call), start=1):
            yield EpochResult(epoch, 1.0, 0.5, 1.0, accuracy, 100.0, 0.1, 0.1)

    monkeypatch.setattr(search.trial, "fit", fit)


def outcomes(events: list[Event]) -> list[str]:
    return [event.outcome for event in events if isinstance(event, TrialFinished)]


def test_a_trial_stores_what_a_reader_needs(config: StudyConfig, split: Split) -> None:
    study = new_study(config)
    assert work(study, config, split, lambda _: None, timeout=None).finished
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    for trial in study.trials:
        attributes = trial.user_attrs
        assert attributes["parameters"] > 0
        assert attributes["flops"] > 0
        assert attributes["seconds"] > 0
        assert attributes["images_per_second"] > 0
        assert attributes["peak_memory_bytes"] > 2**20
        assert attributes["config"]["fit"]["epochs"] == 2
        assert attributes["config"]["network"]["widths"][0] == trial.params["width"]
        assert list(trial.intermediate_values) == [1, 2]
        assert trial.value == trial.intermediate_values[2]
    assert study.trials[0].params["blocks"] == 2
    assert study.trials[0].params["lr"] == 0.1


def test_known_good_configurations_come_first_and_once(config: StudyConfig, split: Split) -> None:
    study = new_study(config)
    again = new_study(config)
    assert [trial.system_attrs["fixed_params"] for trial in again.trials] == [{"blocks": 2, "lr": 0.1}]
    work(study, config, split, lambda _: None, timeout=None)
    studies.update(study, config)
    assert budget(study, 4).waiting == 0


def test_two_studies_with_one_seed_are_the_same_study(config: StudyConfig, split: Split) -> None:
    first, second = new_study(config, "a"), new_study(config, "b")
    for study in (first, second):
        work(study, config, split, lambda _: None, timeout=None)
    assert [t.params for t in first.trials] == [t.params for t in second.trials]
    assert [t.intermediate_values for t in first.trials] == [t.intermediate_values for t in second.trials]
    other = config.model_copy(update={"seed": 1})
    third = new_study(other, "c")
    work(third, other, split, lambda _: None, timeout=None)
    assert [t.params for t in first.trials] != [t.params for t in third.trials]


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(config: StudyConfig, split: Split) -> None:
    whole, parted = new_study(config, "whole"), new_study(config, "parted")
    work(whole, config, split, lambda _: None, timeout=None)
    for trials in (1, 3, 4):
        work(parted, config.model_copy(update={"trials": trials}), split, lambda _: None, timeout=None)
    assert [t.params for t in whole.trials] == [t.params for t in parted.trials]
    assert [t.value for t in whole.trials] == [t.value for t in parted.trials]


def test_a_bad_trial_is_pruned(config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = PrunerConfig(kind="median", startup_trials=2, warmup_epochs=0)
    config = config.model_copy(update={"pruner": pruner})
    scripted(monkeypatch, lambda call: [0.1, 0.2] if call == 3 else [0.5, 0.6])
    study, events = new_study(config), []
    work(study, config, split, events.append, timeout=None)
    assert outcomes(events) == ["complete"] * 3 + ["pruned"]
    assert study.trials[3].state == TrialState.PRUNED
    assert study.trials[3].intermediate_values == {1: 0.1}


def test_without_a_pruner_every_trial_runs_to_its_end(
    config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"pruner": PrunerConfig(kind="none", startup_trials=0, warmup_epochs=0)})
    scripted(monkeypatch, lambda call: [0.5 / (call + 1)] * 2)
    events: list[Event] = []
    work(new_study(config), config, split, events.append, timeout=None)
    assert outcomes(events) == ["complete"] * 4


def test_divergence_is_a_result_with_its_cause(
    config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call == 1:
            raise NonFiniteLossError("loss is nan in epoch 1")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study = new_study(config)
    assert work(study, config, split, lambda _: None, timeout=None).finished
    count = budget(study, 4)
    assert (count.complete, count.pruned, count.failed_attempts) == (3, 1, 0)
    assert study.trials[1].user_attrs[CAUSE].startswith("non-finite loss")


def allocator_error() -> Exception:
    """What torch really raises where the host's memory does not suffice."""
    try:
        torch.empty(1 << 58)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte of memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), allocator_error()])
def test_out_of_memory_is_a_failed_attempt_never_a_score(
    config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def script(call: int) -> list[float]:
        if call == 0:
            raise error
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study = new_study(config)
    assert work(study, config, split, lambda _: None, timeout=None).finished
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].value is None
    assert study.trials[0].user_attrs[CAUSE].startswith("out of memory")
    assert (budget(study, 4).done, budget(study, 4).failed_attempts) == (4, 1)


def test_a_bug_stops_the_run_after_three_in_a_row_with_the_traceback_kept(
    config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: int) -> list[float]:
        if call >= 2:
            raise ZeroDivisionError("a bug")
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study = new_study(config)
    with pytest.raises(RunError, match="3 trials in a row failed, the last one with: ZeroDivisionError: a bug"):
        work(study, config, split, lambda _: None, timeout=None)
    assert budget(study, 4).failed_attempts == 3
    assert "in script" in study.trials[-1].user_attrs["traceback"]


def test_the_time_limit_hands_the_trial_back_between_epochs(
    config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda _: [0.5, 0.5])
    clock = iter([0.0, 1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr("search.worker.time.monotonic", lambda: next(clock))
    study, events = new_study(config), []
    end = work(study, config, split, events.append, timeout=10)
    assert not end.finished
    assert outcomes(events) == ["complete", "handed back"]
    assert study.trials[1].user_attrs[CAUSE] == "time is up"
    assert budget(study, 4).waiting == 1
    monkeypatch.undo()
    assert work(study, config, split, events.append, timeout=None).finished
    assert study.trials[2].params == study.trials[1].params
    assert budget(study, 4).done == 4


def test_ctrl_c_hands_the_trial_back(config: StudyConfig, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(call: int) -> list[float]:
        if call == 1:
            raise KeyboardInterrupt
        return [0.5, 0.5]

    scripted(monkeypatch, script)
    study = new_study(config)
    with pytest.raises(KeyboardInterrupt):
        work(study, config, split, lambda _: None, timeout=None)
    assert budget(study, 4).waiting == 1
    assert budget(study, 4).running == 0
    assert study.trials[1].user_attrs[CAUSE] == "interrupted"
