"""The report of a study: ``report.html``, one page that needs nothing else, and ``report.md``.

`collect` is the only part that reads anything; `search.report.content` makes a document of it (words, tables, figures),
`search.report.page` and `search.report.markdown` write that down.
"""

from pathlib import Path

import optuna

from data.files import write_whole
from search.events import Budget
from search.report.content import document
from search.report.data import ReportData, collect
from search.report.markdown import as_markdown
from search.report.page import as_html
from search.results import Confirmation, RetrainResult
from search.study import StudyRecord
from search.summary import Summary

__all__ = ["ReportData", "collect", "render", "write_report"]


def write_report(
    out: Path,
    study: optuna.Study,
    record: StudyRecord,
    count: Budget,
    confirmation: Confirmation | None,
    retrain: RetrainResult | None,
    summary: Summary,
    storage_shown: str,
) -> list[Path]:
    """Write a study's report, at whatever point it stands.

    Args:
        out: the folder of the study's outputs; made where it is not there.
        study: which.
        record: what is stored of its definition and its images.
        count: its budget (`search.ledger.budget.count_budget`).
        confirmation: summed up by `search.finale.confirm`; None where there is none.
        retrain: None before it is done.
        summary: of the study.
        storage_shown: the storage's URL without a password.

    Returns:
        the two files.

    Raises:
        OSError: they cannot be written; earlier ones are left as they were.
    """
    files = render(collect(study, record, count, confirmation, retrain, summary, storage_shown))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(out / name, text)
    return [out / name for name in files]


def render(data: ReportData) -> dict[str, str]:
    """The files' contents by name: the same data gives the same text."""
    told = document(data)
    return {"report.html": as_html(told), "report.md": as_markdown(told)}
