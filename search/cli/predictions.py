"""What ``search predict`` prints: predictions as JSON, and as a table."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from data.images import IMAGE_SIZE
from model.predict import Prediction
from search.console.format import percent

SIZES_SHOWN = 3


def as_json(predictions: Sequence[Prediction], top: int) -> list[dict[str, Any]]:
    """Predictions for scripts; with ``probabilities`` if more than one class per image is shown."""
    return [
        {
            "image": str(prediction.image),
            "class": prediction.probabilities[0][0],
            "probability": prediction.probabilities[0][1],
            **({"probabilities": dict(prediction.probabilities)} if top > 1 else {}),
            "resized_from": prediction.resized_from and _pixels(prediction.resized_from),
        }
        for prediction in predictions
    ]


def as_table(predictions: Sequence[Prediction]) -> Table:
    """Predictions for people: one line per image, or several if several classes are shown."""
    table = Table("image", "class", "probability", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    table.columns[2].justify = "right"
    for prediction in predictions:
        name = _printable(str(prediction.image))
        for label, probability in prediction.probabilities:
            table.add_row(Text(name), Text(_printable(label)), percent(probability))
            name = ""
    return table


def resizing(predictions: Sequence[Prediction]) -> str | None:
    """One line with the sizes from which images were resized to the network's; None if none was resized."""
    sizes = Counter(prediction.resized_from for prediction in predictions if prediction.resized_from)
    if not sizes:
        return None
    shown = [
        _pixels(size) if count == len(predictions) else f"{_pixels(size)} ({count} of {len(predictions)})"
        for size, count in sizes.most_common(SIZES_SHOWN)
    ]
    if further := len(sizes) - len(shown):
        shown.append(f"{further} other size{'' if further == 1 else 's'}")
    return f"resized from {', '.join(shown)} to {IMAGE_SIZE}x{IMAGE_SIZE}"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _printable(text: str) -> str:
    """Text that is safe on any terminal: a file name may contain line breaks and terminal commands."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
