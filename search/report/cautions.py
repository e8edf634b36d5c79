"""What a reader must know before trusting a report."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from search.attributes import DEVICE, LATENCY
from search.config.settings import TrialSettings, settings_from
from search.config.space import PER_BLOCK, parameter_distributions
from search.console.format import params_text
from search.report.data import ReportData
from search.report.words import STOPPED, counted
from search.study import FALLBACK_WARNING

LEAST_PER_PARAMETER = 10
"""COMPLETE trials for each varied parameter, below which the report says that there are too few: regression's old rule
of ten observations for each variable."""

EDGE = 0.02
"""A real number without steps is on the edge of its range if it is within this share of it."""


def cautions(data: ReportData) -> list[tuple[str, str]]:
    """Title and text of each, the most serious first."""
    return [
        *_fallback(data),
        *_reads(data),
        *_several_devices(data),
        *_other_limits(data),
        *_not_converged(data),
        *_harmful_pruning(data),
        *_edges(data),
        *_too_few(data),
        *(("As the study's summary says", text) for text in data.summary.warnings if text != FALLBACK_WARNING),
    ]


def _fallback(data: ReportData) -> Iterator[tuple[str, str]]:
    if data.record.dataset.fallback:
        yield "Not CIFAR-10", f"{FALLBACK_WARNING}."


def _reads(data: ReportData) -> Iterator[tuple[str, str]]:
    networks = max(1, len(data.retrain.runs)) if data.retrain else 0
    if len(data.reads) > networks:
        whose = sorted({str(read.get("trial")) for read in data.reads})
        text = (
            f"The test images were read {len(data.reads)} times, for {networks} final training(s), of trial "
            f"{' and '.join(whose)}. Whoever chooses between such readings turns the test images into validation "
            "images: the first reading is the honest one."
        )
        yield "Test images read more than once", text


def _several_devices(data: ReportData) -> Iterator[tuple[str, str]]:
    """Latencies that cannot be compared."""
    devices = Counter(str(t.user_attrs.get(DEVICE)) for t in data.complete if LATENCY in t.user_attrs)
    if len(devices) > 1:
        named = "; ".join(f"{name} ({counted(number, 'trial')})" for name, number in devices.most_common())
        text = (
            f"Latencies were measured on {len(devices)} kinds of devices: {named}. They do not compare: a network may "
            "be on the front, or its knee, for the device that it met."
        )
        yield "Latencies of several kinds of devices", text


def _other_limits(data: ReportData) -> Iterator[tuple[str, str]]:
    """A network that was retrained before the limits changed."""
    limits = data.retrain.limits if data.retrain else None
    if limits is None or limits.most == data.aim.limits.most:
        return
    before = limits.text or "none"
    text = (
        f"The network was chosen with these limits: {before}. Since then they were changed to: "
        f"{data.aim.limits.text or 'none'}. `python -m search confirm` and `retrain` bring it up to date, and read the "
        "test images again where another network wins."
    )
    yield "Retrained under other limits", text


def _not_converged(data: ReportData) -> Iterator[tuple[str, str]]:
    done = data.retrain
    if done is None or not done.watched or done.converged:
        return
    stopped = STOPPED.get(str(done.stopped_by), "it was stopped")
    if done.converged is None:
        title, text = "Convergence of the retrain not known", f"No doubling of its length was tried, as {stopped}."
    else:
        title, text = "Retrain not converged", f"The last doubling of its length still paid when {stopped}."
    yield title, f"{text} A longer one may well score higher: raise max_minutes or epochs in [retrain]."


def _harmful_pruning(data: ReportData) -> Iterator[tuple[str, str]]:
    if data.audit and data.audit.harmful:
        yield "Pruning looks harmful", f"The audit says: {data.audit.verdict}."


def _edges(data: ReportData) -> Iterator[tuple[str, str]]:
    winner = data.winner
    if winner is None:
        return
    edges: dict[str, str] = {}
    for name, form in parameter_distributions(data.record.config.space).items():
        edge = edge_of(name, form, winner.params[name]) if name in winner.params else None
        if edge and isinstance(form, IntDistribution | FloatDistribution):
            value = params_text({name: winner.params[name]})
            edges[name] = f"{value} is the {edge} end of {form.low:g} to {form.high:g}"
    if edges:
        text = (
            f"Of trial {winner.number}, {'; '.join(edges.values())}. A better value may lie beyond: widen the range, "
            "under another --name."
        )
        yield f"On the edge of the range: {', '.join(edges)}", text


def edge_of(name: str, form: BaseDistribution, value: float) -> str | None:
    """``low`` or ``high`` if a number is on an end of its range beyond which the setting could go on.

    Args:
        name: of the Optuna parameter.
        form: its range; choices have no ends.
        value: of the trial.
    """
    if not isinstance(form, IntDistribution | FloatDistribution) or form.single():
        return None
    low, high, at = (math.log(x) if form.log else float(x) for x in (form.low, form.high, value))
    on_grid = isinstance(form, IntDistribution) or form.step is not None
    near = 1e-9 * max(abs(low), abs(high)) if on_grid else EDGE * (high - low)
    edge = "low" if at - low <= near else "high" if high - at <= near else None
    return edge if edge and _goes_on(name, form, edge) else None


def _goes_on(name: str, form: IntDistribution | FloatDistribution, edge: str) -> bool:
    """Whether a value beyond the edge would be valid: an augmentation strength ends at 1."""
    if isinstance(form, FloatDistribution) and form.log:
        beyond = form.low / 1.01 if edge == "low" else form.high * 1.01
    else:
        step = form.step or (form.high - form.low) / 100
        beyond = form.low - step if edge == "low" else form.high + step
    key = name if name in TrialSettings.model_fields else PER_BLOCK
    try:
        settings_from({key: (beyond,) if key == PER_BLOCK else beyond})
    except ValidationError:
        return False
    return True


def _too_few(data: ReportData) -> Iterator[tuple[str, str]]:
    varied = _varied(parameter_distributions(data.record.config.space))
    complete, least = len(data.complete), LEAST_PER_PARAMETER * varied
    if 0 < complete < least:
        text = (
            f"{complete} trials ran to their end; {least} would be {LEAST_PER_PARAMETER} for each of the {varied} "
            "parameters that are varied. Take importances and slices for impressions, and the best "
            "configuration for a good one rather than the best."
        )
        yield "Too few trials to tell which settings matter", text


def _varied(forms: Mapping[str, BaseDistribution]) -> int:
    """Parameters that can differ; the widths of all blocks count as one."""
    named = {name if name in TrialSettings.model_fields else PER_BLOCK for name, f in forms.items() if not f.single()}
    return len(named)
