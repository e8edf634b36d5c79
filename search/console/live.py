"""What a person sees of a run: a live view on a terminal, plain log lines elsewhere."""

import contextlib
import datetime
import time
from collections.abc import Iterator
from typing import assert_never

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from search.console.format import best_text, duration, params_text, percent
from search.events import (
    Budget,
    EpochFinished,
    Event,
    Note,
    RetrainEpoch,
    RetrainStarted,
    SearchProgress,
    Show,
    TrialFinished,
    TrialStarted,
)


@contextlib.contextmanager
def event_view(console: Console) -> Iterator[Show]:
    """Something that shows events: live if the console is a terminal, else a line for each."""
    eta = Eta()
    if not console.is_terminal:

        def log(event: Event) -> None:
            before = eta.progress
            eta.note(event)
            if isinstance(event, SearchProgress) and before is not None and before.stage == event.stage:
                return
            clock = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
            console.print(f"{clock}  {log_line(event, eta)}", markup=False, highlight=False, soft_wrap=True)

        yield log
        return
    screen = LiveScreen(eta)
    with Live(screen, console=console, refresh_per_second=4, transient=True) as live:

        def draw(event: Event) -> None:
            eta.note(event)
            screen.note(event)
            if isinstance(event, TrialFinished | Note | RetrainStarted):
                # The screen below shows what a finished trial's log line says of the whole study.
                if isinstance(event, TrialFinished):
                    line = f"{eta.noun} {event.number}: {_outcome_text(event)}"
                else:
                    line = log_line(event, eta)
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield draw


class Eta:
    """How the whole search stands, and the time left in it, from the pace of this run alone."""

    def __init__(self) -> None:
        self.progress: SearchProgress | None = None
        self._began: tuple[float, int] | None = None

    def note(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, SearchProgress):
            if self.progress is None or self.progress.stage != event.stage:
                self._began = (time.monotonic(), event.budget.done)
            self.progress = event

    @property
    def noun(self) -> str:
        """What a training is called: in the confirmation, numbers are not those of the search's trials."""
        return "confirming run" if self.progress is not None and self.progress.stage == "confirm" else "trial"

    def text(self) -> str:
        """Such as ``about 12 min left``; empty before the first trial has ended."""
        if self.progress is None or self._began is None:
            return ""
        (since, before), count = self._began, self.progress.budget
        if count.done == before or not count.remaining:
            return ""
        return f"about {duration((time.monotonic() - since) / (count.done - before) * count.remaining)} left"


class LiveScreen:
    """The live view: budget, running trials, best so far. Rich renders it four times a second."""

    def __init__(self, eta: Eta) -> None:
        self._eta = eta
        self._trials: dict[int, tuple[TrialStarted, EpochFinished | None, float]] = {}
        self._retrain: RetrainStarted | None = None
        self._retrain_epoch: RetrainEpoch | None = None

    def note(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case TrialStarted():
                self._trials[event.number] = (event, None, time.monotonic())
            case EpochFinished():
                if event.number in self._trials:
                    started, _, since = self._trials[event.number]
                    self._trials[event.number] = (started, event, since)
            case TrialFinished():
                self._trials.pop(event.number, None)
            case RetrainStarted():
                self._retrain, self._retrain_epoch = event, None
            case RetrainEpoch():
                self._retrain_epoch = event
            case Note() | SearchProgress():
                pass
            case _:
                assert_never(event)

    def __rich__(self) -> RenderableType:
        progress = self._eta.progress
        parts: list[RenderableType] = []
        if progress:
            count = progress.budget
            parts.append(_bar(progress.stage, count.done, count.requested, self._eta.text()))
            parts.append(f"  {count.complete} complete, {count.pruned} pruned" + _failed(count))
        parts += self._running()
        if progress and progress.best:
            parts.append(f"  best so far: {escape(best_text(progress.best))}")
        if self._retrain:
            epoch = self._retrain_epoch
            left = f"about {duration(epoch.left)} left" if epoch else ""
            done = epoch.result.epoch if epoch else 0
            parts.append(_bar(f"retrain {self._retrain.what}", done, self._retrain.epochs, left))
            if epoch:
                parts.append(f"  {escape(_retrain_text(epoch))}")
        return Group(*parts)

    def _running(self) -> Iterator[str]:
        """Two lines for each of the first trials in training."""
        devices = {worker.trial: worker.device for worker in self._eta.progress.workers} if self._eta.progress else {}
        for started, epoch, since in list(self._trials.values())[:MOST_TRIALS_SHOWN]:
            yield f"  {self._eta.noun} {started.number}: {escape(params_text(started.params))}"
            device = f", {devices[started.number]}" if started.number in devices and len(self._trials) > 1 else ""
            yield f"    {_trial_progress(epoch, since)}{escape(device)}"
        if len(self._trials) > MOST_TRIALS_SHOWN:
            yield f"  and {len(self._trials) - MOST_TRIALS_SHOWN} more"


MOST_TRIALS_SHOWN = 8


def _trial_progress(epoch: EpochFinished | None, since: float) -> str:
    elapsed = duration(time.monotonic() - since)
    return f"first epoch, {elapsed}" if epoch is None else f"{_epoch_text(epoch)}, {elapsed}"


def _bar(name: str, done: int, total: int, text: str) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    )
    progress.add_task(name, completed=done, total=total, text=text)
    return progress


