"""The graphs that optuna-dashboard shows for a study."""

import hashlib
from collections.abc import Callable, Mapping

import optuna
import plotly.graph_objects as go
from optuna_dashboard import save_plotly_graph_object
from optuna_dashboard._custom_plot_data import SYSTEM_ATTR_PLOT_DATA, split_plot_data

from search.report.finale_figures import confirmation_figure, retrain_accuracy_figure, retrain_loss_figure
from search.results import Confirmation, RetrainResult


def finale_figures(confirmation: Confirmation | None, retrain: RetrainResult | None) -> dict[str, go.Figure]:
    """The finale's graphs, except empty ones."""
    figures = {}
    if confirmation:
        figures["search-confirmation"] = confirmation_figure(confirmation)
    if retrain:
        figures["search-retrain-accuracy"] = retrain_accuracy_figure(retrain)
        figures["search-retrain-loss"] = retrain_loss_figure(retrain)
    return {name: figure for name, figure in figures.items() if figure.data and any(trace.x for trace in figure.data)}


def save_graphs(
    study: optuna.Study,
    figures: Mapping[str, go.Figure],
    digests: dict[str, list[str]],
    store_digests: Callable[[], None],
) -> None:
    """Store graphs piece by piece; only pieces that have changed are written.

    Args:
        study: shows the graphs.
        figures: the graphs by name.
        digests: of every stored graph's pieces, by name; updated in place.
        store_digests: stores the digests.
    """
    pieces = {name: split_plot_data(figure.to_json(), _graph_key(name)) for name, figure in figures.items()}
    changed = [name for name in figures if digests.get(name) != _digests(pieces[name])]
    if not changed:
        return
    known = {name: digests.pop(name, None) for name in changed}
    # Forget the digests while pieces are replaced: after a crash all pieces are written.
    store_digests()
    for name in changed:
        _save_graph(study, name, figures[name], pieces[name], known[name])
        digests[name] = _digests(pieces[name])


def _save_graph(
    study: optuna.Study, name: str, figure: go.Figure, pieces: Mapping[str, str], known: list[str] | None
) -> None:
    if known is None:
        save_plotly_graph_object(study, figure, graph_object_id=name)
        return
    for index, (key, piece) in enumerate(pieces.items()):
        if index >= len(known) or known[index] != digest(piece):
            study._storage.set_study_system_attr(study._study_id, key, piece)
    for index in range(len(pieces), len(known)):
        # Blank it, as the dashboard does: an attribute cannot be deleted.
        study._storage.set_study_system_attr(study._study_id, f"{_graph_key(name)}{index}", "")


def _graph_key(name: str) -> str:
    return f"{SYSTEM_ATTR_PLOT_DATA}{name}:"


def _digests(pieces: Mapping[str, str]) -> list[str]:
    return [digest(piece) for piece in pieces.values()]


def digest(text: str) -> str:
    """A short SHA-256 of a text, to see whether it has changed."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
