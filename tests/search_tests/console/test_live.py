import io

import pytest
from rich.console import Console

from model.result import EpochResult
from search.console.format import duration
from search.console.live import Eta, LiveScreen, event_view
from search.events import (
    Best,
    Budget,
    EpochFinished,
    Event,
    Note,
    RetrainEpoch,
    RetrainStarted,
    SearchProgress,
    TrialFinished,
    TrialStarted,
    WorkerAt,
)

EPOCH = EpochResult(2, 1.25, 0.5, 1.0, 0.625, 1234.0, 0.05, 3.0)
RETRAIN = RetrainStarted(3, 7, 50_000, "on all training images, 1 of 2")
BEST = Best(3, 0.75, 1_000_000)


def counted(complete: int, pruned: int = 0) -> Budget:
    return Budget(8, complete, pruned, infeasible=0, failed_attempts=1, running=0, waiting=0)


EVENTS: list[Event] = [
    SearchProgress(counted(1), BEST),
    TrialStarted(4, {"lr": 0.123456, "blocks": 3}, 1000, 5),
    EpochFinished(4, 2, 5, 0.625, 1234.0),
    SearchProgress(counted(1, 1), BEST, (WorkerAt("h:1", "GPU 7", "working", 4),)),
    TrialFinished(4, "pruned", 0.6, 2, 61.0, None),
    TrialStarted(5, {"lr": 0.1}, 1000, 5),
    TrialFinished(5, "failed", None, 0, 1.0, "out of memory"),
    Note("something [to] know"),
    RETRAIN,
    RetrainEpoch(RETRAIN, EPOCH, 75.0, validated=False),
    RetrainEpoch(RETRAIN, EPOCH, 75.0, validated=True),
]


def test_without_a_terminal_every_event_is_a_line() -> None:
    out = io.StringIO()
    with event_view(Console(file=out, width=200)) as show:
        for event in EVENTS:
            show(event)
    lines = [line.partition("  ")[2] for line in out.getvalue().splitlines()]
    assert len(lines) == len(EVENTS) - 1  # of the whole picture the first alone
    assert lines[0] == "search: 1 of 8 configurations done; best so far: trial 3, 75.00 %, 1,000,000 parameters"
    assert lines[1] == "trial 4: lr 0.1235, blocks 3 (1,000 parameters)"
    assert lines[2] == "trial 4: epoch 2/5, accuracy 62.50 %, 1,234 images/s"
    assert lines[3].startswith("trial 4: pruned at 60.00 % after 2 epochs, 1 min 1 s; 2/8 done; best trial 3")
    assert lines[3].endswith("left")
    assert lines[5].startswith("trial 5: failed (out of memory), 1 s; 2/8 done")
    assert lines[6] == "something [to] know"
    begun = "retrain on all training images, 1 of 2: trial 3's configuration, 7 epochs of 50,000 images"
    assert lines[7] == begun
    assert lines[8].startswith("retrain: epoch 2/7  train accuracy 50.00 %")
    assert lines[9].startswith("retrain: epoch 2/7  validation accuracy 62.50 %  train accuracy 50.00 %")
    assert lines[9].endswith("about 1 min 15 s left")


def test_the_confirmations_runs_are_not_called_trials() -> None:
    out = io.StringIO()
    with event_view(Console(file=out, width=200)) as show:
        for event in (
            SearchProgress(counted(8), BEST),
            SearchProgress(counted(0), None, stage="confirm"),
            *EVENTS[1:3],
        ):
            show(event)
    lines = [line.partition("  ")[2] for line in out.getvalue().splitlines()]
    assert lines[1] == "confirm: 0 of 8 trainings done"
    assert lines[2].startswith("confirming run 4: lr 0.1235")
    assert lines[3].startswith("confirming run 4: epoch 2/5")


def test_a_terminal_shows_a_live_picture() -> None:
    eta = Eta()
    screen = LiveScreen(eta)
    pictures = []
    for event in EVENTS:
        eta.note(event)
        screen.note(event)
        out = io.StringIO()
        Console(file=out, width=120).print(screen)
        pictures.append(out.getvalue())
    assert "1/8" in pictures[0]
    assert "1 complete, 0 pruned, 1 failed attempts" in pictures[0]
    assert "trial 4: lr 0.1235, blocks 3" in pictures[1]
    assert "first epoch" in pictures[1]
    assert "epoch 2/5, accuracy 62.50 %, 1,234 images/s" in pictures[2]
    assert "trial 4" not in pictures[4]
    assert "best so far: trial 3, 75.00 %" in pictures[4]
    assert "2/7" in pictures[9]
    assert "retrain on all training images, 1 of 2" in pictures[9]
    assert "about 1 min 15 s left" in pictures[9]


def test_the_picture_names_each_trials_device_where_there_are_several() -> None:
    eta = Eta()
    screen = LiveScreen(eta)
    workers = tuple(WorkerAt(f"h:{number}", f"GPU {number}", "working", number) for number in range(12))
    for event in [SearchProgress(counted(1), BEST, workers), *(TrialStarted(n, {"lr": 0.1}, 9, 5) for n in range(12))]:
        eta.note(event)
        screen.note(event)
    out = io.StringIO()
    Console(file=out, width=120).print(screen)
    assert "GPU 7" in out.getvalue()
    assert "GPU 8" not in out.getvalue()
    assert "and 4 more" in out.getvalue()


def test_the_live_view_leaves_finished_trials_on_the_screen() -> None:
    out = io.StringIO()
    with event_view(Console(file=out, width=120, force_terminal=True)) as show:
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
    clock = iter([0.0, 100.0])
    monkeypatch.setattr("search.console.live.time.monotonic", lambda: next(clock))
    eta = Eta()
    eta.note(SearchProgress(counted(4), None))
    assert eta.text() == ""
    eta.note(SearchProgress(counted(5), BEST))
    assert eta.text() == "about 5 min 0 s left"
