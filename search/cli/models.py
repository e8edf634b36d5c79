"""The commands that use a saved model: words into plain options, as in `search.cli.main`, which holds them."""

import enum
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from data.images import IMAGE_SIZE
from model.predict import Prediction
from search.cli.options import DataDir, Device, Form, Format, terminal
from search.console.format import percent
from search.host.exit_status import ExitStatus

Model = Annotated[Path | None, typer.Option(help="Folder of a saved model. Default: as --name says.")]
Name = Annotated[
    str | None,
    typer.Option(help="Study whose best model is taken, from studies/NAME/best. Default: the only study that has one."),
]


class FileForm(enum.StrEnum):
    """What a model is exported as."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


def predict_command(
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGE", help="Image files of any size.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="All images in this folder and below. What cannot be read gets a line each and in the end exit "
            "status 1; the others are predicted.",
        ),
    ] = None,
    model: Model = None,
    name: Name = None,
    device: Device = "auto",
    form: Format = Form.TABLE,
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each image, the most probable ones.")] = 1,
) -> None:
    """Say what images show, by a saved model."""
    import logging

    from data.errors import DataError, UserError
    from model.device import resolve_device
    from model.predict import open_model, pictures_in, predict
    from search.cli.models import as_json, as_table, resizing

    if bool(images) == bool(folder):
        raise UserError("give images, or --dir with a folder of them" + (", not both" if images else ""))
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its decoders log what the one line of an error says
    unreadable: list[DataError] = []

    def take(error: DataError) -> None:
        if folder is None:
            raise error
        unreadable.append(error)

    paths = pictures_in(folder) if folder else images or []
    where = resolve_device(device)
    predictions = predict(open_model(_model_folder(model, name), where), paths, where, top, take)
    if form is Form.JSON:
        typer.echo(json.dumps(as_json(predictions, top), indent=2))
    elif predictions:
        console = terminal()
        console.print(as_table(predictions))
        if line := resizing(predictions):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for error in unreadable:
        typer.echo(f"search: {' '.join(str(error).split())}", err=True)
    if unreadable:
        raise typer.Exit(ExitStatus.FAILED)


def export_command(
    model: Model = None,
    name: Name = None,
    form: Annotated[
        FileForm | None,
        typer.Option("--format", help="onnx, or torch-export (.pt2). Default: as --out ends, else onnx."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: model.onnx or model.pt2 beside the saved model.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Write a saved model as one file for other programs, and hold it to the network on real images."""
    import torch

    from data.paths import data_folder
    from model.export import SUFFIXES, ExportFormat, export, format_for
    from model.predict import open_model

    chosen = format_for(out, cast(ExportFormat | None, form and form.value))
    source = _model_folder(model, name)
    target = out or source / f"model{SUFFIXES[chosen]}"
    agreement = export(open_model(source, torch.device("cpu")), chosen, target, data_folder(data_dir))
    typer.echo(f"{target}: {target.stat().st_size:,} bytes; {agreement}")


def _model_folder(model: Path | None, name: str | None) -> Path:
    """The folder of the saved model that is meant.

    Raises:
        UserError: both are given, or neither and there is not exactly one below ``studies``.
    """
    from data.errors import UserError
    from search.study import check_name

    if model is not None and name is not None:
        raise UserError("give --model or --name, not both")
    if model is not None:
        return model
    if name is not None:
        return Path("studies") / check_name(name) / "best"
    found = sorted(Path("studies").glob("*/best"))
    if len(found) != 1:
        there = ", ".join(folder.parent.name for folder in found)
        raise UserError(
            f"which model? studies/ has those of {there}; choose with --name or --model"
            if found
            else "there is no model in studies/ yet; give --model with a folder, or make one: python -m search run"
        )
    return found[0]


SIZES_SHOWN = 3


def as_json(predictions: Sequence[Prediction], top: int) -> list[dict[str, Any]]:
    """What scripts read; ``probabilities`` where more than one class of each image was asked for."""
    return [
        {
            "image": str(one.image),
            "class": one.probabilities[0][0],
            "probability": one.probabilities[0][1],
            **({"probabilities": dict(one.probabilities)} if top > 1 else {}),
            "resized_from": one.resized_from and _pixels(one.resized_from),
        }
        for one in predictions
    ]


def as_table(predictions: Sequence[Prediction]) -> Table:
    """What a person reads: a line for each image, or several where several classes were asked for."""
    table = Table("image", "class", "probability", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    table.columns[2].justify = "right"
    for one in predictions:
        name = _printable(str(one.image))
        for label, probability in one.probabilities:
            table.add_row(Text(name), Text(_printable(label)), percent(probability))
            name = ""
    return table


def resizing(predictions: Sequence[Prediction]) -> str | None:
    """One line that says from which sizes images were brought to the network's; None where none was."""
    sizes = Counter(one.resized_from for one in predictions if one.resized_from)
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
    """Text as it can be shown on any terminal: a file's name may hold line breaks and commands to the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
