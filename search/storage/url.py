"""Database URLs: which one is meant, its password, how it is shown, and its file system."""

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from data.errors import UserError, first_line

DEFAULT_URL = "sqlite:///studies/search.db"

POSTGRESQL_CONNECTION: dict[str, Any] = {
    "application_name": "block-search",
    "connect_timeout": 10,
    # A server that lost its power says nothing; without these a worker would wait two hours for it ...
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 40_000,
    # ... and the server would keep the locks of a worker that lost its.
    "options": "-c idle_in_transaction_session_timeout=60s -c tcp_keepalives_idle=20 "
    "-c tcp_keepalives_interval=5 -c tcp_keepalives_count=4",
}

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "afs")


def storage_url(given: str | None) -> URL:
    """``--storage``, else ``$SEARCH_STORAGE``, else SQLite under ``studies/``; the driver filled in.

    Raises:
        UserError: no URL, or a database that is neither SQLite nor PostgreSQL.
    """
    text = given or os.environ.get("SEARCH_STORAGE") or DEFAULT_URL
    try:
        url = make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        # The text may hold a password, so it is not repeated.
        raise UserError(
            "the storage is not a database URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        if url.database in (None, "", ":memory:"):
            raise UserError("a study needs a database that outlives the command; write sqlite:///FILE")
        return url.set(drivername="sqlite")
    raise UserError(
        f"storage driver {url.drivername!r} is not supported; write sqlite:///FILE or "
        "postgresql://USER:PASSWORD@HOST/DATABASE"
    )


def with_password(url: URL) -> URL:
    """The URL with the password that it does not hold itself, from ``$SEARCH_STORAGE_PASSWORD`` or the file that
    ``$SEARCH_STORAGE_PASSWORD_FILE`` names. If there is neither, libpq looks in ``$PGPASSWORD`` and ``~/.pgpass``.

    Raises:
        UserError: the file cannot be read.
    """
    if url.drivername == "sqlite" or url.password:
        return url
    if password := os.environ.get("SEARCH_STORAGE_PASSWORD"):
        return url.set(password=password)
    if file := os.environ.get("SEARCH_STORAGE_PASSWORD_FILE"):
        try:
            password = Path(file).read_text(encoding="utf-8").rstrip("\r\n")
            if "\0" in password:
                raise OSError("it holds a NUL byte, so it is no text")
            return url.set(password=password)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"$SEARCH_STORAGE_PASSWORD_FILE: {file} cannot be read: {first_line(error)}") from error
    return url


def without_password(url: URL) -> str:
    """The URL as it may be shown: without a password, in any part of the URL."""
    secrets = {"password", "passfile", "sslpassword"}
    query = {key: value for key, value in url.query.items() if key not in secrets}
    return url.set(query=query).render_as_string(hide_password=True)


def network_file_system(url: URL, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The kind of network file system that holds a SQLite database, whose locks cannot be trusted; else None."""
    if url.drivername != "sqlite":
        return None
    folder = Path(str(url.database)).resolve().parent
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    kinds = {Path(line[1].replace("\\040", " ")): line[2] for line in lines if len(line) > 2}
    for mount in (folder, *folder.parents):
        if mount in kinds:
            return kinds[mount] if kinds[mount].startswith(NETWORK_FILE_SYSTEMS) else None
    return None


NETWORK_WARNING = (
    "this SQLite database lies on a network file system ({kind}), whose locks cannot be trusted: "
    "workers on several machines may spoil it; take PostgreSQL"
)
