"""Words and cells of tables: how numbers are written."""

from collections.abc import Mapping

from optuna.trial import FrozenTrial

from search.analysis.outcomes import number
from search.attributes import CONFIG, PARAMETERS
from search.config.objective import format_cost
from search.console.format import duration, params_text, percent
from search.report.data import ReportData

NAMES = {
    "relu": "ReLU",
    "leaky_relu": "LeakyReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "muon": "Muon",
    "sgd": "SGD",
    "adamw": "AdamW",
}
"""Settings that people spell differently."""

STOPPED = {"time": "the study's minutes were up", "max epochs": "no more epochs were allowed"}
"""Why nothing longer was tried although it might have helped."""

NONE = "n/a"
"""Shown if a value is not known."""


def signed(share: float, digits: int = 2) -> str:
    """A difference of two accuracies in percentage points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def points_text(share: float) -> str:
    """`signed`, with its unit."""
    return f"{signed(share)} points"


def counted(value: int, noun: str) -> str:
    """A number with its noun."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def configuration_words(trial: FrozenTrial) -> str:
    """A trial's network and training in words; its parameters if the configuration was not stored."""
    config = trial.user_attrs.get(CONFIG)
    parameters = number(trial.user_attrs.get(PARAMETERS))
    size = "" if parameters is None else f", {parameters:,.0f} parameters"
    if not isinstance(config, Mapping) or not {"network", "fit"} <= config.keys() or "widths" not in config["network"]:
        return params_text(trial.params) + size
    network, fit = config["network"], config["fit"]
    activation = str(network.get("activation", "activation unknown"))
    widths, pooled = network["widths"], sum(map(bool, network.get("pooled", ())))
    training = {
        "optimizer": "{}",
        "lr": "learning rate {:.4g}",
        "batch_size": "batches of {}",
        "augment": "augmentation strength {:.3g}",
        "epochs": "{} epochs in the search",
    }
    return (
        f"{counted(len(widths), 'block')} of {counted(network.get('convs', 1), 'parallel convolution')}, "
        f"{' → '.join(map(str, widths))} channels, {pooled} of the blocks pooled, "
        f"{NAMES.get(activation, activation)}{size}; "
        + ", ".join(words.format(NAMES.get(fit[key], fit[key])) for key, words in training.items() if key in fit)
    )


def stage(data: ReportData) -> str:
    """How far a study without a test accuracy is."""
    count, confirmation, progress = data.count, data.confirmation, data.progress
    if progress:
        text = f"running: the retrain, {progress.what}, epoch {progress.epoch} of {progress.epochs}"
        return f"{text}, about {duration(progress.eta_seconds)} left"
    if confirmation and confirmation.done < confirmation.runs:
        return f"running: {confirmation.done} of {confirmation.runs} confirmation runs done"
    if not data.trials:
        return "empty: no trial has begun"
    if count.remaining:
        at_work = f"{count.running} under way" if count.running else "none under way"
        return f"running: {count.done} of {count.requested} configurations done, {at_work}"
    return "the search is done" + (" and confirmed" if confirmation else "") + "; nothing was retrained yet"


def with_interval(middle: float, low: float, high: float, digits: int = 2) -> str:
    """A difference with its 95 % interval, in percentage points."""
    return f"{signed(middle, digits)} ({signed(low, digits)} to {signed(high, digits)})"


def share_cell(value: object) -> str:
    """A share as a percentage."""
    share = number(value)
    return NONE if share is None else percent(share)


def whole_cell(value: object) -> str:
    """A count."""
    finite = number(value)
    return NONE if finite is None else f"{finite:,.0f}"


def real_cell(value: object) -> str:
    """A loss."""
    finite = number(value)
    return NONE if finite is None else f"{finite:.4f}"


def time_cell(value: object) -> str:
    """Seconds, as a person says them."""
    finite = number(value)
    return NONE if finite is None else duration(finite)


def latency_cell(value: object) -> str:
    """Seconds of a forward pass."""
    finite = number(value)
    return NONE if finite is None else format_cost("latency", finite)


def flops_cell(value: object) -> str:
    """A large number of operations, short."""
    finite = number(value)
    if finite is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if finite >= size:
            return f"{finite / size:.3g} {unit}"
    return f"{finite:.0f}"
