"""Run optuna-dashboard in its own process for as long as `run` lasts."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy.engine import URL

from search.launch.base import without_prefix
from search.storage.url import with_password

DASHBOARD_SECONDS = 30.0
"""How long to wait for the dashboard's address at its start."""

ADDRESS = b"dashboard: "
"""Begins the line with which the dashboard reports that it is ready, and its address."""


@contextlib.contextmanager
def dashboard_process(storage: URL, out: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Serve optuna-dashboard in its own process for as long as the context lasts."""
    child, text = _start_dashboard(storage, out, port=8080)
    if child.poll() is not None:
        child, text = _start_dashboard(storage, out, port=0)  # any free port
    tell(without_prefix(text) or f"the dashboard has not started yet; see {out / 'dashboard.log'}")
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def _start_dashboard(storage: URL, out: Path, port: int) -> tuple["subprocess.Popen[bytes]", str]:
    """Start the process; return it once it serves or has ended, and the first line that it printed."""
    log = out / "dashboard.log"
    command = [sys.executable, "-m", "search", "dashboard", "--out", str(out.resolve()), "--port", str(port)]
    environment = {**os.environ, "SEARCH_STORAGE": with_password(storage).render_as_string(hide_password=False)}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    until = time.monotonic() + DASHBOARD_SECONDS
    while time.monotonic() < until and child.poll() is None and ADDRESS not in log.read_bytes():
        time.sleep(0.1)
    return child, log.read_text(encoding="utf-8").partition("\n")[0]
