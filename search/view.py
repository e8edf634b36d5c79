"""What a person sees of a run: a live view on a terminal, plain log lines elsewhere."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from typing import Any, assert_never

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from search.events import (
    Best,
    EpochFinished,
    Event,
    Note,
    RetrainEpoch,
    RetrainStarted,
    SearchStarted,
    Show,
    TrialFinished,
    TrialStarted,
)
from search.ledger import Budget


@contextlib.contextmanager
def view(console: Console) -> Iterator[Show]:
    """Something that shows events: live where the console is a terminal, else a line each."""
    eta = Eta()
    if not console.is_terminal:

        def log(event: Event) -> None:
            eta.note(event)
            now = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
            console.print(f"{now}  {log_line(event, eta)}", markup=False, highlight=False, soft_wrap=True)

        yield log
        return
    screen = LiveScreen(eta)
    with Live(screen, console=console, refresh_per_second=4, transient=True) as live:

        def draw(event: Event) -> None:
            eta.note(event)
            screen.note(event)
            if isinstance(event, TrialFinished | Note | RetrainStarted):
                # The picture below holds what a finished trial's log line says of the whole study.
                if isinstance(event, TrialFinished):
                    line = f"trial {event.number}: {_outcome_text(event)}"
                else:
                    line = log_line(event, eta)
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield draw


class Eta:
    """Time left in the search, from the pace of this very run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_done: int | None = None
        self._budget: Budget | None = None

    def note(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, SearchStarted):
            self._started, self._first_done = time.monotonic(), event.budget.done
        if isinstance(event, SearchStarted | TrialFinished):
            self._budget = event.budget

    def text(self) -> str:
        """Such as ``about 12 min left``; empty before the first trial has ended."""
        if self._budget is None or self._first_done is None or self._budget.done == self._first_done:
            return ""
        pace = (time.monotonic() - self._started) / (self._budget.done - self._first_done)
        return f"about {duration(pace * self._budget.remaining)} left" if self._budget.remaining else ""


class LiveScreen:
    """The live picture: budget, running trial, best so far. Rich asks for it four times a second."""

    def __init__(self, eta: Eta) -> None:
        self._eta = eta
        self._budget: Budget | None = None
        self._best: Best | None = None
        self._trial: TrialStarted | None = None
        self._epoch: EpochFinished | None = None
        self._retrain: RetrainStarted | None = None
        self._retrain_epoch: RetrainEpoch | None = None
        self._since = time.monotonic()

    def note(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case SearchStarted():
                self._budget, self._best = event.budget, event.best
            case TrialStarted():
                self._trial, self._epoch, self._since = event, None, time.monotonic()
            case EpochFinished():
                self._epoch = event
            case TrialFinished():
                self._budget, self._best, self._trial = event.budget, event.best, None
            case RetrainStarted():
                self._retrain, self._since = event, time.monotonic()
            case RetrainEpoch():
                self._retrain_epoch = event
            case Note():
                pass
            case _:
                assert_never(event)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._budget:
            parts.append(_bar("search", self._budget.done, self._budget.requested, self._eta.text()))
            parts.append(f"  {self._budget.complete} complete, {self._budget.pruned} pruned" + _failed(self._budget))
        if self._trial:
            parts.append(f"  trial {self._trial.number}: {escape(params_text(self._trial.params))}")
            parts.append(f"    {self._progress()}")
        if self._best:
            parts.append(f"  best so far: {escape(best_text(self._best))}")
        if self._retrain:
            done = self._retrain_epoch.result.epoch if self._retrain_epoch else 0
            elapsed = time.monotonic() - self._since
            left = f"about {duration(elapsed / done * (self._retrain.epochs - done))} left" if done else ""
            parts.append(_bar("retrain", done, self._retrain.epochs, left))
            if self._retrain_epoch:
                parts.append(f"  {escape(_retrain_text(self._retrain_epoch))}")
        return Group(*parts)

    def _progress(self) -> str:
        elapsed = duration(time.monotonic() - self._since)
        if self._epoch is None or self._trial is None or self._epoch.number != self._trial.number:
            return f"first epoch, {elapsed}"
        result = self._epoch.result
        return (
            f"epoch {result.epoch}/{self._epoch.epochs}, accuracy {percent(result.validation_accuracy)}, "
            f"{result.images_per_second:,.0f} images/s, {elapsed}"
        )


def _bar(name: str, done: int, total: int, text: str) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    )
    progress.add_task(name, completed=done, total=total, text=text)
    return progress


