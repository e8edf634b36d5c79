"""A study's summary, its workers and their logs as tables."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from search.analysis.selection import RULES
from search.console.format import (
    confirmation_text,
    device_time_text,
    duration,
    forecast_texts,
    front_text,
    known_good_text,
    params_text,
    percent,
    test_text,
)
from search.events import Budget
from search.results import RetrainProgress, RetrainResult
from search.summary import BestTrial, RunningTrial, Status, Summary, WorkerOutput, WorkerStatus

Row = tuple[str, str]
"""What it is, and how much; further rows of the same thing have an empty first part."""


def summary_table(summary: Summary) -> Table:
    """A study's summary as a table of what and how much."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in (*_study_rows(summary), *_result_rows(summary), *_time_rows(summary)):
        table.add_row(name, escape(text), style="bold" if name == "test accuracy" else None)
    for warning in summary.warnings:
        table.add_row("[yellow]warning[/yellow]", escape(warning))
    return table


def _study_rows(summary: Summary) -> Iterator[Row]:
    """What is searched, on which images, and how far the search is."""
    images, limits = summary.dataset, summary.limits.text
    yield "study", f"{summary.study} in {summary.storage}"
    yield "objective", summary.objective + (f"; the finale takes {limits}" if limits else "")
    yield "images", f"{images.name}, {images.fit:,} fit, {images.validation:,} validation"
    yield "budget", _budget_text(summary.budget)


def _budget_text(count: Budget) -> str:
    numbers = asdict(count)
    infeasible = numbers.pop("infeasible")
    counts = [f"{number} {name.replace('_', ' ')}" for name, number in numbers.items() if name != "requested"]
    if infeasible:
        counts.insert(2, f"of these {infeasible} infeasible")
    return f"{count.done} of {count.requested} configurations ({', '.join(counts)})"


def _result_rows(summary: Summary) -> Iterator[Row]:
    """What was found: the best trial, the front, the confirmation, the retrain."""
    if summary.best:
        yield from _best_rows(summary.best)
    if summary.front and summary.front.points:
        yield "front", front_text(summary.front, most=5)
    if summary.confirm:
        yield "confirmed", confirmation_text(summary.confirm)
    if summary.retrain:
        yield "retrained", _retrain_text(summary.retrain)
        yield "test accuracy", test_text(summary.retrain.test_accuracy, summary.holdout_reads)
    elif summary.retrain_progress:
        yield "retraining", _progress_text(summary.retrain_progress)
    if summary.known_good:
        yield "known good", known_good_text(summary.known_good)


def _best_rows(best: BestTrial) -> Iterator[Row]:
    accuracy = percent(best.val_accuracy)
    yield "best", f"trial {best.trial}: {accuracy} validation accuracy, {best.parameters:,} parameters"
    if best.chosen_by != "accuracy":
        yield "", f"chosen as {RULES[best.chosen_by]}"
    yield "", params_text(best.params)


def _retrain_text(result: RetrainResult) -> str:
    ended = {True: ", converged", False: f", not converged ({result.stopped_by})", None: ""}[result.converged]
    accuracy = percent(result.train_accuracy)
    return f"trial {result.trial} for {result.epochs} epochs{ended}: {accuracy} train accuracy"


def _progress_text(progress: RetrainProgress) -> str:
    left = duration(progress.eta_seconds)
    return f"{progress.what}: epoch {progress.epoch} of {progress.epochs}, about {left} left"


def _time_rows(summary: Summary) -> Iterator[Row]:
    """What it has cost, and what more would bring."""
    yield "time", duration(summary.seconds)
    if summary.forecast.device_seconds:
        yield "device time", device_time_text(summary.forecast)
    for index, text in enumerate(forecast_texts(summary.forecast)):
        yield "forecast" if index == 0 else "", text
    if overhead := summary.overhead:
        median = f"median {overhead.median_seconds:.2f} s a trial"
        yield "overhead", f"{100 * overhead.share:.1f} % of trial time ({median})"
    if start_up := summary.start_up:
        seconds = f"{start_up.median_seconds:.1f} s"
        if start_up.workers > 1:
            longest = f"longest {start_up.longest_seconds:.1f} s of {start_up.workers} workers"
            seconds = f"median {seconds}, {longest}"
        yield "start-up", f"{seconds}, from a worker's process to its first trial"


def status_view(status: Status) -> RenderableType:
    """A study's summary with the trials under way, the workers, and their logs if there are any in the status."""
    parts: list[RenderableType] = [summary_table(status.summary)]
    if status.running_trials:
        parts += ["", _trials_table(status.running_trials)]
    if status.workers:
        parts += ["", _workers_table(status.workers)]
    view = Group(*parts)
    return view if status.logs is None else Group(view, logs_view(status.logs))


def _trials_table(trials: Sequence[RunningTrial]) -> Table:
    table = Table("running", "epoch", "accuracy", "worker", box=None, pad_edge=False)
    for trial in trials:
        accuracy = "" if trial.accuracy is None else percent(trial.accuracy)
        table.add_row(f"trial {trial.trial}", str(trial.epoch or "first"), accuracy, escape(trial.worker or ""))
    return table


def _workers_table(workers: Sequence[WorkerStatus]) -> Table:
    table = Table("worker", "state", "device", "trial", "start-up", "last heartbeat", box=None, pad_edge=False)
    for worker in workers:
        progress = worker.progress or {}
        trial = f"{progress['trial']}, epoch {progress['epoch']}/{progress['epochs']}" if progress else ""
        silent = f"{duration(worker.last_heartbeat_seconds)} ago"
        start_up = "" if worker.start_up_seconds is None else f"{worker.start_up_seconds:.1f} s"
        table.add_row(escape(worker.worker), worker.state, escape(worker.device), trial, start_up, silent)
    return table


def logs_view(logs: Sequence[WorkerOutput]) -> RenderableType:
    """What workers printed last, each under its name and the place where all of it is."""
    parts: list[RenderableType] = []
    for log in logs:
        end = f" ({log.farewell})" if log.farewell else ""
        where = f"; all of it: {log.place}" if log.place else ""
        parts += ["", Text(f"{log.worker}, {log.state}{end}{where}", style="bold")]
        parts += [Text(f"  {line}") for line in log.lines]
    return Group(*parts) if parts else Group("", "no worker has anything to tell")
