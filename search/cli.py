"""The command line. It turns words into plain options and errors into one line; the work is done elsewhere.

torch and everything that needs it is imported inside the commands, so that `--help` and `status` are quick.
"""

import enum
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# Read by torch when it first allocates: large blocks in huge pages, a fifth of the time of a training step here.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Search for the best block network, and an honest number for it.",
)

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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class Form(enum.StrEnum):
    """How a command prints what it found."""

    TABLE = "table"
    JSON = "json"


Format = Annotated[Form, typer.Option("--format", help="How to print it.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
) -> None:
    """Search for the best block network, and an honest number for it."""
    _quiet_libraries(debug)


@app.command("run")
def run_command(
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Configurations to be done in all, exactly. Default: as the study file says."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Study file, or a shipped one: cifar10, cpu, seed. Default: the one that fits the device."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study. Default: that of the study file.")] = None,
    storage: Storage = None,
    data_dir: DataDir = None,
    dataset: Annotated[str, typer.Option(help="auto, cifar10, digits or folder:DIR.")] = "auto",
    device: Device = "auto",
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which the search stops; the finale follows.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of sampler and trainings.")] = None,
    no_finale: Annotated[bool, typer.Option("--no-finale", help="Stop after the search.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for outputs. Default: studies/NAME.")] = None,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="At most so many epochs a trial.")] = None,
    train_images: Annotated[int | None, typer.Option(min=1, help="At most so many fit images a trial.")] = None,
    max_retrain_epochs: Annotated[
        int | None, typer.Option(min=1, help="At most so many epochs in the retrain.")
    ] = None,
) -> None:
    """Create or resume a study, work its budget off, retrain the winner and test it once."""
    from search.run import RunOptions, run
    from search.storage import storage_url
    from search.view import summary_table, view

    signal.signal(signal.SIGTERM, _interrupt)
    console = _console()
    with view(console) as show:
        end = run(
            RunOptions(
                storage=storage_url(storage),
                study=study,
                name=name,
                trials=trials,
                seed=seed,
                data_dir=data_dir,
                dataset=dataset,
                device=device,
                out=out,
                timeout=timeout,
                finale=not no_finale,
                max_epochs=max_epochs,
                train_images=train_images,
                max_retrain_epochs=max_retrain_epochs,
            ),
            show,
        )
    console.print()
    console.print(summary_table(end.summary))
    for label, path in (("summary", end.out / "summary.json"), ("model", end.out / "best")):
        if path.exists():
            console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)
    if not end.finished:
        console.print(f"The time was up before the budget was done; to go on: {_this_command()}", markup=False)


@app.command()
def status(name: Name = None, storage: Storage = None, form: Format = Form.TABLE) -> None:
    """Show how a study stands; it may be running."""
    from search import study as studies
    from search.storage import opened, shown, storage_url
    from search.summary import running_trials, summarise
    from search.view import percent, summary_table

    url = storage_url(storage)
    _refuse_absent(url)
    with opened(url) as database:
        found = studies.load(database, name)
        record = studies.record_of(found)
        assert record is not None
        summary, running = summarise(found, record, shown(url)), running_trials(found)
    if form is Form.JSON:
        typer.echo(json.dumps({**summary, "running_trials": running}, indent=2))
        return
    console = _console()
    console.print(summary_table(summary))
    for trial in running:
        reached = f"epoch {trial['epoch']}, {percent(trial['accuracy'])}" if trial["epoch"] else "first epoch"
        console.print(f"running: trial {trial['trial']}, {reached}")


@app.command()
def doctor(
    device: Device = "auto",
    data_dir: DataDir = None,
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder for outputs.")] = Path("studies"),
    form: Format = Form.TABLE,
) -> None:
    """Check Python, torch, device, data, storage and disk, and say how to mend what is wrong."""
    from data.source import data_folder
    from search.doctor import examine
    from search.storage import storage_url

    findings = examine(device, data_folder(data_dir), storage_url(storage), out)
    if form is Form.JSON:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        console = _console()
        colours = {"ok": "green", "warning": "yellow", "wrong": "red"}
        for finding in findings:
            console.print(f"[{colours[finding.level]}]{finding.level:8}[/] {finding.subject:8} ", end="")
            console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    if any(finding.level == "wrong" for finding in findings):
        raise typer.Exit(FAILED)


@app.command("data")
def data_command(
    dataset: Annotated[str, typer.Option(help="cifar10, digits or folder:DIR.")] = "cifar10",
    data_dir: DataDir = None,
) -> None:
    """Fetch a data set ahead of time and verify it; damaged files are fetched anew."""
    import torch

    from data import source
    from data.split import load_split
    from search.errors import UserError
    from search.run import DIVISION_SEED

    if dataset == "auto":
        raise UserError("name the data set: cifar10, digits or folder:DIR")
    folder = source.data_folder(data_dir)
    source.prepare(dataset, folder, repair=True)
    split = load_split(dataset, folder, DIVISION_SEED, torch.device("cpu"))
    typer.echo(
        f"{dataset}: {len(split.fit_labels):,} fit and {len(split.validation_labels):,} validation images, "
        f"{len(split.classes)} classes, fingerprint {split.fingerprint[:12]}"
    )


def _refuse_absent(url: Any) -> None:
    """Looking at a SQLite database must not create it."""
    from search.errors import UserError

    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        raise UserError(f"no database {url.database}; `python -m search run` creates one")


def _console() -> Console:
    """Standard output; in a file or a pipe, lines are not broken at a terminal's width that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _this_command() -> str:
    """The command as it can be typed again; a password in it is left to the one who types."""
    return shlex.join(["python", "-m", "search", *map(_without_password, sys.argv[1:])])


def _without_password(word: str) -> str:
    from search.errors import UserError
    from search.storage import shown, storage_url

    flag, equals, value = word.partition("=") if word.startswith("--storage=") else ("", "", word)
    if "://" not in value:
        return word
    try:
        return f"{flag}{equals}{shown(storage_url(value))}"
    except UserError:
        return f"{flag}{equals}URL"


def _quiet_libraries(debug: bool) -> None:
    if debug:
        return
    import logging

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line and exit with the status that the contract gives."""
    debug = "--debug" in sys.argv
    if debug:  # allowed anywhere in the line
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    sys.exit(_status_of(lambda: app(standalone_mode=False), debug))


def _status_of(command: Callable[[], Any], debug: bool) -> int:
    from search.errors import USER_ERRORS, RunError, first_line

    try:
        status = command()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except USER_ERRORS as error:
        if debug:
            raise
        _complain(str(error))
        return WRONG_INPUT
    except Exception as error:
        if debug:
            raise
        if isinstance(error, RunError):
            _complain(str(error))
            return FAILED
        # What the parser refuses. Typer has carried a copy of click of late, so there is no one class to name.
        if explain := getattr(error, "format_message", None):
            _complain(explain())
            return WRONG_INPUT
        _complain(f"unexpected {type(error).__name__}: {first_line(error)} (the traceback: add --debug)")
        return FAILED
    if status == INTERRUPTED:  # newer Typers turn Ctrl-C into a status themselves
        _complain(f"interrupted; nothing stored is lost. To go on: {_this_command()}")
    return status if isinstance(status, int) else OK


def _complain(text: str) -> None:
    print("search: " + " ".join(text.split()), file=sys.stderr)
