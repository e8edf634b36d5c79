"""The report of a study: ``report.html``, one page that needs nothing else, and ``report.md``.

`collect` is the only part that reads anything; `search.report.content` makes a document of it (words, tables, figures),
`search.report.page` and `search.report.markdown` write the document.
"""

from pathlib import Path

from data.files import write_whole
from search.report.content import document
from search.report.data import ReportData, collect
from search.report.markdown import as_markdown
from search.report.page import as_html

__all__ = ["ReportData", "collect", "render", "write_report"]


def write_report(out: Path, data: ReportData) -> list[Path]:
    """Write a study's report, at any point of the study.

    Args:
        out: the folder of the study's outputs; created if it does not exist.
        data: from `collect`.

    Returns:
        the two files.

    Raises:
        OSError: they cannot be written; earlier ones are unchanged.
    """
    files = render(data)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(out / name, text)
    return [out / name for name in files]


def render(data: ReportData) -> dict[str, str]:
    """The files' contents by name: the same data gives the same text."""
    report = document(data)
    return {"report.html": as_html(report), "report.md": as_markdown(report)}
