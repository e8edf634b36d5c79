"""``search predict`` and ``export``: the commands that use a saved model."""

import enum
import json
from pathlib import Path
from typing import Annotated, cast

import typer

from search.cli.options import DataDir, Device, Form, Format, terminal
from search.host.exit_status import ExitStatus

Model = Annotated[Path | None, typer.Option(help="Folder of a saved model. Default: as --name says.")]
Name = Annotated[
    str | None,
    typer.Option(help="Study whose best model is taken, from studies/NAME/best. Default: the only study that has one."),
]


class FileForm(enum.StrEnum):
    """The format of an exported model."""

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
    from model.predict import images_in, open_model, predict
    from search.cli.predictions import as_json, as_table, resizing

    if bool(images) == bool(folder):
        raise UserError("give images, or --dir with a folder of them" + (", not both" if images else ""))
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its decoders log what the one-line error already says
    unreadable: list[DataError] = []

    def refuse(error: DataError) -> None:
        if folder is None:
            raise error
        unreadable.append(error)

    paths = images_in(folder) if folder else images or []
    chosen_device = resolve_device(device)
    saved = open_model(_model_folder(model, name), chosen_device)
    predictions = predict(saved, paths, chosen_device, top, refuse)
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
    """The folder of the saved model that the options name.

    Raises:
        UserError: both are given, or neither and ``studies`` does not have exactly one model.
    """
    from data.errors import UserError
    from search.study import check_name

    if model is not None and name is not None:
        raise UserError("give --model or --name, not both")
    if model is not None:
        return model
    if name is not None:
        return Path("studies") / check_name(name) / "best"
    models = sorted(Path("studies").glob("*/best"))
    if len(models) != 1:
        names = ", ".join(folder.parent.name for folder in models)
        raise UserError(
            f"which model? studies/ has those of {names}; choose with --name or --model"
            if models
            else "there is no model in studies/ yet; give --model with a folder, or make one: python -m search run"
        )
    return models[0]
