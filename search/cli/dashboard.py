"""``search dashboard``: serves optuna-dashboard on a storage."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from search.cli.options import Storage, database, interrupt, refuse_absent


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
        with storage_opened(url) as opened_storage:
            serve(opened_storage, out, host, port, ready=lambda address: typer.echo(f"dashboard: {address}"))
