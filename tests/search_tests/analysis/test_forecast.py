import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from search.analysis.forecast import Forecast, expected_gain, forecast, time_left
from search.console.format import device_time_text, forecast_texts
from search.events import Budget
from support.command import Command
from support.trials import trial

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def count(done: int, requested: int) -> Budget:
    return Budget(requested, done, 0, 0, 0, 0, requested - done)


def test_a_gain_is_told_from_fifteen_ends_on() -> None:
    assert expected_gain([0.5] * 14, 0.5, 0.0) is None
    told = expected_gain([0.5] * 15, 0.5, 0.0)
    assert told is not None
    assert (told.mean, told.low, told.high, told.unlikely) == (0, 0, 0, True)


def test_where_the_best_is_far_above_what_is_proposed_now_more_is_unlikely_to_help() -> None:
    ends = np.random.default_rng(0).normal(0.60, 0.01, 30).tolist()
    hopeless = expected_gain(ends, 0.80, 0.005)
    assert hopeless is not None
    assert hopeless.unlikely
    assert hopeless.high < 0.001
    open_ = expected_gain(ends, 0.61, 0.005)
    assert open_ is not None
    assert not open_.unlikely
    assert 0.002 < open_.mean < 0.03
    assert open_.low < open_.mean < open_.high


def test_where_all_that_differs_is_noise_nothing_can_be_gained() -> None:
    ends = np.random.default_rng(0).normal(0.70, 0.004, 40).tolist()
    told = expected_gain(ends, max(ends), 0.01)
    assert told is not None
    assert (told.mean, told.high, told.unlikely) == (0, 0, True)


@pytest.mark.parametrize("trials", [20, 40])
def test_the_interval_covers_as_often_as_it_says(trials: int) -> None:
    covered, means, gains = [], [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        # As in a search: many bad configurations, and many near the best that there is.
        truth = 0.8 - 0.3 * rng.random(trials + 50) ** 2
        scores = truth + rng.normal(0, 0.005, trials + 50)
        told = expected_gain(scores[:trials].tolist(), float(scores[:trials].max()), 0.005)
        assert told is not None
        gain = truth[scores.argmax()] - truth[scores[:trials].argmax()]
        covered.append(told.low <= gain <= told.high)
        means.append(told.mean)
        gains.append(gain)
    assert np.mean(covered) > 0.88
    assert np.mean(means) == pytest.approx(np.mean(gains), abs=0.004)


def test_time_left_is_that_of_the_latest_trials_shared_by_the_workers() -> None:
    trials = [trial(n, seconds=1000) for n in range(5)] + [trial(n, seconds=10) for n in range(5, 25)]
    assert time_left(trials, count(25, 35), workers=2) == 50
    assert time_left(trials, count(25, 26), workers=8) == 10
    assert time_left(trials, count(25, 35), workers=0) is None
    assert time_left(trials, count(25, 25), workers=2) is None
    assert time_left([], count(0, 10), workers=2) is None


def test_a_forecast_in_words() -> None:
    trials = [trial(n, 0.6 + 0.001 * (7 * n % 20)) for n in range(20)]
    trials += [trial(20, 0.61, lr=0.01), trial(21, 0.3, state=PRUNED, seconds=3), trial(22, state=FAIL, seconds=1)]
    told = forecast(trials, count(22, 40), workers=1, single=True)
    assert told.device_seconds == {"complete": 210.0, "pruned": 3.0, "failed attempt": 1.0}
    assert device_time_text(told) == "3 min 34 s (complete 3 min 30 s, pruned 3 s, failed attempt 1 s)"
    first, second, third = forecast_texts(told)
    assert first.startswith("the search is done in about 2 min")
    assert second.startswith("50 more trials: +")
    assert third == "another seed moves a score by 0.71 points (standard deviation)"
    json.dumps(asdict(told))


def test_a_search_with_two_objectives_has_no_single_best_to_gain() -> None:
    trials = [trial(n) for n in range(20)]
    assert forecast(trials, count(20, 40), workers=1, single=False).gain is None


def test_nothing_is_foretold_of_an_empty_study() -> None:
    told = forecast([], count(0, 40), workers=0, single=True)
    assert told == Forecast(device_seconds={}, eta_seconds=None, noise=None, gain=None)
    assert forecast_texts(told) == []


def test_status_summary_and_report_tell_it(search: Command, tiny: Path) -> None:
    words: tuple[Any, ...] = ("run", "--study", tiny, "--dataset", "digits", "--no-finale", "--trials", 16)
    assert search(*words).status == 0
    stated = json.loads(search("status", "--format", "json").out)["forecast"]
    assert stated["gain"]["more"] == 50
    assert sum(stated["device_seconds"].values()) > 0
    assert stated["eta_seconds"] is None
    shown = " ".join(search("status").out.split())
    assert "50 more trials: " in shown
    assert "device time " in shown
    assert json.loads(Path("studies/tiny/summary.json").read_text())["forecast"]["gain"] == stated["gain"]
    assert "Forecast: 50 more trials: " in Path("studies/tiny/report.md").read_text()
