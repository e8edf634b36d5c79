"""Options that several commands share, and their handling."""

import contextlib
import enum
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from search.config.objective import CostName

Storage = Annotated[
    str | None,
    typer.Option(
        help="Database URL (SQLite or PostgreSQL). Default: $SEARCH_STORAGE, else sqlite:///studies/search.db."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder that holds cifar-10-batches-py/. Default: $SEARCH_DATA_DIR, else a cache folder."),
]
Name = Annotated[str | None, typer.Option(help="Name of the study.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or cuda:N,M.")]


class Form(enum.StrEnum):
    """How a command prints its result."""

    TABLE = "table"
    JSON = "json"


class Launchers(enum.StrEnum):
    """What starts a run's workers."""

    LOCAL = "local"
    RAY = "ray"


Workers = Annotated[
    str,
    typer.Option(
        help="Processes that train on this machine: auto (as --workers-per-gpu says, or one for every four cores) "
        "or a number. 0: only watch; others work. With Ray: auto is as many as the cluster has room for."
    ),
]
WorkersPerGpu = Annotated[
    str,
    typer.Option(
        help="Workers that share a GPU, with --workers auto: a number, or auto: one, and up to three more where "
        "the GPU, by nvidia-smi, is idle for much of the time and has memory left."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for outputs. Default: studies/NAME.")]
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="s3://BUCKET/PREFIX",
        help="Store for checkpoints and artifacts, for machines that share no folder; kept with the study. Default: "
        "$SEARCH_ARTIFACTS, else only the folder for outputs.",
    ),
]
MaxRetrainEpochs = Annotated[
    int | None, typer.Option(min=1, help="No training of the retrain is longer. Default: as the study file says.")
]
MaxParams = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="The finale takes the best of the networks with so many parameters at most; kept with the study until "
        "another number, or none, is given.",
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS",
        help="The same for the forward pass of one image; needs --objective accuracy,latency.",
    ),
]
Format = Annotated[Form, typer.Option("--format", help="How to print it.")]


@contextlib.contextmanager
def database(given: str | None) -> Iterator[Any]:
    """The storage's URL; for ``postgres`` that of our own PostgreSQL, which runs for as long as it is needed."""
    from search.storage.url import storage_url, without_password

    if (given or os.environ.get("SEARCH_STORAGE")) != "postgres":
        yield storage_url(given)
        return
    from search.storage.local_postgres import local_postgres

    with local_postgres() as server:
        typer.echo(
            f"storage: {without_password(server.url)} for other workers, with "
            f"SEARCH_STORAGE_PASSWORD_FILE={server.password_file.resolve()}",
            err=True,
        )
        yield server.url.set(password=server.password)


def count_or_auto(option: str, text: str, least: int) -> int | None:
    """A number of workers; None for ``auto``."""
    from data.errors import UserError

    if text == "auto":
        return None
    if not text.isdecimal() or not least <= int(text) <= MOST_WORKERS:
        raise UserError(f"{option} takes auto or a number from {least} to {MOST_WORKERS}, not {text!r}")
    return int(text)


MOST_WORKERS = 1024


def limits_given(max_params: str | None, max_latency: str | None) -> "dict[CostName, float | None]":
    """The limits given on the command line; None removes an earlier one.

    Raises:
        UserError: a limit is neither a number above 0 nor ``none``.
    """
    from data.errors import UserError

    given: dict[CostName, float | None] = {}
    if max_params is not None:
        if max_params != "none" and not (max_params.isdecimal() and int(max_params)):
            raise UserError(f"--max-params takes a number from 1 or none, not {max_params!r}")
        given["params"] = None if max_params == "none" else int(max_params)
    if max_latency is not None:
        given["latency"] = None if max_latency == "none" else _seconds(max_latency)
    return given


def _seconds(text: str) -> float:
    from data.errors import UserError

    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < math.inf:
            return seconds
    raise UserError(f"--max-latency takes seconds above 0, such as 0.002, or none, not {text!r}")


def refuse_absent(url: Any) -> None:
    """Refuse an absent SQLite database: looking must not create it."""
    from data.errors import UserError

    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        raise UserError(f"no database {url.database}; `python -m search run` creates one")


def terminal() -> Console:
    """Standard output; in a file or a pipe, lines do not wrap at a terminal's width."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def interrupt(*_: object) -> None:
    """Handle SIGTERM in a running command like Ctrl-C."""
    raise KeyboardInterrupt


def this_command() -> str:
    """This command, ready to be typed again, without a password."""
    return shlex.join(["python", "-m", "search", *map(_without_password, sys.argv[1:])])


def _without_password(word: str) -> str:
    from data.errors import UserError
    from search.storage.url import storage_url, without_password

    flag, equals, value = word.partition("=") if word.startswith(("--storage=", "--artifacts=")) else ("", "", word)
    if "://" not in value or (value.startswith("s3://") and "@" not in value):
        return word
    try:
        return f"{flag}{equals}{without_password(storage_url(value))}"
    except UserError:
        return f"{flag}{equals}URL"
