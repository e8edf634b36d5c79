"""Numbers, times and results as a person reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from search.config.objective import COST_ATTRIBUTES, format_cost
from search.events import Best


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
        f"{percent(row['val_accuracy'])} at {format_cost(cost, row[cost])}"
        for row in kept
        for cost in COST_ATTRIBUTES
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


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
