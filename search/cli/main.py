"""The command line. It turns words into plain options and errors into one line; the work is done elsewhere.

torch and everything that needs it is imported inside the commands, so that `--help` and `status` are quick.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from search.cli.finale import confirm_command, report_command, retrain_command
from search.cli.models import export_command, predict_command
from search.cli.options import (
    Artifacts,
    DataDir,
    Device,
    Form,
    Format,
    Launchers,
    MaxLatency,
    MaxParams,
    MaxRetrainEpochs,
    Out,
    Storage,
    Workers,
    WorkersPerGpu,
    count_or_auto,
    database,
    interrupt,
    limits_given,
    refuse_absent,
    terminal,
)
from search.cli.replay import replay_command
from search.cli.status import status_command
from search.host.exit_status import ExitStatus
from search.host.process import end_with_parent

# Read by torch when it first allocates: large blocks in huge pages, a fifth of the time of a training step here.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Search for the best block network, and an honest number for it.",
)


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
    objective: Annotated[
        str | None,
        typer.Option(
            help="accuracy (default), or accuracy,params, accuracy,flops or accuracy,latency: a Pareto search, whose "
            "finale takes the knee of the front. Fixed when a study is created."
        ),
    ] = None,
    max_params: MaxParams = None,
    max_latency: MaxLatency = None,
    no_finale: Annotated[bool, typer.Option("--no-finale", help="Stop after the search.")] = False,
    out: Out = None,
    artifacts: Artifacts = None,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="At most so many epochs a trial.")] = None,
    train_images: Annotated[int | None, typer.Option(min=1, help="At most so many fit images a trial.")] = None,
    max_retrain_epochs: MaxRetrainEpochs = None,
    workers: Workers = "auto",
    workers_per_gpu: WorkersPerGpu = "auto",
    launcher: Annotated[
        Launchers, typer.Option(help="What workers are: processes of this machine, or tasks of a Ray cluster.")
    ] = Launchers.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: auto (default; the one that this machine is part of), local (a new one of this machine "
            "alone), HOST:PORT or ray://HOST:PORT."
        ),
    ] = None,
    cpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="With Ray: CPUs of each worker. Default: 1 beside a GPU, else 4 or what a node has."
        ),
    ] = None,
    ray_install: Annotated[
        bool,
        typer.Option("--ray-install", help="With Ray: every node first installs what this needs, in these versions."),
    ] = False,
    warm_start: Annotated[
        str | None,
        typer.Option(help="An earlier study of the same images in this storage: its best configurations come first."),
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Serve optuna-dashboard meanwhile.")] = False,
) -> None:
    """Create or resume a study, work its budget off, confirm the best, retrain the winner, test it, report."""
    from data.errors import UserError
    from search.config.objective import parse_objective
    from search.console.live import event_view
    from search.console.status import summary_table
    from search.run.options import RayOptions, RunOptions
    from search.run.run import run

    signal.signal(signal.SIGTERM, interrupt)
    console = terminal()
    wanted = None if objective is None else parse_objective(objective)
    if launcher is not Launchers.RAY and (ray_address, cpus_per_worker, ray_install) != (None, None, False):
        raise UserError("--ray-address, --cpus-per-worker and --ray-install go with --launcher ray")
    ray = RayOptions(ray_address or "auto", cpus_per_worker, ray_install) if launcher is Launchers.RAY else None
    limits = limits_given(max_params, max_latency)
    with database(storage) as url:
        options = RunOptions(
            storage=url,
            study=study,
            name=name,
            trials=trials,
            seed=seed,
            objective=wanted,
            limits=limits,
            data_dir=data_dir,
            dataset=dataset,
            device=device,
            out=out,
            artifacts=artifacts,
            timeout=timeout,
            finale=not no_finale,
            max_epochs=max_epochs,
            train_images=train_images,
            max_retrain_epochs=max_retrain_epochs,
            warm_start=warm_start,
            workers=count_or_auto("--workers", workers, least=0),
            workers_per_gpu=count_or_auto("--workers-per-gpu", workers_per_gpu, least=1),
            ray=ray,
            dashboard=dashboard,
        )
        with event_view(console) as show:
            end = run(options, show)
    console.print()
    console.print(summary_table(end.summary))
    for label, path in (
        ("report", end.out / "report.html"),
        ("summary", end.out / "summary.json"),
        ("model", end.out / "best"),
    ):
        if path.exists():
            console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)
    if not end.finished:
        console.print(f"The time was up before the budget was done; to go on: {_this_command()}", markup=False)


@app.command("worker")
def worker_command(
    name: Annotated[str, typer.Option(help="Name of the study.")],
    storage: Storage = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    dataset: Annotated[
        str | None, typer.Option(help="folder:DIR where the study's folder of images lies elsewhere on this machine.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The study's outputs, for checkpoints. Default: studies/NAME.")
    ] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Leave after so many configurations.")] = None,
) -> None:
    """Join a study as a worker, from any machine that reaches its storage and has its images."""
    from data.paths import data_folder
    from search.console.live import event_view
    from search.storage.retry import StorageLostError
    from search.worker.loop import run_worker
    from search.worker.runner import WorkerOptions
    from search.worker.stop import StoppedError, StopRequest

    stop = StopRequest()
    stop.install()
    number = os.environ.get("SEARCH_WORKER_NUMBER")
    with database(storage) as url:
        refuse_absent(url)
        options = WorkerOptions(
            storage=url,
            name=name,
            device=device,
            data_dir=data_folder(data_dir),
            out=out or Path("studies") / name,
            dataset=dataset,
            max_trials=max_trials,
            number=int(number) if number else None,
            launcher=os.environ.get("SEARCH_WORKER_LAUNCHER"),
            log=os.environ.get("SEARCH_WORKER_LOG"),
        )
        try:
            with event_view(terminal()) as show:
                done = run_worker(options, show, stop)
        except (StoppedError, StorageLostError) as error:
            if stop.cause is None:
                raise
            raise KeyboardInterrupt from error  # also where the database was away when somebody asked it to go
    typer.echo(f"{done} configuration{'' if done == 1 else 's'} done by this worker")


@app.command("dashboard")
def dashboard_command(
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder of the studies' outputs, for their artifacts.")] = Path("studies"),
    host: Annotated[
        str, typer.Option(help="Address to listen at; anyone who reaches it can change studies.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8080,
) -> None:
    """Serve optuna-dashboard on a storage, with the studies' notes, pictures and graphs."""
    from search.dashboard.server import serve
    from search.storage.connect import storage_opened

    signal.signal(signal.SIGTERM, interrupt)
    with database(storage) as url:
        refuse_absent(url)
        with storage_opened(url) as there:
            serve(there, out, host, port, ready=lambda address: typer.echo(f"dashboard: {address}"))


