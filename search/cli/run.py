"""``search run``: its options, and what it prints at the end."""

import signal
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from search.cli.options import (
    Artifacts,
    DataDir,
    Device,
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
    terminal,
    this_command,
)

if TYPE_CHECKING:
    from search.run.options import RunEnd


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
    from search.run.options import RayOptions, RunOptions
    from search.run.run import run

    signal.signal(signal.SIGTERM, interrupt)
    console = terminal()
    parsed_objective = None if objective is None else parse_objective(objective)
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
            objective=parsed_objective,
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
    _print_end(console, end)


def _print_end(console: Console, end: "RunEnd") -> None:
    from search.console.status import summary_table

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
        console.print(f"The time was up before the budget was done; to go on: {this_command()}", markup=False)
