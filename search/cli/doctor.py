"""``search doctor``: prints what `search.cli.diagnosis` finds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from search.cli.options import DataDir, Device, Form, Format, Storage, terminal
from search.host.exit_status import ExitStatus


def doctor_command(
    device: Device = "auto",
    data_dir: DataDir = None,
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder for outputs.")] = Path("studies"),
    form: Format = Form.TABLE,
) -> None:
    """Check Python, torch, device, data, storage and disk, and say how to mend what is wrong."""
    from data.paths import data_folder
    from search.cli.diagnosis import examine
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
