"""``search status``: shows a study's state."""

import json
import time
from typing import Annotated

import typer

from search.cli.options import Form, Format, Name, Storage, database, refuse_absent, terminal


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
    from rich.live import Live

    from search import study as studies
    from search.console.status import status_view
    from search.ledger.budget import is_open
    from search.ledger.leases import open_ledger
    from search.run.summary import read_status
    from search.storage.connect import storage_opened
    from search.storage.url import without_password
    from search.summary import Status, status_as_json

    with database(storage) as url:
        refuse_absent(url)
        with storage_opened(url) as opened:
            record = studies.record_of(studies.load(opened, name))
            assert record is not None
            ledger, study = open_ledger(opened, record.name, record.config.workers)

            def read() -> Status:
                return read_status(study, record, ledger, without_password(url), logs)

            if form is Form.JSON:
                typer.echo(json.dumps(status_as_json(read()), indent=2))
                open_ = watch and is_open(ledger)
                while open_:
                    time.sleep(STATUS_SECONDS)
                    open_ = is_open(ledger)
                    typer.echo(json.dumps(status_as_json(read()), indent=2))
                return
            console = terminal()
            if not watch:
                console.print(status_view(read()))
                return
            with Live(status_view(read()), console=console, auto_refresh=False) as live:
                open_ = is_open(ledger)
                while open_:
                    time.sleep(STATUS_SECONDS)
                    open_ = is_open(ledger)  # before reading, so that the last view shows the end
                    live.update(status_view(read()), refresh=True)


STATUS_SECONDS = 2.0
