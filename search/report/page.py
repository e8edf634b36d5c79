"""A report as one HTML page that needs nothing else: no network, no other file.

Its content security policy forbids every request. Without scripts the text and the tables are all there.
"""

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from search.report.document import Answer, Block, Code, Document, Items, Picture, Pictures, Section, Table, Text

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

LONG = 40
"""Characters from which a cell is given room to break its lines in."""


MANY = 7
"""Columns beyond which a table has to save room."""


def as_html(report: Document) -> str:
    """The whole file."""
    figures: list[str] = []
    body = "\n".join(_body(report, figures))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}: {escape(report.answer.value)}</title>",
            f"<style>\n{_file('page.css')}</style>",
            "</head>",
            "<body>",
            body,
            *figures,
            *([f"<script>{get_plotlyjs()}</script>", f"<script>\n{_file('page.js')}</script>"] if figures else []),
            "</body>",
            "</html>\n",
        ]
    )


def _file(name: str) -> str:
    return (resources.files("search.report") / name).read_text(encoding="utf-8")


def _body(report: Document, figures: list[str]) -> Iterator[str]:
    yield "<header>"
    yield f"<h1>{escape(report.title)}</h1>"
    yield f'<p class="subtitle">{escape(report.subtitle)}</p>'
    links = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in report.sections)
    yield f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    yield "</header>"
    yield "<main>"
    yield _answer(report.answer)
    for section in report.sections:
        yield from _section(section, figures)
    yield "</main>"
    if figures:
        yield "<noscript><p>The figures need JavaScript; all text and tables are here without it.</p></noscript>"


def _answer(answer: Answer) -> str:
    size = "value" if re.match(r"\d", answer.value) else "value words"
    parts = [
        f"<h2>{escape(answer.label)}</h2>",
        f'<p class="{size}">{escape(answer.value)}</p>',
        f'<p class="detail">{escape(answer.detail)}</p>',
        *(f"<p>{escape(sentence)}</p>" for sentence in answer.sentences),
    ]
    if answer.warnings:
        titles = "; ".join(escape(title) for title in answer.warnings)
        parts.append(f'<p class="cautions"><a href="#warnings"><strong>Warnings</strong></a>: {titles}.</p>')
    return f'<section class="answer">{"".join(parts)}</section>'


def _section(section: Section, figures: list[str]) -> Iterator[str]:
    yield f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
    yield f'<h2 id="{section.name}-title">{escape(section.title)}</h2>'
    for block in section.blocks:
        yield _block(block, figures)
    yield "</section>"


def _block(block: Block, figures: list[str]) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Items(items):
            return f"<dl>{''.join(f'<dt>{escape(title)}</dt><dd>{escape(text)}</dd>' for title, text in items)}</dl>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block, figures)
        case Pictures(pictures, small):
            inner = "\n".join(_picture(picture, figures) for picture in pictures)
            return f'<div class="pictures{" small" if small else ""}">{inner}</div>'
        case Code(title, text, _):
            return f'<h3>{escape(title)}</h3><pre tabindex="0"><code>{escape(text)}</code></pre>'


def _picture(picture: Picture, figures: list[str]) -> str:
    name = f"figure-{len(figures) + 1}"
    figures.append(f'<script type="application/json" id="{name}">{_figure(picture)}</script>')
    text = f"<p>{escape(picture.text)}</p>" if picture.text else ""
    numbers = ""
    if picture.numbers:
        numbers = f"<details><summary>The numbers as a table</summary>{_table(picture.numbers)}</details>"
    return (
        f"<figure><figcaption><h3>{escape(picture.title)}</h3>{text}</figcaption>"
        f'<div class="plot" data-figure="{name}" role="img" aria-label="{escape(picture.title)}" '
        f'style="height:{picture.height}px"></div>{numbers}</figure>'
    )


def _figure(picture: Picture) -> str:
    """A figure as JSON that cannot end the element it stands in; the page sets its height, title and colours."""
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


def _table(table: Table) -> str:
    numeric = [all(_is_number(row[column]) for row in table.rows) for column in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{_class("number" if number else "")}>{escape(cell)}</th>'
        for cell, number in zip(table.head, numeric, strict=True)
    )
    rows = "".join(
        f"<tr{_class('strong' if index in table.strong else '')}>{_cells(row, numeric)}</tr>"
        for index, row in enumerate(table.rows)
    )
    kind = _class("pairs" if len(table.head) == 2 else "many" if len(table.head) > MANY else "")
    # Scrolls by itself, also with the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.caption)}"><table{kind}>'
        f"<caption><span>{escape(table.caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cells(row: Sequence[str], numeric: Sequence[bool]) -> str:
    kinds = (
        "number" if number else "long" if len(cell) >= LONG else "" for cell, number in zip(row, numeric, strict=True)
    )
    return "".join(f"<td{_class(kind)}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _is_number(cell: str) -> bool:
    """Whether a cell is to be aligned with others at its end."""
    return bool(re.fullmatch(r"[+\-\N{MINUS SIGN}]?[\d,.]+( ?(%|points|k|M|G|s|ms))?( \(.*\))?|n/a", cell))
