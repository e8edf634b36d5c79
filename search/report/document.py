"""What a report consists of, in any format: words, tables, pictures, code, in sections.

All text here is plain. The renderer escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of short texts, each with a title."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Attributes:
        caption: what the table holds.
        head: of every column.
        rows: as long as the head.
        strong: indices of rows that stand out.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        title: what it shows.
        figure: drawn without a title of its own.
        text: how to read it, if that is not obvious.
        numbers: the same as a table, for readers who cannot see it and formats without pictures.
        height: in pixels.
    """

    title: str
    figure: go.Figure
    text: str = ""
    numbers: Table | None = None
    height: int = 380


@dataclass(frozen=True)
class Pictures:
    """Figures next to one another, if there is room for that; ``small`` ones take less of it."""

    pictures: tuple[Picture, ...]
    small: bool = False


@dataclass(frozen=True)
class Code:
    """Something to be copied."""

    title: str
    text: str
    language: str


ContentBlock = Text | Items | Table | Picture | Pictures | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; ``name`` is its anchor."""

    name: str
    title: str
    blocks: tuple[ContentBlock, ...]


@dataclass(frozen=True)
class Answer:
    """What the reader came for.

    Attributes:
        label: what the value is.
        value: a number, or words if there is none yet.
        detail: interval and number of seeds, or how far the study is.
        sentences: what else to know.
        warnings: titles of the warnings, which are in full in their section.
    """

    label: str
    value: str
    detail: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    answer: Answer
    sections: tuple[Section, ...] = field(default=())


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[int] = ()) -> Table:
    """A table from any sequences."""
    return Table(caption, tuple(head), tuple(tuple(row) for row in rows), frozenset(strong))