def log_line(event: Event, eta: Eta) -> str:
    """One event as one line."""
    match event:
        case SearchProgress():
            count = event.budget
            best = f"; best so far: {best_text(event.best)}" if event.best else ""
            what = "configurations" if event.stage == "search" else "trainings"
            return f"{event.stage}: {count.done} of {count.requested} {what} done{best}"
        case TrialStarted():
            return f"{eta.noun} {event.number}: {params_text(event.params)} ({event.parameters:,} parameters)"
        case EpochFinished():
            return f"{eta.noun} {event.number}: {_epoch_text(event)}"
        case TrialFinished():
            return f"{eta.noun} {event.number}: {_finished_text(event, eta)}"
        case RetrainStarted():
            return (
                f"retrain {event.what}: trial {event.trial}'s configuration, "
                f"{event.epochs} epochs of {event.images:,} images"
            )
        case RetrainEpoch():
            return f"retrain: {_retrain_text(event)}"
        case Note():
            return event.text
        case _:
            assert_never(event)


def _epoch_text(event: EpochFinished) -> str:
    speed = f", {event.images_per_second:,.0f} images/s" if event.images_per_second else ""
    return f"epoch {event.epoch}/{event.epochs}, accuracy {percent(event.accuracy)}{speed}"


def _outcome_text(event: TrialFinished) -> str:
    if event.accuracy is None:
        what = f"{event.outcome} ({event.cause})"
    else:
        what = f"{event.outcome} at {percent(event.accuracy)} after {event.epochs} epochs"
    return f"{what}, {duration(event.seconds)}"


def _finished_text(event: TrialFinished, eta: Eta) -> str:
    parts = [_outcome_text(event)]
    if eta.progress:
        count, best = eta.progress.budget, eta.progress.best
        parts += [f"{count.done}/{count.requested} done", f"best {best_text(best)}" if best else "", eta.text()]
    return "; ".join(part for part in parts if part)


def _retrain_text(event: RetrainEpoch) -> str:
    result = event.result
    validation = f"validation accuracy {percent(result.validation_accuracy)}  " if event.validated else ""
    return (
        f"epoch {result.epoch}/{event.started.epochs}  {validation}train accuracy {percent(result.train_accuracy)}  "
        f"loss {result.train_loss:.3f}  {result.images_per_second:,.0f} images/s  lr {result.lr:.2g}  "
        f"about {duration(event.left)} left"
    )


def _failed(count: Budget) -> str:
    return f", {count.failed_attempts} failed attempts" if count.failed_attempts else ""
