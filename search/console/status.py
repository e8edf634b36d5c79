"""A study's summary, its workers and their logs as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from search.analysis.selection import RULES, CostLimits
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


def summary_table(summary: Mapping[str, Any]) -> Table:
    """A study's summary as a table of what and how much."""
    table = Table(show_header=False, box=None, pad_edge=False)
    count, best, done = summary["budget"], summary["best"], summary["retrain"]
    images = summary["dataset"]
    limits = CostLimits(**summary["limits"]).text
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
