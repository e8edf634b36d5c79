"""The report's sections about the finale: confirmation, retrain, test."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search.analysis.outcomes import number
from search.attributes import DEVICE, LATENCY
from search.config.objective import LATENCY_BATCH
from search.console.format import params_text, percent, trials_text
from search.report.data import ReportData
from search.report.document import Block, Picture, Pictures, Table, Text, table
from search.report.figures import MOST_CLASSES, class_figure, confusion_figure
from search.report.study_figures import confirmation_figure, retrain_accuracy_figure, retrain_loss_figure
from search.report.words import (
    NONE,
    STOPPED,
    counted,
    flops_cell,
    latency_cell,
    points_text,
    real_cell,
    share_cell,
    stage,
    time_cell,
    whole_cell,
    with_interval,
)

WRITTEN_CLASSES = 20
"""Classes up to which the confusion matrix is written out as a table."""


def confirmation(data: ReportData) -> Iterator[Block]:
    """The best configurations over fresh seeds, and which one is taken."""
    told = data.confirmation
    if not told or not told.get("configurations"):
        yield Text("There is no confirmation: what follows rests on one training of each configuration.")
        return
    rows = told["configurations"]
    if told["done"] < told["runs"]:
        yield Text(f"Under way: {told['done']} of {told['runs']} runs are done. So far: {_tie(told)}")
    else:
        yield Text(_tie(told))
    if data.aim.rule != "accuracy":
        yield Text(_rule(data))
    yield table(
        "The search's best configurations, trained again from fresh seeds; validation accuracy, best mean first",
        (
            "trial", "", "mean", "std", "n", "behind the best, points (95 %)", "in the search", "parameters", "FLOPs",
            "configuration",
        ),
        [
            (
                str(row["trial"]),
                _place(row["trial"], told),
                share_cell(row.get("mean")),
                share_cell(row.get("std")),
                str(row.get("n", 0)),
                with_interval(row.get("behind"), "mean"),
                share_cell(row.get("search_accuracy")),
                whole_cell(row.get("parameters")),
                flops_cell(row.get("flops")),
                params_text(row.get("params") or {}),
            )
            for row in rows
        ],
        strong=[i for i, row in enumerate(rows) if row["trial"] == told.get("winner")],
    )  # fmt: skip
    if any(row.get("accuracies") for row in rows):
        yield Picture(
            "Every seed of every configuration",
            confirmation_figure(told),
            "Red diamonds are what the search saw: one to the right of its mean was lucky.",
            height=140 + 44 * len(rows),
        )
    noise = number(told.get("noise"))
    if noise is not None:
        seeds = ", ".join(str(seed) for seed in told.get("seeds") or ())
        yield Text(
            f"One training differs from another of the same configuration by {100 * noise:.2f} points (pooled standard "
            f"deviation over seeds). Seeds: {seeds}."
        )


def _rule(data: ReportData) -> str:
    """Why these configurations."""
    if data.aim.rule == "knee":
        return "Confirmed is the knee of the front alone: its neighbours are other bargains, not its rivals."
    return f"Confirmed are the best of the configurations with {data.aim.limits.text}."


def _tie(told: Mapping[str, Any]) -> str:
    best, winner = told.get("best_mean"), told.get("winner")
    if best is None:
        return "No configuration has finished a run."
    if len(told["configurations"]) == 1:
        return f"One configuration was taken up, so there is nothing to compare: trial {winner}."
    error = number(told.get("noise_of_difference"))
    if error is None:
        return f"Trial {best} has the best mean; how much of that is noise is not known. Trial {winner} is taken."
    others = [trial for trial in told.get("tied") or () if trial != best]
    if not told.get("tie") or not others:
        return f"Trial {best} has the best mean, and no other comes within its noise. Trial {winner} is taken."
    return (
        f"A tie: trial {best} has the best mean, but {trials_text(others)} cannot be told from it, within one "
        f"standard error ({100 * error:.2f} points). Of these the cheapest in FLOPs is taken: trial {winner}."
    )


def _place(trial: int, told: Mapping[str, Any]) -> str:
    best = trial == told.get("best_mean")
    places = {
        "taken": trial == told.get("winner"),
        "best mean": best,
        "tied": trial in (told.get("tied") or ()) and not best,
    }
    return ", ".join(name for name, holds in places.items() if holds)


def retrain(data: ReportData) -> Iterator[Block]:
    """How the winner was trained, for how long, and whether that was long enough."""
    done = data.retrain
    if not done:
        under_way = f"Under way: {stage(data).removeprefix('running: ')}."
        yield Text(under_way if data.progress else "Not retrained yet.")
        return
    watched, runs = done.get("watched") or [], done.get("runs") or []
    yield Text(_convergence(done))
    yield from _retrain_pictures(done, [*watched, *runs])
    if watched:
        yield table(
            "Watched on the fit images alone, each training twice as long as the one before; slopes are those of the "
            "last fifth of the epochs, with 95 % intervals",
            (
                "epochs", "seed", "validation accuracy", "with mirror images", "averaged weights", "both",
                "gain of doubling", "slope, points an epoch", "time",
            ),
            [_watched_row(run) for run in watched],
        )  # fmt: skip
    if choices := done.get("choices"):
        names = {
            "flip": "the mean over an image and its mirror image",
            "averaging": "weights averaged over the ends of the last fifth of the epochs",
        }
        chosen = [f"{text}: {'yes' if choices[key] else 'no'}" for key, text in names.items() if key in choices]
        yield Text(f"Chosen on the validation images for the final network: {'; '.join(chosen)}.")
    if runs:
        yield table(
            "Final trainings, on fit and validation images together",
            (
                "seed", "train accuracy", "train loss", "test accuracy", "test loss", "calibration error",
                "test images read", "time",
            ),
            [_final_row(run) for run in runs],
        )  # fmt: skip


def _retrain_pictures(done: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    pictures = []
    if any(run.get("curve") for run in trainings):
        text = (
            "Solid: validation; dotted: train, on augmented images; stars: test. Final trainings have no validation "
            "images left."
        )
        pictures.append(Picture("Accuracy by epoch", retrain_accuracy_figure(done), text))
    if any(run.get("losses") for run in trainings):
        text = "Thin: every batch; bold: the mean around it."
        pictures.append(Picture("Loss of every batch", retrain_loss_figure(done, most=600), text))
    if pictures:
        yield Pictures(tuple(pictures))


def _watched_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    gain = number(run.get("gain"))
    return (
        str(run["epochs"]),
        str(run.get("seed", NONE)),
        share_cell(run.get("validation_accuracy")),
        share_cell(run.get("flip")),
        share_cell(run.get("averaged")),
        share_cell(run.get("averaged_flip")),
        NONE if gain is None else points_text(gain),
        with_interval(run.get("slope"), "per_epoch", digits=3),
        time_cell(run.get("seconds")),
    )


def _final_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    test = run.get("test") or {}
    return (
        str(run["seed"]),
        share_cell(run.get("train_accuracy")),
        real_cell(run.get("train_loss")),
        share_cell(test.get("accuracy")),
        real_cell(test.get("loss")),
        share_cell(test.get("calibration_error")),
        str(test.get("read_at") or NONE),
        time_cell(run.get("seconds")),
    )


def _convergence(done: Mapping[str, Any]) -> str:
    """How long, why so long, and whether that was long enough (`search.finale.convergence`)."""
    watched, rule = done.get("watched") or [], done.get("rule") or {}
    text = f"Trial {done['trial']} was trained for {counted(done['epochs'], 'epoch')}."
    if not watched:
        return f"{text} Whether a longer training would score higher was not found out."
    lengths = " and ".join(", ".join(str(run["epochs"]) for run in watched).rsplit(", ", 1))
    text += f" Watched on the fit images alone: {lengths} epochs."
    threshold, noise = number(rule.get("threshold")), number(rule.get("noise"))
    if threshold is not None and noise is not None:
        text += (
            f" The rule: double the length while that gains more than {100 * threshold:.2f} points, one standard error "
            f"of the difference between two trainings (one differs by {100 * noise:.2f} points from seed to seed)."
        )
    gain = number(watched[-1].get("gain"))
    last = "" if gain is None else f": the last doubling gained {points_text(gain)}"
    if done.get("converged"):
        return f"{text} Converged{last}."
    stopped = STOPPED.get(str(done.get("stopped_by")), "it was stopped")
    if done["epochs"] > watched[-1]["epochs"]:
        stopped += "; all that was left of them went to the final trainings, longer than any that was watched"
    if done.get("converged") is None:
        return f"{text} Whether a doubling would help was not found out, as {stopped}."
    return f"{text} Not converged, as {stopped}{last}."


def classes(data: ReportData) -> Iterator[Block]:
    """What the network takes for what."""
    done = data.retrain or {}
    by_class, confusion = done.get("per_class_accuracy") or {}, done.get("confusion") or []
    names = data.record.dataset.classes
    if len(confusion) != len(names):
        confusion = []
    pictures = []
    if by_class:
        ranked = sorted(by_class.items(), key=lambda item: float(item[1]))
        rows = [(name, percent(value)) for name, value in ranked]
        by_rank = table("Test accuracy by class, the worst first", ("class", "test accuracy"), rows)
        height = max(420, 90 + 26 * min(len(rows), MOST_CLASSES))
        figure = class_figure(by_class)
        pictures.append(Picture("Accuracy by class, the worst first", figure, numbers=by_rank, height=height))
    if confusion:
        numbers: Table | None = None
        if len(names) <= WRITTEN_CLASSES:
            counts = [(name, *(f"{count:,}" for count in row)) for name, row in zip(names, confusion, strict=True)]
            caption = "Test images by class (rows) and answer (columns), all seeds together"
            numbers = table(caption, ("", *names), counts)
        text = (
            "Per cent of the images of a class (row) by the answer (column). Green: right; red: mistakes, on their own "
            "scale."
        )
        pictures.append(Picture("Confusion", confusion_figure(confusion, names), text, numbers, 460))
    if not pictures:
        yield Text("Not tested yet.")
        return
    yield Pictures(tuple(pictures))
    if worst := _worst_mistake(confusion, names):
        yield Text(worst)


def _worst_mistake(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    mistakes = [
        (count / sum(row), i, j)
        for i, row in enumerate(confusion)
        if sum(row) > 0
        for j, count in enumerate(row)
        if i != j
    ]
    share, i, j = max(mistakes, default=(0.0, 0, 0))
    return f"The most frequent mistake: {percent(share)} of {names[i]} are taken for {names[j]}." if share else ""


def cost(data: ReportData) -> Iterator[Block]:
    """How sure, how large and how fast the network is."""
    done, winner = data.retrain, data.winner
    if winner is None:
        yield Text("Nothing to tell yet.")
        return
    source = done or winner.user_attrs
    rows = [
        ("parameters", whole_cell(source.get("parameters"))),
        ("FLOPs of one image, forward", whole_cell(source.get("flops"))),
    ]
    if LATENCY in winner.user_attrs:
        where = winner.user_attrs.get(DEVICE)
        of = f"latency of {counted(LATENCY_BATCH, 'image')} at the end of its trial, on {where}"
        rows.append((of, latency_cell(winner.user_attrs[LATENCY])))
    if done:
        rows.insert(0, ("calibration error on the test images", share_cell(done.get("calibration_error"))))
        rows += [_latency(int(size), seconds, done) for size, seconds in (done.get("latency") or {}).items()]
        rows.append(("trained and measured on", str(done.get("device") or NONE)))
        rows.append(("time of the whole retrain", time_cell(done.get("seconds"))))
    yield table(f"The network of trial {winner.number}", ("what", "value"), rows)
    if done and number(done.get("calibration_error")) is not None:
        yield Text("Calibration error: the mean gap between how sure the network is and how often it is right.")


def _latency(images: int, seconds: float, done: Mapping[str, Any]) -> tuple[str, str]:
    precision = f", {done['latency_precision']}" if done.get("latency_precision") else ""
    speed = f" ({images / seconds:,.0f} images/s)" if seconds and images > 1 else ""
    return f"latency of {counted(images, 'image')}{precision}", f"{1000 * seconds:,.3g} ms{speed}"
