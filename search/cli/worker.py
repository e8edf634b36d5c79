"""``search worker``: runs a worker of a study, started by a run or by hand."""

import os
from pathlib import Path
from typing import Annotated

import typer

from search.cli.options import DataDir, Device, Storage, database, refuse_absent, terminal


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
            raise KeyboardInterrupt from error  # also if the database was lost when the worker was stopped
    typer.echo(f"{done} configuration{'' if done == 1 else 's'} done by this worker")
