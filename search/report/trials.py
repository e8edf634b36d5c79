"""The report's sections about the search itself: trials, parameters, cost, time, pruning."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from search.analysis.outcomes import Outcome, outcome, seconds
from search.attributes import FAULT, FLOPS, PARAMETERS, WOULD_STOP
from search.config.objective import COST_ATTRIBUTES, LATENCY_BATCH, score
from search.config.space import parameter_distributions
from search.console.format import duration, forecast_texts, known_good_text, params_text, percent
from search.report.data import LEAST_FOR_IMPORTANCES, ReportData
from search.report.document import ContentBlock, Picture, Pictures, Text, table
from search.report.parameter_figures import parallel_figure, shares_figure, slice_figure
from search.report.study_figures import (
    MOST_POINTS,
    budget_figure,
    cost_figure,
    device_hours_figure,
    known_costs,
    pareto_front,
)
from search.report.trial_figures import (
    MOST_WORKERS,
    correlation_figure,
    history_figure,
    learning_curves_figure,
    timeline_figure,
    worker_of,
)
from search.report.words import NONE, counted, flops_cell, latency_cell, whole_cell
from search.summary import Summary

SHOWN_TRIALS = 10
"""The best trials, shown with their parameters."""

UNITS: Mapping[str, tuple[str, str, Callable[[object], str]]] = {
    "parameters": ("parameters", "as many or fewer parameters", whole_cell),
    "flops": ("FLOPs", "as many or fewer FLOPs", whole_cell),
    "latency": (f"latency of {LATENCY_BATCH} image", "the same or a lower latency", latency_cell),
}
"""Of a cost: its name, what bounds it, and how it is written."""

KNEE = (
    ", the point farthest above the chord between its ends, with the accuracy and the logarithm of the cost each "
    "brought to 0 to 1 (Satopaa et al., 2011)"
)

AUDITED = "Audited: trials that the pruner wanted to stop and that were let run, to see what they would have reached."


def history(data: ReportData) -> Iterator[ContentBlock]:
    """What every trial reached, and the best of them."""
    pictures = []
    text = AUDITED if data.audit and data.audit.audited else ""
    drawn = history_figure(data.trials)
    if drawn.data:
        pictures.append(Picture("Optimisation history", drawn, text))
    drawn = learning_curves_figure(data.trials)
    if drawn.data:
        pictures.append(Picture("Accuracy by epoch of every trial", drawn, text))
    if pictures:
        yield Pictures(tuple(pictures))
    else:
        yield Text("No trial has an accuracy yet." if data.trials else "No trial has begun.")
    if known := data.summary.known_good:
        yield Text(f"Known good configurations, {known_good_text(known)}.")
    if expected := forecast_texts(data.summary.forecast):
        yield Text(f"Forecast: {'; '.join(expected)}.")
    if not data.complete:
        return
    best = data.complete[:SHOWN_TRIALS]
    yield table(
        f"The best {len(best)} of {counted(len(data.complete), 'trial')} that ran to their end",
        ("trial", "validation accuracy", "parameters", "FLOPs", "time", "configuration"),
        [
            (
                str(trial.number),
                percent(score(trial) or 0.0),
                whole_cell(trial.user_attrs.get(PARAMETERS)),
                flops_cell(trial.user_attrs.get(FLOPS)),
                duration(seconds(trial)),
                params_text(trial.params) + ("; audited" if WOULD_STOP in trial.user_attrs else ""),
            )
            for trial in best
        ],
        strong=[i for i, trial in enumerate(best) if trial is data.winner],
    )


def parameters(data: ReportData) -> Iterator[ContentBlock]:
    """Which parameters matter, and where the good values lie."""
    complete = data.complete
    forms = {name: f for name, f in parameter_distributions(data.record.config.space).items() if not f.single()}
    if not complete or not forms:
        yield Text("No trial has run to its end." if forms else "Nothing is varied.")
        return
    if data.importances:
        best = "the best trials" if data.aim.cost is None else "the trials nearest to the front"
        yield Picture(
            "Importance",
            shares_figure(data.importances),
            f"How much each parameter's values differ between {best} and all of them (PED-ANOVA), as shares.",
            table(
                "Importance of parameters",
                ("parameter", "share"),
                [(name, f"{share:.1%}") for name, share in data.importances.items()],
            ),
            110 + 30 * len(data.importances),
        )
    else:
        why = f"fewer than {LEAST_FOR_IMPORTANCES} trials ran to their end, or these do not differ"
        yield Text(f"Importances are not told: {why}.")
    shown = {name: form for name, form in forms.items() if sum(name in trial.params for trial in complete) > 1}
    if shown:
        yield Text("Each parameter by itself, trials that ran to their end; amber came early, violet late.")
        slices = (Picture(name, slice_figure(complete, name, form), height=260) for name, form in shown.items())
        yield Pictures(tuple(slices), small=True)
    if len(shown) > 1:
        text = (
            "A line is a trial; every axis runs from the low end of its range to the high one, or through its choices."
        )
        yield Picture("All parameters together", parallel_figure(complete, shown), text, height=420)


def pareto(data: ReportData) -> Iterator[ContentBlock]:
    """What accuracy costs."""
    pictures = []
    rule, chosen = data.aim.rule, data.chosen
    pointed = chosen.number if chosen is not None and rule != "accuracy" else None
    if pointed is not None:
        yield Text(f"The star is trial {pointed}: {data.aim.text}{KNEE if rule == 'knee' else ''}.")
    for attribute in known_costs(data.complete):
        unit, least, cell = UNITS[attribute]
        front = pareto_front(data.trials, attribute)
        rows = [(str(t.number), cell(t.user_attrs[attribute]), percent(score(t) or 0.0)) for t in front]
        if rows:
            numbers = table(
                f"Trials that no other beats at {least}",
                ("trial", unit, "validation accuracy"),
                rows,
                strong=[i for i, trial in enumerate(front) if trial.number == pointed],
            )
            text = "The line joins trials that no other beats at the same or a lower cost."
            if data.aim.cost is not None and COST_ATTRIBUTES[data.aim.cost] == attribute:
                text += " It is the front that was searched for."
            if len(data.complete) > MOST_POINTS:
                text += f" Shown are these and the best others, {MOST_POINTS} of {len(data.complete):,} in all."
            figure = cost_figure(data.trials, attribute, pointed)
            pictures.append(Picture(f"Accuracy and {unit}", figure, text, numbers))
    if pictures:
        yield Pictures(tuple(pictures))
    else:
        yield Text("No trial with a known cost has run to its end.")


def time_spent(data: ReportData) -> Iterator[ContentBlock]:
    """What became of the budget and of the devices' time, and who trained what when."""
    trials, count = data.trials, data.count
    kinds: tuple[Outcome, ...] = ("complete", "pruned", "infeasible", "failed attempt", "running")
    numbers = Counter(outcome(trial) for trial in trials)
    times = {kind: sum(seconds(t) for t in trials if t.state.is_finished() and outcome(t) == kind) for kind in kinds}
    rows = [(kind, str(numbers[kind]), duration(times[kind]) if times[kind] else NONE) for kind in kinds]
    rows.append(("waiting", str(count.waiting), NONE))
    whole = sum(times.values())
    pictures = [
        Picture(
            f"Budget: {count.done} of {count.requested} configurations",
            budget_figure(trials, count.requested, count.waiting),
            numbers=table("Configurations and attempts by outcome", ("outcome", "number", "device time"), rows),
            height=300,
        )
    ]
    if whole:
        title = f"Device time by outcome: {duration(whole)}"
        pictures.append(Picture(title, device_hours_figure(trials), height=300))
    yield Pictures(tuple(pictures))
    if faults := Counter(str(t.user_attrs[FAULT]) for t in trials if t.user_attrs.get(FAULT)):
        yield Text(f"Faults: {', '.join(f'{name} ({number})' for name, number in faults.most_common())}.")
    workers = {worker_of(trial) for trial in trials if trial.datetime_start is not None}
    if workers:
        rest = "" if len(workers) <= MOST_WORKERS else f" The first {MOST_WORKERS} of {len(workers)}."
        yield Picture(
            "Who trained what when",
            timeline_figure(trials, data.written.replace(tzinfo=None)),
            f"A row for each worker.{rest}",
            height=130 + max(90, 32 * min(len(workers), MOST_WORKERS)),
        )
    yield Text(f"{'; '.join(_times(data.summary))}.")


