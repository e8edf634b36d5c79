"""What a person sees of a run: a live view on a terminal, plain log lines elsewhere."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from search.choice import RULES, Limits
from search.events import (
    Best,
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
from search.ledger import Budget
from search.objective import ATTRIBUTES, cost_text


@contextlib.contextmanager
def view(console: Console) -> Iterator[Show]:
    """Something that shows events: live where the console is a terminal, else a line each."""
    eta = Eta()
    if not console.is_terminal:

        def log(event: Event) -> None:
            before = eta.progress
            eta.note(event)
            if isinstance(event, SearchProgress) and before is not None and before.stage == event.stage:
                return
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
                    line = f"{eta.noun} {event.number}: {_outcome_text(event)}"
                else:
                    line = log_line(event, eta)
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield draw


class Eta:
    """How the whole search stands, and the time left in it from the pace of this very run."""

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
        """What one training is called: in the confirmation, numbers are not those of the search's trials."""
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
    """The live picture: budget, running trials, best so far. Rich asks for it four times a second."""

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
        parts: list[RenderableType] = []
        if self._eta.progress:
            count = self._eta.progress.budget
            parts.append(_bar(self._eta.progress.stage, count.done, count.requested, self._eta.text()))
            parts.append(f"  {count.complete} complete, {count.pruned} pruned" + _failed(count))
        devices = {worker.trial: worker.device for worker in self._eta.progress.workers} if self._eta.progress else {}
        for started, epoch, since in list(self._trials.values())[:MOST_TRIALS_SHOWN]:
            parts.append(f"  {self._eta.noun} {started.number}: {escape(params_text(started.params))}")
            device = f", {devices[started.number]}" if started.number in devices and len(self._trials) > 1 else ""
            parts.append(f"    {_trial_progress(epoch, since)}{escape(device)}")
        if len(self._trials) > MOST_TRIALS_SHOWN:
            parts.append(f"  and {len(self._trials) - MOST_TRIALS_SHOWN} more")
        if self._eta.progress and self._eta.progress.best:
            parts.append(f"  best so far: {escape(best_text(self._eta.progress.best))}")
        if self._retrain:
            done = self._retrain_epoch.result.epoch if self._retrain_epoch else 0
            left = f"about {duration(self._retrain_epoch.left)} left" if self._retrain_epoch else ""
            parts.append(_bar(f"retrain {self._retrain.what}", done, self._retrain.epochs, left))
            if self._retrain_epoch:
                parts.append(f"  {escape(_retrain_text(self._retrain_epoch))}")
        return Group(*parts)


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
    rule = f" ({best.rule})" if best.rule else ""
    return f"trial {best.trial}, {percent(best.accuracy)}, {best.parameters:,} parameters{rule}"


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
    limits = Limits(**summary["limits"]).text
    objective = summary["objective"] + (f"; the finale takes {limits}" if limits else "")
    done_text = f"{count['complete'] + count['pruned']} of {count['requested']} configurations"
    counts = [f"{count[key]} {key.replace('_', ' ')}" for key in list(count)[1:]]
    if summary["infeasible"]:
        counts.insert(2, f"of these {summary['infeasible']} infeasible")
    rows = [
        ("study", f"{summary['study']} in {summary['storage']}"),
        ("objective", objective),
        ("images", f"{images['name']}, {images['fit']:,} fit, {images['validation']:,} validation"),
        ("budget", f"{done_text} ({', '.join(counts)})"),
    ]
    if best:
        accuracy = percent(best["val_accuracy"])
        rows.append(
            ("best", f"trial {best['trial']}: {accuracy} validation accuracy, {best['parameters']:,} parameters")
        )
        if best["chosen_by"] != "accuracy":
            rows.append(("", f"chosen as {RULES[best['chosen_by']]}"))
        rows.append(("", params_text(best["params"])))
    if front := summary["front"]:
        rows.append(("front", front_text(front, most=5)))
    if confirmed := summary["confirm"]:
        rows.append(("confirmed", confirmation_text(confirmed)))
    if done:
        accuracy = percent(done["train_accuracy"])
        ended = {True: ", converged", False: f", not converged ({done['stopped_by']})", None: ""}[done["converged"]]
        text = f"trial {done['trial']} for {done['epochs']} epochs{ended}: {accuracy} train accuracy"
        rows.append(("retrained", text))
        rows.append(("test accuracy", test_text(done["test_accuracy"], summary["holdout_reads"])))
    elif progress := summary["retrain_progress"]:
        left = duration(progress["eta_seconds"])
        text = f"{progress['what']}: epoch {progress['epoch']} of {progress['epochs']}, about {left} left"
        rows.append(("retraining", text))
    if known := summary["known_good"]:
        rows.append(("known good", known_good_text(known)))
    rows.append(("time", duration(summary["seconds"])))
    if summary["forecast"]["device_seconds"]:
        rows.append(("device time", device_time_text(summary["forecast"])))
    rows += [("forecast" if place == 0 else "", text) for place, text in enumerate(forecast_texts(summary["forecast"]))]
    if overhead := summary["overhead"]:
        median = f"median {overhead['median_seconds']:.2f} s a trial"
        rows.append(("overhead", f"{100 * overhead['share']:.1f} % of trial time ({median})"))
    if start_up := summary["start_up"]:
        count = start_up["workers"]
        seconds = f"{start_up['median_seconds']:.1f} s"
        if count > 1:
            seconds = f"median {seconds}, longest {start_up['longest_seconds']:.1f} s of {count} workers"
        rows.append(("start-up", f"{seconds}, from a worker's process to its first trial"))
    for name, text in rows:
        table.add_row(name, escape(text), style="bold" if name == "test accuracy" else None)
    for warning in summary["warnings"]:
        table.add_row("[yellow]warning[/yellow]", escape(warning))
    return table


