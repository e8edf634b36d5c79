"""What a report says, pure: from collected data to a document, the answer first."""

from collections.abc import Iterator, Sequence

from search.config.objective import COST_LABELS, LATENCY_BATCH, score
from search.console.format import percent
from search.report.cautions import cautions
from search.report.data import ReportData
from search.report.document import Answer, Document, Items, Section, Text
from search.report.finale import classes, confirmation, cost, retrain
from search.report.origin import baselines, repetition
from search.report.trials import history, parameters, pareto, pruning, time_spent
from search.report.words import configuration_words, stage
from search.results import AccuracyEstimate


def document(data: ReportData) -> Document:
    """The whole report; a section that has nothing to report yet says so in a sentence."""
    warnings = cautions(data)
    return Document(
        title=data.record.name,
        subtitle=_subtitle(data),
        answer=_answer(data, [title for title, _ in warnings]),
        sections=(
            Section("confirmation", "Confirmation over fresh seeds", tuple(confirmation(data))),
            Section("retrain", "Retrain", tuple(retrain(data))),
            Section("classes", "Test accuracy by class", tuple(classes(data))),
            Section("cost", "Calibration, size and speed", tuple(cost(data))),
            Section("search", "The search", tuple(history(data))),
            Section("parameters", "Parameters", tuple(parameters(data))),
            Section("pareto", "Accuracy and cost", tuple(pareto(data))),
            Section("time", "Budget, workers and time", tuple(time_spent(data))),
            Section("pruning", "Pruning", tuple(pruning(data))),
            Section("warnings", "Warnings", (Items(tuple(warnings)) if warnings else Text("None."),)),
            Section("baselines", "Beside known networks", tuple(baselines(data))),
            Section("repeat", "To repeat it", tuple(repetition(data))),
        ),
    )


def _subtitle(data: ReportData) -> str:
    parts = [
        data.record.config.description.rstrip("."),
        data.record.dataset.name,
        f"{data.count.done} of {data.count.requested} configurations done",
        f"{data.written:%Y-%m-%d %H:%M %Z}".rstrip(),
    ]
    return " · ".join(part for part in parts if part)


def _answer(data: ReportData, told: Sequence[str]) -> Answer:
    sentences = [*_asked(data), *_winner(data), *_optimism(data)]
    if data.retrain is not None:
        tested = data.retrain.test_accuracy
        return Answer("Test accuracy", percent(tested.mean), _interval(tested), tuple(sentences), tuple(told))
    best = next(iter(data.complete), None)
    if best is not None:
        sentences.insert(
            0,
            f"Best validation accuracy so far: {percent(score(best) or 0.0)} (trial {best.number}). It was chosen for "
            "being the highest, so it flatters; a test accuracy comes from fresh trainings and images never chosen on.",
        )
    return Answer("Test accuracy", "not tested yet", stage(data), tuple(sentences), tuple(told))


def _interval(tested: AccuracyEstimate) -> str:
    low, high = tested.low, tested.high
    known = "" if low is None or high is None else f", 95 % interval {percent(low)} to {percent(high)}"
    if tested.n > 1:
        return f"mean of {tested.n} seeds{known}"
    # Another interval than that of several seeds: see `search.finale.test.accuracy_estimate`.
    over_images = " for this network over other such images" if known else ""
    return f"one seed{known}{over_images}; how much another seed would differ is not known"


def _asked(data: ReportData) -> Iterator[str]:
    """What the search was for."""
    limits, cost = data.aim.limits.text, data.aim.cost
    if cost is None:
        yield f"Searched for: validation accuracy{f', with {limits}' if limits else ''}."
        return
    of = f" (a forward pass of {LATENCY_BATCH} image)" if cost == "latency" else ""
    taken = f"taken is {data.aim.text}"
    yield f"Searched for: validation accuracy against {COST_LABELS[cost]}{of}, both at once (a Pareto search); {taken}."


def _winner(data: ReportData) -> Iterator[str]:
    winner = data.winner
    if winner is None:
        some = f" with {data.aim.limits.text}" if data.complete else ""
        yield f"No configuration{some} has run to its end."
        return
    if data.retrain:
        name = "The network"
    else:
        confirmed = data.confirmation is not None and data.confirmation.winner is not None
        name = "Winner of the confirmation" if confirmed else _so_far(data)
    yield f"{name}: trial {winner.number}, {configuration_words(winner)}."


def _so_far(data: ReportData) -> str:
    return {"accuracy": "Best so far", "knee": "Knee of the front so far", "limit": "Best within the limit so far"}[
        data.aim.rule
    ]


def _optimism(data: ReportData) -> Iterator[str]:
    optimism = data.confirmation.optimism if data.confirmation else None
    if optimism:
        name = {"accuracy": "best trial", "knee": "knee", "limit": "best trial within the limit"}[data.aim.rule]
        yield (
            f"The search's optimism: its {name} ({optimism.trial}) scored {percent(optimism.score)}; over "
            f"fresh seeds the same configuration reaches {percent(optimism.confirmed)}, "
            f"{abs(100 * optimism.difference):.2f} points {'less' if optimism.difference >= 0 else 'more'}."
        )
