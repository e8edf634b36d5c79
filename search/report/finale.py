"""The report's sections about the finale: confirmation, retrain, test."""

from collections.abc import Iterator, Sequence

from search.attributes import DEVICE, FLOPS, LATENCY, PARAMETERS
from search.config.objective import LATENCY_BATCH
from search.console.format import params_text, percent, trials_text
from search.report.data import ReportData
from search.report.document import ContentBlock, Picture, Pictures, Table, Text, table
from search.report.finale_figures import (
    MOST_CLASSES,
    class_figure,
    confirmation_figure,
    confusion_figure,
    retrain_accuracy_figure,
    retrain_loss_figure,
)
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
from search.results import (
    Confirmation,
    ConfirmedConfiguration,
    FinalTraining,
    InferenceChoices,
    LengthTraining,
    RetrainResult,
)

WRITTEN_CLASSES = 20
"""Classes up to which the confusion matrix is written out as a table."""


def confirmation(data: ReportData) -> Iterator[ContentBlock]:
    """The best configurations over fresh seeds, and which one is taken."""
    confirmed = data.confirmation
    if confirmed is None or not confirmed.configurations:
        yield Text("There is no confirmation: what follows rests on one training of each configuration.")
        return
    rows = confirmed.configurations
    if confirmed.done < confirmed.runs:
        yield Text(f"Under way: {confirmed.done} of {confirmed.runs} runs are done. So far: {_tie(confirmed)}")
    else:
        yield Text(_tie(confirmed))
    if data.aim.rule != "accuracy":
        yield Text(_rule(data))
    yield table(
        "The search's best configurations, trained again from fresh seeds; validation accuracy, best mean first",
        (
            "trial", "", "mean", "std", "n", "behind the best, points (95 %)", "in the search", "parameters", "FLOPs",
            "configuration",
        ),
        [_configuration_row(row, confirmed) for row in rows],
        strong=[i for i, row in enumerate(rows) if row.trial == confirmed.winner],
    )  # fmt: skip
    if any(row.accuracies for row in rows):
        yield Picture(
            "Every seed of every configuration",
            confirmation_figure(confirmed),
            "Red diamonds are what the search saw: one to the right of its mean was lucky.",
            height=140 + 44 * len(rows),
        )
    if confirmed.noise is not None:
        seeds = ", ".join(str(seed) for seed in confirmed.seeds)
        yield Text(
            f"One training differs from another of the same configuration by {100 * confirmed.noise:.2f} points "
            f"(pooled standard deviation over seeds). Seeds: {seeds}."
        )


def _configuration_row(row: ConfirmedConfiguration, confirmed: Confirmation) -> tuple[str, ...]:
    return (
        str(row.trial),
        _standing(row.trial, confirmed),
        share_cell(row.mean),
        share_cell(row.std),
        str(row.n),
        with_interval(row.behind.mean, row.behind.low, row.behind.high) if row.behind else NONE,
        share_cell(row.search_accuracy),
        whole_cell(row.parameters),
        flops_cell(row.flops),
        params_text(row.params),
    )


def _rule(data: ReportData) -> str:
    """Why these configurations."""
    if data.aim.rule == "knee":
        return "Confirmed is the knee of the front alone: its neighbours are other bargains, not its rivals."
    return f"Confirmed are the best of the configurations with {data.aim.limits.text}."


def _tie(confirmed: Confirmation) -> str:
    best, winner, error = confirmed.best_mean, confirmed.winner, confirmed.noise_of_difference
    if best is None:
        return "No configuration has finished a run."
    if len(confirmed.configurations) == 1:
        return f"One configuration was taken up, so there is nothing to compare: trial {winner}."
    if error is None:
        return f"Trial {best} has the best mean; how much of that is noise is not known. Trial {winner} is taken."
    others = [trial for trial in confirmed.tied if trial != best]
    if not confirmed.tie or not others:
        return f"Trial {best} has the best mean, and no other comes within its noise. Trial {winner} is taken."
    return (
        f"A tie: trial {best} has the best mean, but {trials_text(others)} cannot be told from it, within one "
        f"standard error ({100 * error:.2f} points). Of these the cheapest in FLOPs is taken: trial {winner}."
    )


def _standing(trial: int, confirmed: Confirmation) -> str:
    best = trial == confirmed.best_mean
    standings = {
        "taken": trial == confirmed.winner,
        "best mean": best,
        "tied": trial in confirmed.tied and not best,
    }
    return ", ".join(name for name, holds in standings.items() if holds)


def retrain(data: ReportData) -> Iterator[ContentBlock]:
    """How the winner was trained, for how long, and whether that was long enough."""
    done = data.retrain
    if done is None:
        under_way = f"Under way: {stage(data).removeprefix('running: ')}."
        yield Text(under_way if data.progress else "Not retrained yet.")
        return
    yield Text(_convergence(done))
    yield from _retrain_pictures(done)
    if done.watched:
        yield table(
            "Watched on the fit images alone, each training twice as long as the one before; slopes are those of the "
            "last fifth of the epochs, with 95 % intervals",
            (
                "epochs", "seed", "validation accuracy", "with mirror images", "averaged weights", "both",
                "gain of doubling", "slope, points an epoch", "time",
            ),
            [_length_row(training) for training in done.watched],
        )  # fmt: skip
    if done.choices:
        yield Text(_choices(done.choices))
    if done.runs:
        yield table(
            "Final trainings, on fit and validation images together",
            (
                "seed", "train accuracy", "train loss", "test accuracy", "test loss", "calibration error",
                "test images read", "time",
            ),
            [_final_row(training) for training in done.runs],
        )  # fmt: skip