def forecast_texts(told: Mapping[str, Any]) -> list[str]:
    """What is expected of a search, a sentence each; none where nothing is known."""
    texts = []
    if told["eta_seconds"] is not None:
        texts.append(f"the search is done in about {duration(told['eta_seconds'])}")
    if gain := told["gain"]:
        low, high = (f"{100 * gain[key]:.2f}" for key in ("low", "high"))
        text = f"{gain['more']} more trials: {100 * gain['mean']:+.2f} points expected (90 % interval {low} to {high})"
        texts.append(f"{text}; more trials are unlikely to help" if gain["unlikely"] else text)
    if noise := told["noise"]:
        texts.append(f"another seed moves a score by {100 * noise['std']:.2f} points (standard deviation)")
    return texts


def known_good_text(told: Mapping[str, Any]) -> str:
    """What the configurations that a study tried first were worth."""
    text = f"tried first: the best has {percent(told['best'])}, rank {told['rank']} of {told['complete']} now"
    if told["helped"] is None:
        return text
    verdict = "it helped" if told["helped"] else "it did not help"
    return f"{text}; {verdict}: the best of {told['drawn']} drawn without has {percent(told['drawn_best'])}"


def device_time_text(told: Mapping[str, Any]) -> str:
    """Device time by what came of it."""
    spent = told["device_seconds"]
    parts = [f"{kind} {duration(seconds)}" for kind, seconds in spent.items() if seconds]
    return f"{duration(sum(spent.values()))} ({', '.join(parts)})"


def front_text(front: Sequence[Mapping[str, Any]], most: int) -> str:
    """Points of a front, cheapest first; of many some, the first and the last among them."""
    kept = list(front)
    if len(kept) > most:
        kept = [front[round(place * (len(front) - 1) / (most - 1))] for place in range(most)]
    points = [
        f"{percent(row['val_accuracy'])} at {cost_text(cost, row[cost])}"
        for row in kept
        for cost in ATTRIBUTES
        if cost in row
    ]
    of = f"{len(kept)} of {len(front)}" if len(kept) < len(front) else str(len(front))
    return f"{of} point{'s' if len(front) > 1 else ''}: {', '.join(points)}"


