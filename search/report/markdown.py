"""A report as GitHub's Markdown: the same text and tables, without pictures."""

import re
from collections.abc import Iterator

from search.report.document import Code, ContentBlock, Document, Items, Picture, Pictures, Section, Table, Text


def as_markdown(report: Document) -> str:
    """The whole text, which ends with a newline."""
    answer = report.answer
    lines = [
        f"# {_plain(report.title)}",
        _paragraph(report.subtitle),
        f"## {_plain(answer.label)}: {_plain(answer.value)}",
        _paragraph(answer.detail),
        *map(_paragraph, answer.sentences),
    ]
    if answer.warnings:
        lines.append(f"**Warnings**: {_plain('; '.join(answer.warnings))}. They are told in full below.")
    for section in report.sections:
        lines += _section(section)
    return "\n\n".join(line for line in lines if line) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_plain(section.title)}"
    for block in section.blocks:
        yield from _block(block)


def _block(block: ContentBlock) -> Iterator[str]:
    match block:
        case Text(text):
            yield _paragraph(text)
        case Items(items):
            yield "\n".join(f"- **{_plain(title)}**: {_plain(text)}" for title, text in items)
        case Table():
            yield from _table(block)
        case Picture(numbers=Table() as numbers):
            yield from _table(numbers)
        case Picture():
            pass
        case Pictures(pictures):
            for picture in pictures:
                yield from _block(picture)
        case Code(title, text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            yield f"{_plain(title)}:\n\n{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(table: Table) -> Iterator[str]:
    rows = [
        "| " + " | ".join(f"**{_plain(cell)}**" if strong and cell.strip() else _plain(cell) for cell in row) + " |"
        for row, strong in ((row, index in table.strong) for index, row in enumerate(table.rows))
    ]
    head = "| " + " | ".join(map(_plain, table.head)) + " |"
    yield _paragraph(f"{table.caption}:")
    yield "\n".join([head, "|" + " --- |" * len(table.head), *rows])


def _paragraph(text: str) -> str:
    """A line that is not taken for a list, a heading or a quotation."""
    return re.sub(r"^([-+=#]|\d+[.)])", lambda begins: begins[0][:-1] + "\\" + begins[0][-1], _plain(text))


def _plain(text: str) -> str:
    """One line in which nothing is markup."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
