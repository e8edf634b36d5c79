"""``search replay``: replays a study's own trials under other pruners."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli.options import Form, Format, Name, Storage, database, refuse_absent, terminal

if TYPE_CHECKING:
    from search.samplers.pruner_replay import Estimate, Replay


def replay_command(
    name: Name = None,
    storage: Storage = None,
    draws: Annotated[int, typer.Option(min=1, help="Times that what is not known is drawn.")] = 50,
    form: Format = Form.TABLE,
) -> None:
    """Say what other pruners would have saved or lost on a study's own trials; nothing is trained."""
    from search import study as studies
    from search.samplers.pruner_replay import replay
    from search.storage.connect import storage_opened

    with database(storage) as url:
        refuse_absent(url)
        with storage_opened(url) as opened_storage:
            study = studies.load(opened_storage, name)
            replayed = replay(study.get_trials(deepcopy=False), studies.definition_of(study), draws)
    if form is Form.JSON:
        typer.echo(json.dumps(asdict(replayed), indent=2))
    else:
        _print(replayed)


def _print(replayed: "Replay") -> None:
    from rich.table import Table

    cut = replayed.trials - replayed.whole
    unknown = f"; how the {cut} stopped ones would have ended is drawn {replayed.draws} times" if cut else ""
    console = terminal()
    console.print(f"{replayed.trials} trials of {replayed.epochs} epochs, {replayed.whole} to their end{unknown}")
    table = Table(
        "pruner", "time saved", "trials stopped", f"of the best {replayed.top} stopped", "accuracy lost", box=None,
        pad_edge=False,
    )  # fmt: skip
    for row in replayed.pruners:
        table.add_row(
            row.pruner,
            _spread(row.saved, 100, " %", 0),
            _spread(row.stopped, 1, "", 0),
            _spread(row.best_stopped, 1, "", 1),
            _spread(row.lost, 100, " points", 2),
        )
    console.print(table)


def _spread(estimate: "Estimate", scale: float, unit: str, digits: int) -> str:
    """A mean and, if draws differ, the middle 95 % of them."""
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"
