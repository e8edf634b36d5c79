"""Known good configurations of earlier studies, tried first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from search.analysis.starts import StartValue, start_value
from search.config.space import check_start, fitting, parse_space
from search.config.study_file import StudyConfig, find_study
from search.console.format import known_good_text
from search.run.warm_start import joined
from support.command import Command, Ended
from support.trials import trial

COMPLETE, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING


def summary(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"studies/{name}/summary.json").read_text())
    return found


@pytest.mark.slow
def test_the_best_of_an_earlier_study_come_first(search: Command, tiny: Path) -> None:
    first = search("run", "--study", str(tiny), "--name", "earlier", "--dataset", "digits")
    assert first.status == 0, first.err
    offered = search("run", "--study", str(tiny), "--name", "other", "--dataset", "digits", "--no-finale")
    assert "these images were searched before: --warm-start earlier tries its best" in offered.out.replace("\n", " ")
    later = search(
        "run", "--study", str(tiny), "--name", "later", "--dataset", "digits", "--warm-start", "earlier", "--seed", "9",
        "--no-finale",
    )  # fmt: skip
    assert later.status == 0, later.err
    assert "these images were searched before" not in later.out
    confirmed = summary("earlier")["confirm"]["configurations"]
    told = summary("later")["known_good"]
    # The file's own start, two that were confirmed, and one more by its score.
    assert told["tried"] == 4
    assert summary("later")["budget"]["requested"] == 4
    status = json.loads(search("status", "--name", "later", "--format", "json").out)
    assert status["known_good"] == told
    assert confirmed[0]["params"] in params_of("later")
    # Asked for again, nothing is added twice.
    again = search("run", "--name", "later", "--warm-start", "earlier", "--trials", "6", "--no-finale")
    assert again.status == 0, again.err
    assert summary("later")["known_good"]["tried"] == 4
    assert summary("later")["known_good"]["drawn"] == 0


def params_of(name: str) -> list[dict[str, Any]]:
    study = optuna.load_study(study_name=name, storage="sqlite:///studies/search.db")
    return [trial.params for trial in study.trials]


def test_what_cannot_be_a_warm_start_is_refused_with_a_line(search: Command, tiny: Path) -> None:
    def run(name: str, *words: str) -> Ended:
        return search("run", "--study", str(tiny), "--no-finale", "--trials", "2", "--name", name, *words)

    assert run("a", "--dataset", "digits").status == 0
    assert run("c", "--dataset", "digits", "--warm-start", "nothing").complaint == (
        "no study 'nothing': this storage has a"
    )
    own = run("c", "--dataset", "digits", "--warm-start", "c")
    assert own.complaint == "study 'c' cannot be its own warm start; name an earlier one"
    narrow = tiny.read_text().replace("lr = { low = 0.01, high = 0.2", "lr = { low = 0.3, high = 0.9")
    tiny.write_text(narrow.replace("lr = 0.1", "lr = 0.5"))
    elsewhere = run("n", "--dataset", "digits", "--warm-start", "a")
    assert elsewhere.complaint == "nothing that study 'a' ran to its end fits the space of 'n'"
    there = optuna.load_study(study_name="a", storage="sqlite:///studies/search.db")
    there.set_user_attr("dataset", {**there.user_attrs["dataset"], "name": "cifar10", "fingerprint": "f" * 64})
    other = run("n", "--dataset", "digits", "--warm-start", "a")
    assert other.complaint == (
        "study 'a' searched other images (cifar10, fingerprint ffffffffffff), so it is no warm start for 'n'"
    )
    assert search("status", "--name", "n").status == 2  # nothing was created


def test_known_good_configurations_keep_their_places() -> None:
    before = ({"lr": 0.1}, {"lr": 0.2})
    assert joined(before, [{"lr": 0.2}, {"lr": 0.3}, {"lr": 0.3}]) == (*before, {"lr": 0.3})
    assert joined((), []) == ()


SPACE = {"lr": {"low": 0.1, "high": 0.4, "step": 0.1}, "blocks": {"low": 3, "high": 5}, "convs": 2}


@given(
    st.dictionaries(
        st.sampled_from(["lr", "blocks", "convs", "width"]), st.sampled_from([0.1, 0.2, 0.25, 2, 3, 5, 6, "relu"])
    )
)
def test_whatever_fits_is_something_that_the_space_could_draw(values: dict[str, Any]) -> None:
    space = parse_space(SPACE)
    found = fitting(space, values)
    check_start(space, found)
    assert found.items() <= values.items()


def test_a_value_that_could_not_be_drawn_leaves_nothing_of_a_configuration() -> None:
    space = parse_space(SPACE)
    assert fitting(space, {"lr": 0.2, "blocks": 4, "width": 8, "convs": 3}) == {"lr": 0.2, "blocks": 4}
    assert fitting(space, {"lr": 0.25, "blocks": 4}) == {}
    assert fitting(space, {"lr": 0.2, "blocks": 6}) == {}


def config(**changes: Any) -> StudyConfig:
    return find_study("cpu")[1].model_copy(update=changes)


def test_a_start_is_measured_against_what_was_drawn_before_the_sampler_knew_anything() -> None:
    pruned, late = trial(3, 0.9, state=PRUNED), trial(20, 0.8)
    trials = [trial(0, 0.7, start=0), trial(1, 0.6, start=1), trial(2, 0.65), pruned, late]
    found = start_value(config(), trials)
    assert found == StartValue(
        tried=2, trial=0, best=0.7, rank=2, complete=4, drawn=1, drawn_best=0.65, helped=True,
    )  # fmt: skip
    assert known_good_text(found) == (
        "tried first: the best has 70.00 %, rank 2 of 4 now; it helped: the best of 1 drawn without has 65.00 %"
    )
    repeat = config().repeat_slots[-1]  # of the known one: not drawn without it
    assert start_value(config(), [*trials[:-1], trial(repeat, 0.71)]) == replace(found, rank=2)
    worse = start_value(config(), [*trials, trial(4, 0.75)])
    assert worse is not None
    assert worse.helped is False
    assert "it did not help: the best of 2 drawn without has 75.00 %" in known_good_text(worse)


def test_without_known_or_drawn_configurations_nothing_is_said_of_help() -> None:
    assert start_value(config(), [trial(0, 0.7)]) is None
    assert start_value(config(), [trial(0, 0.7, start=0, state=RUNNING)]) is None
    alone = start_value(config(), [trial(0, 0.7, start=0), trial(30, 0.9)])
    assert alone is not None
    assert (alone.helped, alone.drawn_best) == (None, None)
    assert known_good_text(alone) == "tried first: the best has 70.00 %, rank 2 of 2 now"
