"""Whether pruning pays: what it saved, and how often it would have stopped one of the best.

The pruner lets a random few of the trials that it wants to stop run to their end. Their attribute `WOULD_STOP` says
after which epoch it wanted to; they are *audited*. An audited trial is a *false prune* where it ends among the best
``top`` of all COMPLETE trials, ``top`` being the number of configurations that the confirmation takes: had it been
stopped, a configuration would be missing there. Pruned trials have no final accuracy and are not ranked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial
from scipy import stats

from search.analysis.outcomes import end_accuracy, number, outcome, validation_curve
from search.attributes import CONFIG, FAULT, WOULD_STOP
from search.config.objective import score

LEAST_AUDITED = 10
"""With fewer audited trials only a clear harm is called one: of ten without a false prune, up to 31 % may be."""

LEAST_CORRELATED = 5
"""Trials below which a rank correlation is not told."""


def pruning_audit(trials: Sequence[FrozenTrial], top: int) -> dict[str, Any] | None:
    """What pruning saved and what it would have cost; None before any trial ran to its end or was pruned.

    Args:
        trials: of the search.
        top: configurations that the confirmation takes.

    Returns:
        ``audited``, ``false_prunes`` (trial numbers), ``top``; ``rate`` of false prunes with its exact 95 % interval
        ``low``, ``high`` (Clopper-Pearson), all None where none was audited; ``chance``: the rate of a pruner that
        draws lots; ``pruned`` trials, ``saved_epochs`` and ``saved_share`` of the epochs that these and the COMPLETE
        trials would have trained without pruning; ``correlation``: Spearman's, of the accuracies after each epoch and
        at the end, over COMPLETE trials; ``verdict`` in words and ``harmful``, which is None where nobody can tell.
    """
    complete = [t for t in trials if end_accuracy(t) is not None]
    # Infeasible and diverged trials were not the pruner's.
    pruned = [t for t in trials if outcome(t) == "pruned" and FAULT not in t.user_attrs]
    if not complete and not pruned:
        return None
    best = {t.number for t in sorted(complete, key=lambda t: (-(score(t) or 0.0), t.number))[:top]}
    audited = [t for t in complete if t.user_attrs.get(WOULD_STOP) is not None]
    false_prunes = [t.number for t in audited if t.number in best]
    longest = max((epoch for t in trials for epoch in validation_curve(t)), default=0)
    saved = sum(max(0, _length(t, longest) - max(validation_curve(t), default=0)) for t in pruned)
    whole = sum(_length(t, longest) for t in (*complete, *pruned))
    rate = _rate(len(false_prunes), len(audited))
    chance = len(best) / len(complete) if complete else None
    harmful = _harmful(len(audited), rate, chance)
    return {
        "audited": len(audited),
        "false_prunes": false_prunes,
        "top": top,
        **rate,
        "chance": chance,
        "pruned": len(pruned),
        "saved_epochs": saved,
        "saved_share": saved / whole if whole else 0.0,
        "correlation": _correlation(complete),
        "harmful": harmful,
        "verdict": _verdict(harmful, bool(pruned or audited), len(audited), len(false_prunes), top),
    }


def _length(trial: FrozenTrial, longest: int) -> int:
    """Epochs that a trial was to train: as its configuration says, else as the longest trial trained."""
    config = trial.user_attrs.get(CONFIG)
    planned = number(config.get("fit", {}).get("epochs")) if isinstance(config, Mapping) else None
    return longest if planned is None else int(planned)


def _rate(false_prunes: int, audited: int) -> dict[str, float | None]:
    if not audited:
        return {"rate": None, "low": None, "high": None}
    interval = stats.binomtest(false_prunes, audited).proportion_ci(0.95, method="exact")
    return {"rate": false_prunes / audited, "low": float(interval.low), "high": float(interval.high)}


def _harmful(audited: int, rate: Mapping[str, float | None], chance: float | None) -> bool | None:
    """Whether the pruner stops the best no more rarely than one that draws lots; None where nobody can tell."""
    if rate["rate"] is None or rate["low"] is None or chance is None or chance > 0.5:
        return None  # where most complete trials are among the best, being one says nothing
    if audited < LEAST_AUDITED:
        return True if rate["low"] > chance else None
    return rate["rate"] > 0 and rate["rate"] >= chance


def _verdict(harmful: bool | None, stopping: bool, audited: int, false_prunes: int, top: int) -> str:
    if not stopping:
        return "nothing was pruned"
    if harmful is None:
        return "too few audited trials to tell"
    if not harmful:
        return "pruning looks harmless"
    ended = f"{false_prunes} of {audited} trials that it wanted to stop ended among the best {top}"
    return f"pruning looks harmful: {ended}, no fewer than drawing lots would give; prune later or not at all"


def _correlation(complete: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """For each epoch before the last one: Spearman's correlation with the final accuracy, None where there is none."""
    curves = [(validation_curve(trial), float(score(trial) or 0.0)) for trial in complete]
    last = max((epoch for curve, _ in curves for epoch in curve), default=0)
    rows = []
    for epoch in sorted({epoch for curve, _ in curves for epoch in curve if epoch < last}):
        pairs = [(curve[epoch], final) for curve, final in curves if epoch in curve]
        early, final = ([pair[i] for pair in pairs] for i in (0, 1))
        told = len(pairs) >= LEAST_CORRELATED and len(set(early)) > 1 and len(set(final)) > 1
        spearman = float(stats.spearmanr(early, final).statistic) if told else None
        rows.append({"epoch": epoch, "spearman": spearman, "n": len(pairs)})
    return rows