def log_line(event: Event, eta: Eta) -> str:
    """One event as one line."""
    match event:
        case SearchStarted():
            count = event.budget
            best = f"; best so far: {best_text(event.best)}" if event.best else ""
            return f"search: {count.done} of {count.requested} configurations done{best}"
        case TrialStarted():
            return f"trial {event.number}: {params_text(event.params)} ({event.parameters:,} parameters)"
        case EpochFinished():
            return f"trial {event.number}: {_epoch_text(event)}"
        case TrialFinished():
            return f"trial {event.number}: {_finished_text(event, eta)}"
        case RetrainStarted():
            return f"retrain: trial {event.trial}'s configuration, {event.epochs} epochs of {event.images:,} images"
        case RetrainEpoch():
            return f"retrain: {_retrain_text(event)}"
        case Note():
            return event.text
        case _:
            assert_never(event)


def _epoch_text(event: EpochFinished) -> str:
    result = event.result
    return (
        f"epoch {result.epoch}/{event.epochs}  accuracy {percent(result.validation_accuracy)}  "
        f"loss {result.train_loss:.3f}  {result.images_per_second:,.0f} images/s"
    )


def _outcome_text(event: TrialFinished) -> str:
    if event.accuracy is None:
        what = f"{event.outcome} ({event.cause})"
    else:
        what = f"{event.outcome} at {percent(event.accuracy)} after {event.epochs} epochs"
    return f"{what}, {duration(event.seconds)}"


def _finished_text(event: TrialFinished, eta: Eta) -> str:
    done = f"{event.budget.done}/{event.budget.requested} done"
    best = f"best {best_text(event.best)}" if event.best else ""
    return "; ".join(part for part in (_outcome_text(event), done, best, eta.text()) if part)


def _retrain_text(event: RetrainEpoch) -> str:
    result = event.result
    return (
        f"epoch {result.epoch}/{event.epochs}  train accuracy {percent(result.train_accuracy)}  "
        f"loss {result.train_loss:.3f}  {result.images_per_second:,.0f} images/s  lr {result.lr:.2g}"
    )


def _failed(count: Budget) -> str:
    return f", {count.failed_attempts} failed attempts" if count.failed_attempts else ""


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``42 s``, ``7 min 5 s``, ``3 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def best_text(best: Best) -> str:
    """The best configuration in a few words."""
    return f"trial {best.trial}, {percent(best.accuracy)}, {best.parameters:,} parameters"


def params_text(params: Mapping[str, Any]) -> str:
    """Parameters as ``name value`` pairs, numbers short."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """A study's summary as a table of what and how much."""
    table = Table(show_header=False, box=None, pad_edge=False)
    count, best, done = summary["budget"], summary["best"], summary["retrain"]
    images = summary["dataset"]
    done_text = f"{count['complete'] + count['pruned']} of {count['requested']} configurations"
    counts = [f"{count[key]} {key.replace('_', ' ')}" for key in list(count)[1:]]
    rows = [
        ("study", f"{summary['study']} in {summary['storage']}"),
        ("images", f"{images['name']}, {images['fit']:,} fit, {images['validation']:,} validation"),
        ("budget", f"{done_text} ({', '.join(counts)})"),
    ]
    if best:
        accuracy = percent(best["val_accuracy"])
        rows.append(
            ("best", f"trial {best['trial']}: {accuracy} validation accuracy, {best['parameters']:,} parameters")
        )
        rows.append(("", params_text(best["params"])))
    if done:
        accuracy = percent(done["train_accuracy"])
        rows.append(("retrained", f"trial {done['trial']} for {done['epochs']} epochs: {accuracy} train accuracy"))
        reads = _times(summary["holdout_reads"])
        rows.append(("test accuracy", f"{percent(done['test_accuracy']['mean'])} (test images read {reads})"))
    rows.append(("time", duration(summary["seconds"])))
    for name, text in rows:
        table.add_row(name, escape(text), style="bold" if name == "test accuracy" else None)
    for warning in summary["warnings"]:
        table.add_row("[yellow]warning[/yellow]", escape(warning))
    return table


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
