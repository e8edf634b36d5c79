import io

import pytest
from rich.console import Console

from model.result import EpochResult
from search.events import (
    Best,
    EpochFinished,
    Event,
    Note,
    RetrainEpoch,
    RetrainStarted,
    SearchStarted,
    TrialFinished,
    TrialStarted,
)
from search.ledger import Budget
from search.view import Eta, LiveScreen, duration, view

EPOCH = EpochResult(2, 1.25, 0.5, 1.0, 0.625, 1234.0, 0.05, 3.0)
BEST = Best(3, 0.75, 1_000_000)


def counted(complete: int, pruned: int = 0) -> Budget:
    return Budget(8, complete, pruned, failed_attempts=1, running=0, waiting=0)


EVENTS: list[Event] = [
    SearchStarted(counted(1), BEST),
    TrialStarted(4, {"lr": 0.123456, "blocks": 3}, 1000, 5),
    EpochFinished(4, EPOCH, 5),
    TrialFinished(4, "pruned", 0.6, 2, 61.0, "pruned", counted(1, 1), BEST),
    TrialStarted(5, {"lr": 0.1}, 1000, 5),
    TrialFinished(5, "failed", None, 0, 1.0, "out of memory", counted(1, 1), BEST),
    Note("something [to] know"),
    RetrainStarted(3, 7, 50_000),
    RetrainEpoch(EPOCH, 7),
]


def test_without_a_terminal_every_event_is_a_line() -> None:
    out = io.StringIO()
    with view(Console(file=out, width=200)) as show:
        for event in EVENTS:
            show(event)
    lines = [line.partition("  ")[2] for line in out.getvalue().splitlines()]
    assert len(lines) == len(EVENTS)
    assert lines[0] == "search: 1 of 8 configurations done; best so far: trial 3, 75.00 %, 1,000,000 parameters"
    assert lines[1] == "trial 4: lr 0.1235, blocks 3 (1,000 parameters)"
    assert lines[2] == "trial 4: epoch 2/5  accuracy 62.50 %  loss 1.250  1,234 images/s"
    assert lines[3].startswith("trial 4: pruned at 60.00 % after 2 epochs, 1 min 1 s; 2/8 done; best trial 3")
    assert lines[3].endswith("left")
    assert lines[5].startswith("trial 5: failed (out of memory), 1 s; 2/8 done")
    assert lines[6] == "something [to] know"
    assert lines[8].startswith("retrain: epoch 2/7  train accuracy 50.00 %")


def test_a_terminal_shows_a_live_picture() -> None:
    screen = LiveScreen(Eta())
    pictures = []
    for event in EVENTS:
        screen.note(event)
        out = io.StringIO()
        Console(file=out, width=120).print(screen)
        pictures.append(out.getvalue())
    assert "1/8" in pictures[0]
    assert "1 complete, 0 pruned, 1 failed attempts" in pictures[0]
    assert "trial 4: lr 0.1235, blocks 3" in pictures[1]
    assert "first epoch" in pictures[1]
    assert "epoch 2/5, accuracy 62.50 %, 1,234 images/s" in pictures[2]
    assert "trial 4" not in pictures[3]
    assert "best so far: trial 3, 75.00 %" in pictures[3]
    assert "2/7" in pictures[8]
    assert "left" in pictures[8]


def test_the_live_view_leaves_finished_trials_on_the_screen() -> None:
    out = io.StringIO()
    with view(Console(file=out, width=120, force_terminal=True)) as show:
        for event in EVENTS:
            show(event)
    assert "trial 4: pruned at 60.00 %" in out.getvalue()
    assert "something [to] know" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3599.9, "1 h 0 min"), (11_400, "3 h 10 min")],
)
def test_durations_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_counts_only_this_runs_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 120.0])
    monkeypatch.setattr("search.view.time.monotonic", lambda: next(clock))
    eta = Eta()
    eta.note(SearchStarted(counted(4), None))
    assert eta.text() == ""
    eta.note(TrialFinished(4, "complete", 0.6, 2, 20.0, None, counted(5), BEST))
    assert eta.text() == "about 1 min 0 s left"
