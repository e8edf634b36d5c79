"""Numbers, times and results, formatted for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from search.analysis.forecast import Forecast
from search.analysis.starts import StartValue
from search.config.objective import format_cost
from search.events import Best
from search.results import AccuracyEstimate, Confirmation
from search.summary import Front


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``7 min 5 s``, ``3 h 10 min``."""
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
    """Optuna's parameters as ``name value`` pairs, numbers short."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def forecast_texts(forecast: Forecast) -> list[str]:
    """What is expected of a search, a sentence each; empty if nothing is known."""
    texts = []
    if forecast.eta_seconds is not None:
        texts.append(f"the search is done in about {duration(forecast.eta_seconds)}")
    if gain := forecast.gain:
        low, high = (f"{100 * bound:.2f}" for bound in (gain.low, gain.high))
        text = f"{gain.more} more trials: {100 * gain.mean:+.2f} points expected (90 % interval {low} to {high})"
        texts.append(f"{text}; more trials are unlikely to help" if gain.unlikely else text)
    if noise := forecast.noise:
        texts.append(f"another seed moves a score by {100 * noise.std:.2f} points (standard deviation)")
    return texts


def known_good_text(value: StartValue) -> str:
    """What the configurations that a study tried first were worth."""
    text = f"tried first: the best has {percent(value.best)}, rank {value.rank} of {value.complete} now"
    if value.drawn_best is None:
        return text
    verdict = "it helped" if value.helped else "it did not help"
    return f"{text}; {verdict}: the best of {value.drawn} drawn without has {percent(value.drawn_best)}"


def device_time_text(forecast: Forecast) -> str:
    """Device time by outcome of the trials."""
    spent = forecast.device_seconds
    parts = [f"{outcome} {duration(seconds)}" for outcome, seconds in spent.items() if seconds]
    return f"{duration(sum(spent.values()))} ({', '.join(parts)})"


def front_text(front: Front, most: int) -> str:
    """At most this many points of a front, cheapest first, with its two ends."""
    count = len(front.points)
    shown = front.points
    if count > most:
        shown = tuple(front.points[round(step * (count - 1) / (most - 1))] for step in range(most))
    texts = [f"{percent(point.val_accuracy)} at {format_cost(front.cost, point.cost)}" for point in shown]
    of = f"{len(shown)} of {count}" if len(shown) < count else str(count)
    return f"{of} point{'s' if count > 1 else ''}: {', '.join(texts)}"


def trials_text(numbers: Sequence[int]) -> str:
    """Trials by their numbers."""
    names = [str(trial) for trial in numbers]
    return f"trial {names[0]}" if len(names) == 1 else f"trials {', '.join(names[:-1])} and {names[-1]}"


def test_text(test: AccuracyEstimate, reads: int) -> str:
    """A test accuracy with its spread, and how often the test images were read for it."""
    bounds = [percent(bound) for bound in (test.low, test.high) if bound is not None]  # early versions stored none
    interval = f"95 % interval {' to '.join(bounds)}" if bounds else "interval not known"
    if test.std is None:
        return f"{percent(test.mean)} (one seed; {interval} by the number of images; test images read {_times(reads)})"
    spread = f"{percent(test.mean)} ± {100 * test.std:.2f}"
    return f"{spread} over {test.n} seeds ({interval}; test images read {_times(reads)}, once a seed)"


def confirmation_text(confirmed: Confirmation) -> str:
    """How a confirmation ended, or how far it is."""
    if confirmed.done < confirmed.runs or confirmed.winner is None:
        return f"{confirmed.done} of {confirmed.runs} trainings done"
    winner = next(row for row in confirmed.configurations if row.trial == confirmed.winner)
    assert winner.mean is not None  # as it has won
    spread = f" ± {100 * winner.std:.2f}" if winner.std is not None else ""
    text = f"trial {winner.trial}, {percent(winner.mean)}{spread} over {winner.n} seeds"
    if confirmed.tie:
        others = [str(number) for number in confirmed.tied if number != winner.trial]
        text += f", a tie with trial{'s' if len(others) > 1 else ''} {', '.join(others)}, of which it is the cheapest"
    if optimism := confirmed.optimism:
        score = {"knee": "its score in", "limit": "the best score within the limit in"}.get(
            confirmed.chosen_by, "the best score of"
        )
        text += f"; {score} the search flattered its configuration by {100 * optimism.difference:+.2f} points"
    return text


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
