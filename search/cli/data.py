"""``search data``: fetches a data set ahead of time."""

from typing import Annotated

import typer

from search.cli.options import DataDir


def data_command(
    dataset: Annotated[str, typer.Option(help="cifar10, digits or folder:DIR.")] = "cifar10",
    data_dir: DataDir = None,
) -> None:
    """Fetch a data set ahead of time and verify it; damaged files are fetched anew."""
    import torch

    from data import source
    from data.errors import UserError
    from data.paths import data_folder
    from data.split import DIVISION_SEED, load_split

    if dataset == "auto":
        raise UserError("name the data set: cifar10, digits or folder:DIR")
    folder = data_folder(data_dir)
    source.prepare(dataset, folder, repair=True, notify=typer.echo)
    split = load_split(dataset, folder, DIVISION_SEED, torch.device("cpu"))
    typer.echo(
        f"{dataset}: {len(split.fit_labels):,} fit and {len(split.validation_labels):,} validation images, "
        f"{len(split.classes)} classes, fingerprint {split.fingerprint[:12]}"
    )
