"""The command line: turns words into plain options and errors into one line; other modules do the work.

The commands import torch, and everything that needs it, inside their functions, so that `--help` and `status` are fast.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from search.cli.dashboard import dashboard_command
from search.cli.data import data_command
from search.cli.doctor import doctor_command
from search.cli.finale import confirm_command, report_command, retrain_command
from search.cli.models import export_command, predict_command
from search.cli.options import this_command
from search.cli.replay import replay_command
from search.cli.run import run_command
from search.cli.status import status_command
from search.cli.worker import worker_command
from search.host.exit_status import ExitStatus
from search.host.process import end_with_parent

# torch reads this when it first allocates: large blocks in huge pages, a fifth of the time of a training step here.
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


app.command("run")(run_command)
app.command("worker")(worker_command)
app.command("dashboard")(dashboard_command)
app.command("doctor")(doctor_command)
app.command("data")(data_command)
app.command("status")(status_command)
app.command("confirm")(confirm_command)
app.command("retrain")(retrain_command)
app.command("report")(report_command)
app.command("replay")(replay_command)
app.command("predict")(predict_command)
app.command("export")(export_command)


def _quiet_libraries(debug: bool) -> None:
    if debug:
        return
    import logging

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line and exit with the status that the contract defines."""
    end_with_parent()
    debug = "--debug" in sys.argv
    if debug:  # allowed anywhere on the line
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
        # Refused by the parser. Recent versions of Typer contain a copy of click, so there is no single class to name.
        if explain := getattr(error, "format_message", None):
            _complain(explain())
            return ExitStatus.WRONG_INPUT
        _complain(f"unexpected {type(error).__name__}: {first_line(error)} (the traceback: add --debug)")
        return ExitStatus.FAILED
    if status == ExitStatus.INTERRUPTED:  # newer versions of Typer turn Ctrl-C into a status
        _complain(f"interrupted; nothing stored is lost. To go on: {this_command()}")
    return status if isinstance(status, int) else ExitStatus.OK


def _complain(text: str) -> None:
    print("search: " + " ".join(text.split()), file=sys.stderr)
