"""The command that shows how a study stands."""

import json
import time
from typing import Annotated, Any

import typer

from search.cli.options import Form, Format, Name, Storage, database, refuse_absent, terminal
from search.ledger.budget import is_open
from search.ledger.leases import open_ledger


def status_command(
    name: Name = None,
    storage: Storage = None,
    form: Format = Form.TABLE,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until interrupted or the budget is done.")] = False,
    logs: Annotated[
        bool,
        typer.Option("--logs", help="Also what each worker printed last, wherever it runs, and where the rest is."),
    ] = False,
) -> None:
    """Show how a study stands and who works at it; it may be running."""
    from rich.console import Group
    from rich.live import Live

    from search import study as studies
    from search.console.status import logs_view, status_view
    from search.run.summary import running_trials, summarise, worker_logs, workers_at
    from search.storage.connect import storage_opened
    from search.storage.url import without_password

    with database(storage) as url:
        refuse_absent(url)
        with storage_opened(url) as there:
            found = studies.load(there, name)
            record = studies.record_of(found)
            assert record is not None
            ledger, study = open_ledger(there, record.name, record.config.workers)

            def look() -> dict[str, Any]:
                running = {"running_trials": running_trials(study), "workers": workers_at(ledger)}
                told = {"logs": worker_logs(ledger)} if logs else {}
                return {**summarise(study, record, ledger, without_password(url)), **running, **told}

            def picture() -> Group:
                now = look()
                return Group(status_view(now), *([logs_view(now["logs"])] if logs else []))

            if form is Form.JSON:
                typer.echo(json.dumps(look(), indent=2))
                open_ = watch and is_open(ledger)
                while open_:
                    time.sleep(STATUS_SECONDS)
                    open_ = is_open(ledger)
                    typer.echo(json.dumps(look(), indent=2))
                return
            console = terminal()
            if not watch:
                console.print(picture())
                return
            with Live(picture(), console=console, auto_refresh=False) as live:
                open_ = is_open(ledger)
                while open_:
                    time.sleep(STATUS_SECONDS)
                    open_ = is_open(ledger)  # before the look: the last picture shows the end
                    live.update(picture(), refresh=True)


STATUS_SECONDS = 2.0