def trials_text(numbers: Sequence[int]) -> str:
    """Trials by their numbers."""
    names = [str(trial) for trial in numbers]
    return f"trial {names[0]}" if len(names) == 1 else f"trials {', '.join(names[:-1])} and {names[-1]}"


def test_text(test: Mapping[str, Any], reads: int) -> str:
    """A test accuracy with its spread, and how often the test images were read for it."""
    interval = f"95 % interval {percent(test['low'])} to {percent(test['high'])}"
    if test["n"] == 1:
        return (
            f"{percent(test['mean'])} (one seed; {interval} by the number of images; test images read {_times(reads)})"
        )
    spread = f"{percent(test['mean'])} ± {100 * test['std']:.2f}"
    return f"{spread} over {test['n']} seeds ({interval}; test images read {_times(reads)}, once a seed)"


def confirmation_text(confirmed: Mapping[str, Any]) -> str:
    """How a confirmation ended, or how far it is, in words."""
    if confirmed["done"] < confirmed["runs"] or confirmed["winner"] is None:
        return f"{confirmed['done']} of {confirmed['runs']} trainings done"
    rows = {row["trial"]: row for row in confirmed["configurations"]}
    winner = rows[confirmed["winner"]]
    spread = f" ± {100 * winner['std']:.2f}" if winner["std"] is not None else ""
    text = f"trial {winner['trial']}, {percent(winner['mean'])}{spread} over {winner['n']} seeds"
    if confirmed["tie"]:
        others = [str(number) for number in confirmed["tied"] if number != winner["trial"]]
        text += f", a tie with trial{'s' if len(others) > 1 else ''} {', '.join(others)}, of which it is the cheapest"
    if optimism := confirmed["optimism"]:
        flatterer = {"knee": "its score in", "limit": "the best score within the limit in"}.get(
            confirmed.get("chosen_by", ""), "the best score of"
        )
        text += f"; {flatterer} the search flattered its configuration by {100 * optimism['difference']:+.2f} points"
    return text


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """A study's summary with the trials under way and the workers."""
    parts: list[RenderableType] = [summary_table(status)]
    if status["running_trials"]:
        trials = Table("running", "epoch", "accuracy", "worker", box=None, pad_edge=False)
        for trial in status["running_trials"]:
            accuracy = "" if trial["accuracy"] is None else percent(trial["accuracy"])
            worker = trial["worker"] or ""
            trials.add_row(f"trial {trial['trial']}", str(trial["epoch"] or "first"), accuracy, escape(worker))
        parts += ["", trials]
    if status["workers"]:
        there = Table("worker", "state", "device", "trial", "start-up", "last heartbeat", box=None, pad_edge=False)
        for worker in status["workers"]:
            progress = worker["progress"] or {}
            trial = f"{progress['trial']}, epoch {progress['epoch']}/{progress['epochs']}" if progress else ""
            silent = f"{duration(worker['last_heartbeat_seconds'])} ago"
            start_up = "" if worker["start_up_seconds"] is None else f"{worker['start_up_seconds']:.1f} s"
            name, device = escape(worker["worker"]), escape(worker["device"])
            there.add_row(name, worker["state"], device, trial, start_up, silent)
        parts += ["", there]
    return Group(*parts)


def logs_view(logs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What workers printed last, each under its name and the place where all of it is."""
    parts: list[RenderableType] = []
    for log in logs:
        end = f" ({log['farewell']})" if log["farewell"] else ""
        where = f"; all of it: {log['place']}" if log["place"] else ""
        parts += ["", Text(f"{log['worker']}, {log['state']}{end}{where}", style="bold")]
        parts += [Text(f"  {line}") for line in log["lines"]]
    return Group(*parts) if parts else Group("", "no worker has anything to tell")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