@app.command("doctor")
def doctor_command(
    device: Device = "auto",
    data_dir: DataDir = None,
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder for outputs.")] = Path("studies"),
    form: Format = Form.TABLE,
) -> None:
    """Check Python, torch, device, data, storage and disk, and say how to mend what is wrong."""
    from data.paths import data_folder
    from search.cli.doctor import examine
    from search.storage.url import storage_url

    findings = examine(device, data_folder(data_dir), storage_url(storage), out)
    if form is Form.JSON:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        console = terminal()
        colours = {"ok": "green", "warning": "yellow", "wrong": "red"}
        for finding in findings:
            console.print(f"[{colours[finding.level]}]{finding.level:8}[/] {finding.subject:8} ", end="")
            console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    if any(finding.level == "wrong" for finding in findings):
        raise typer.Exit(ExitStatus.FAILED)


@app.command("data")
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
    source.prepare(dataset, folder, repair=True, tell=typer.echo)
    split = load_split(dataset, folder, DIVISION_SEED, torch.device("cpu"))
    typer.echo(
        f"{dataset}: {len(split.fit_labels):,} fit and {len(split.validation_labels):,} validation images, "
        f"{len(split.classes)} classes, fingerprint {split.fingerprint[:12]}"
    )


app.command("status")(status_command)
app.command("confirm")(confirm_command)
app.command("retrain")(retrain_command)
app.command("report")(report_command)
app.command("replay")(replay_command)
app.command("predict")(predict_command)
app.command("export")(export_command)


def _this_command() -> str:
    """The command as it can be typed again; a password in it is left to the one who types."""
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


def _quiet_libraries(debug: bool) -> None:
    if debug:
        return
    import logging

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line and exit with the status that the contract gives."""
    end_with_parent()
    debug = "--debug" in sys.argv
    if debug:  # allowed anywhere in the line
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    sys.exit(_status_of(lambda: app(standalone_mode=False), debug))


def _status_of(command: Callable[[], Any], debug: bool) -> int:
    from data.errors import RunError, UserError, first_line

    try:
        status = command()
    except (KeyboardInterrupt, typer.Abort):
        status = ExitStatus.INTERRUPTED
    except UserError as error:
        if debug:
            raise
        _complain(str(error))
        return ExitStatus.WRONG_INPUT
    except Exception as error:
        if debug:
            raise
        if isinstance(error, RunError):
            _complain(str(error))
            return ExitStatus.FAILED
        # What the parser refuses. Typer has carried a copy of click of late, so there is no one class to name.
        if explain := getattr(error, "format_message", None):
            _complain(explain())
            return ExitStatus.WRONG_INPUT
        _complain(f"unexpected {type(error).__name__}: {first_line(error)} (the traceback: add --debug)")
        return ExitStatus.FAILED
    if status == ExitStatus.INTERRUPTED:  # newer Typers turn Ctrl-C into a status themselves
        _complain(f"interrupted; nothing stored is lost. To go on: {_this_command()}")
    return status if isinstance(status, int) else ExitStatus.OK


def _complain(text: str) -> None:
    print("search: " + " ".join(text.split()), file=sys.stderr)
