"""Whether pruning pays: what it saved, and how often it would have stopped one of the best.

The pruner lets a random few of the trials that it wants to stop run to their end. They are *audited*: their attribute
`WOULD_STOP` says after which epoch it wanted to stop them. An audited trial is a *false prune* if it ends among the
best ``top`` of all COMPLETE trials. ``top`` is the number of configurations that the confirmation takes: with the
trial stopped, one of them would be missing there. Pruned trials have no final accuracy and are not ranked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial
from scipy import stats

from search.analysis.outcomes import end_accuracy, number, outcome, validation_curve
from search.attributes import CONFIG, FAULT, WOULD_STOP
from search.config.objective import score

LEAST_AUDITED = 10
"""With fewer audited trials only a clear harm is called harm: if none of ten is a false prune, up to 31 % may be."""

LEAST_CORRELATED = 5
"""Trials that a rank correlation needs."""


@dataclass(frozen=True)
class FalsePruneRate:
    """Share of the audited trials that are false prunes, with its exact 95 % interval (Clopper-Pearson)."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class RankCorrelation:
    """How well the order of trials after an epoch predicts their order at the end.

    Attributes:
        epoch: after which.
        spearman: rank correlation of accuracies, over COMPLETE trials; None if too few trials or values differ.
        n: trials.
    """

    epoch: int
    spearman: float | None
    n: int


@dataclass(frozen=True)
class PruningAudit:
    """What pruning saved and what it would have cost.

    Attributes:
        audited: number of audited trials.
        false_prunes: numbers of the trials that are.
        top: configurations that the confirmation takes.
        rate: of false prunes; None if no trial was audited.
        chance: the rate of a pruner that draws lots; None if no trial ran to its end.
        pruned: number of pruned trials.
        saved_epochs: that pruned trials did not train.
        saved_share: of the epochs that pruned and COMPLETE trials would have trained without pruning.
        correlation: for each epoch before the last one.
        harmful: whether pruning stops the best; None if it cannot be known.
        verdict: the same in words.
    """

    audited: int
    false_prunes: tuple[int, ...]
    top: int
    rate: FalsePruneRate | None
    chance: float | None
    pruned: int
    saved_epochs: int
    saved_share: float
    correlation: tuple[RankCorrelation, ...]
    harmful: bool | None
    verdict: str


def pruning_audit(trials: Sequence[FrozenTrial], top: int) -> PruningAudit | None:
    """What pruning saved and what it would have cost; None before any trial ran to its end or was pruned.

    Args:
        trials: of the search.
        top: configurations that the confirmation takes.
    """
    complete = [t for t in trials if end_accuracy(t) is not None]
    # The pruner did not stop infeasible and diverged trials.
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
    return PruningAudit(
        audited=len(audited),
        false_prunes=tuple(false_prunes),
        top=top,
        rate=rate,
        chance=chance,
        pruned=len(pruned),
        saved_epochs=saved,
        saved_share=saved / whole if whole else 0.0,
        correlation=tuple(_correlation(complete)),
        harmful=harmful,
        verdict=_verdict(harmful, bool(pruned or audited), len(audited), len(false_prunes), top),
    )


def _length(trial: FrozenTrial, longest: int) -> int:
    """Epochs that a trial was to train: as its configuration says, else as the longest trial trained."""
    config = trial.user_attrs.get(CONFIG)
    planned = number(config.get("fit", {}).get("epochs")) if isinstance(config, Mapping) else None
    return longest if planned is None else int(planned)


def _rate(false_prunes: int, audited: int) -> FalsePruneRate | None:
    if not audited:
        return None
    interval = stats.binomtest(false_prunes, audited).proportion_ci(0.95, method="exact")
    return FalsePruneRate(false_prunes / audited, float(interval.low), float(interval.high))


def _harmful(audited: int, rate: FalsePruneRate | None, chance: float | None) -> bool | None:
    """Whether the pruner stops the best at least as often as one that draws lots; None if it cannot be known."""
    if rate is None or chance is None or chance > 0.5:
        return None  # if most complete trials are among the best, being one says nothing
    if audited < LEAST_AUDITED:
        return True if rate.low > chance else None
    return rate.share > 0 and rate.share >= chance


def _verdict(harmful: bool | None, stopping: bool, audited: int, false_prunes: int, top: int) -> str:
    if not stopping:
        return "nothing was pruned"
    if harmful is None:
        return "too few audited trials to tell"
    if not harmful:
        return "pruning looks harmless"
    ended = f"{false_prunes} of {audited} trials that it wanted to stop ended among the best {top}"
    return f"pruning looks harmful: {ended}, no fewer than drawing lots would give; prune later or not at all"


def _correlation(complete: Sequence[FrozenTrial]) -> list[RankCorrelation]:
    curves = [(validation_curve(trial), float(score(trial) or 0.0)) for trial in complete]
    last = max((epoch for curve, _ in curves for epoch in curve), default=0)
    rows = []
    for epoch in sorted({epoch for curve, _ in curves for epoch in curve if epoch < last}):
        pairs = [(curve[epoch], final) for curve, final in curves if epoch in curve]
        early, final = ([pair[i] for pair in pairs] for i in (0, 1))
        defined = len(pairs) >= LEAST_CORRELATED and len(set(early)) > 1 and len(set(final)) > 1
        spearman = float(stats.spearmanr(early, final).statistic) if defined else None
        rows.append(RankCorrelation(epoch, spearman, len(pairs)))
    return rows