def _times(summary: Summary) -> Iterator[str]:
    yield f"All commands together took {duration(summary.seconds)}"
    if overhead := summary.overhead:
        yield f"{100 * overhead.share:.1f} % of the trials' time was neither training nor validation"
    if start_up := summary.start_up:
        yield f"a worker needed {start_up.median_seconds:.1f} s from its start to its first trial (median)"


def pruning(data: ReportData) -> Iterator[ContentBlock]:
    """What pruning saved, and whether it stopped the wrong ones."""
    audit = data.audit
    if audit is None:
        yield Text("Nothing to tell yet: no trial ran to its end or was pruned.")
        return
    if data.aim.cost is not None:
        yield Text(
            "Nothing is pruned in a search with two objectives, as epochs can be compared on one only: trials train "
            "their full length."
        )
    else:
        yield Text(f"{_sentence(audit.verdict)}.")
    rows = [
        ("trials pruned", str(audit.pruned)),
        ("epochs saved", f"{audit.saved_epochs:,} ({audit.saved_share:.0%} of all without pruning)"),
        ("audited: let run to their end though the pruner wanted to stop them", str(audit.audited)),
        (f"of these among the best {audit.top} (false prunes)", str(len(audit.false_prunes))),
    ]
    if audit.rate is not None and audit.chance is not None:
        interval = f"{percent(audit.rate.share)} ({percent(audit.rate.low)} to {percent(audit.rate.high)})"
        rows.append(("rate of false prunes, 95 % interval", interval))
        rows.append(("the same if the pruner drew lots", percent(audit.chance)))
    yield table("Audit of pruning", ("what", "value"), rows)
    cells = [
        (str(row.epoch), f"{row.spearman:.2f}", str(row.n)) for row in audit.correlation if row.spearman is not None
    ]
    if cells:
        caption = "Spearman's rank correlation of accuracy after an epoch and at the end"
        text = "How well the order of trials after an epoch tells their order at the end: 1 wholly, 0 not at all."
        numbers = table(caption, ("epoch", "correlation", "trials"), cells)
        yield Picture("What an early accuracy is worth", correlation_figure(audit.correlation), text, numbers, 300)
    else:
        yield Text("Too few trials to tell what an early accuracy is worth.")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