def _retrain_pictures(done: RetrainResult) -> Iterator[ContentBlock]:
    trainings: tuple[LengthTraining | FinalTraining, ...] = (*done.watched, *done.runs)
    pictures = []
    if any(training.curve for training in trainings):
        text = (
            "Solid: validation; dotted: train, on augmented images; stars: test. Final trainings have no validation "
            "images left."
        )
        pictures.append(Picture("Accuracy by epoch", retrain_accuracy_figure(done), text))
    if any(training.losses for training in trainings):
        text = "Thin: every batch; bold: the mean around it."
        pictures.append(Picture("Loss of every batch", retrain_loss_figure(done, most=600), text))
    if pictures:
        yield Pictures(tuple(pictures))


def _choices(choices: InferenceChoices) -> str:
    answers = {
        "the mean over an image and its mirror image": choices.flip,
        "weights averaged over the ends of the last fifth of the epochs": choices.averaging,
    }
    chosen = "; ".join(f"{text}: {'yes' if answer else 'no'}" for text, answer in answers.items())
    return f"Chosen on the validation images for the final network: {chosen}."


def _length_row(training: LengthTraining) -> tuple[str, ...]:
    slope = training.slope
    return (
        str(training.epochs),
        str(training.seed),
        share_cell(training.validation_accuracy),
        share_cell(training.flip),
        share_cell(training.averaged),
        share_cell(training.averaged_flip),
        NONE if training.gain is None else points_text(training.gain),
        with_interval(slope.per_epoch, slope.low, slope.high, digits=3) if slope else NONE,
        time_cell(training.seconds),
    )


def _final_row(training: FinalTraining) -> tuple[str, ...]:
    return (
        str(training.seed),
        share_cell(training.train_accuracy),
        real_cell(training.train_loss),
        share_cell(training.test.accuracy),
        real_cell(training.test.loss),
        share_cell(training.test.calibration_error),
        training.test.read_at,
        time_cell(training.seconds),
    )


def _convergence(done: RetrainResult) -> str:
    """How long, why so long, and whether that was long enough (`search.finale.convergence`)."""
    watched, rule = done.watched, done.rule
    text = f"Trial {done.trial} was trained for {counted(done.epochs, 'epoch')}."
    if not watched:
        return f"{text} Whether a longer training would score higher was not found out."
    lengths = " and ".join(", ".join(str(training.epochs) for training in watched).rsplit(", ", 1))
    text += f" Watched on the fit images alone: {lengths} epochs."
    if rule:
        text += (
            f" The rule: double the length while that gains more than {100 * rule.threshold:.2f} points, one standard "
            f"error of the difference between two trainings (one differs by {100 * rule.noise:.2f} points from seed to "
            "seed)."
        )
    gain = watched[-1].gain
    last = "" if gain is None else f": the last doubling gained {points_text(gain)}"
    if done.converged:
        return f"{text} Converged{last}."
    stopped = STOPPED.get(str(done.stopped_by), "it was stopped")
    if done.epochs > watched[-1].epochs:
        stopped += "; all that was left of them went to the final trainings, longer than any that was watched"
    if done.converged is None:
        return f"{text} Whether a doubling would help was not found out, as {stopped}."
    return f"{text} Not converged, as {stopped}{last}."


def classes(data: ReportData) -> Iterator[ContentBlock]:
    """What the network takes for what."""
    done, names = data.retrain, data.record.dataset.classes
    by_class = (done.per_class_accuracy if done else None) or {}
    confusion = done.confusion if done and len(done.confusion) == len(names) else ()
    pictures = []
    if by_class:
        ranked = sorted(by_class.items(), key=lambda item: item[1])
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


def cost(data: ReportData) -> Iterator[ContentBlock]:
    """How sure, how large and how fast the network is."""
    done, winner = data.retrain, data.winner
    if winner is None:
        yield Text("Nothing to tell yet.")
        return
    parameters, flops = winner.user_attrs.get(PARAMETERS), winner.user_attrs.get(FLOPS)
    rows = [
        ("parameters", whole_cell(done.parameters if done else parameters)),
        ("FLOPs of one image, forward", whole_cell(done.flops if done else flops)),
    ]
    if LATENCY in winner.user_attrs:
        device = winner.user_attrs.get(DEVICE)
        text = f"latency of {counted(LATENCY_BATCH, 'image')} at the end of its trial, on {device}"
        rows.append((text, latency_cell(winner.user_attrs[LATENCY])))
    if done:
        rows.insert(0, ("calibration error on the test images", share_cell(done.calibration_error)))
        rows += [_latency(size, seconds, done) for size, seconds in (done.latency or {}).items()]
        rows.append(("trained and measured on", done.device or NONE))
        rows.append(("time of the whole retrain", time_cell(done.seconds)))
    yield table(f"The network of trial {winner.number}", ("what", "value"), rows)
    if done and done.calibration_error is not None:
        yield Text("Calibration error: the mean gap between how sure the network is and how often it is right.")


def _latency(images: int, seconds: float, done: RetrainResult) -> tuple[str, str]:
    precision = f", {done.latency_precision}" if done.latency_precision else ""
    speed = f" ({images / seconds:,.0f} images/s)" if seconds and images > 1 else ""
    return f"latency of {counted(images, 'image')}{precision}", f"{1000 * seconds:,.3g} ms{speed}"
