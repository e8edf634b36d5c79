"""A report as one HTML page that needs nothing else: no network, no other file.

Its content security policy forbids every request. Without scripts the text and the tables are all there. The page's
elements are in ``page.html.jinja``, its style in ``page.css``, the code that draws the figures in ``page.js``.
"""

import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from search.report.document import Document, Picture, Table

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

LONG = 40
"""Characters from which a cell is given room to break its lines in."""


MANY = 7
"""Columns beyond which a table has to save room."""


def as_html(report: Document) -> str:
    """The whole file; all text in it is escaped by the template."""
    pages = Environment(
        loader=PackageLoader("search.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    figures: list[str] = []

    def add_figure(picture: Picture) -> str:
        figures.append(_figure(picture))
        return f"figure-{len(figures)}"

    return pages.get_template("page.html.jinja").render(
        report=report,
        figures=figures,
        add_figure=add_figure,
        numeric_columns=_numeric_columns,
        css=_file("page.css"),
        js=_file("page.js"),
        plotly=get_plotlyjs(),
        policy=POLICY,
        long=LONG,
        many=MANY,
    )


def _file(name: str) -> str:
    return (resources.files("search.report") / name).read_text(encoding="utf-8")


def _figure(picture: Picture) -> str:
    """A figure as JSON that cannot end the element that contains it; the page sets its height, title and colours."""
    drawn: dict[str, Any] = json.loads(picture.figure.to_json())
    layout = {
        key: value for key, value in drawn["layout"].items() if key not in ("title", "template", "margin", "height")
    }
    layout["margin"] = {"l": 56, "r": 16, "t": 12, "b": 44}
    layout["legend"] = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "traceorder": "normal",
    }
    text = json.dumps({"data": drawn["data"], "layout": layout}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _numeric_columns(table: Table) -> list[bool]:
    return [all(_is_number(row[column]) for row in table.rows) for column in range(len(table.head))]


def _is_number(cell: str) -> bool:
    """Whether a cell is aligned at its end."""
    return bool(re.fullmatch(r"[+\-\N{MINUS SIGN}]?[\d,.]+( ?(%|points|k|M|G|s|ms))?( \(.*\))?|n/a", cell))
