"""The database that a study lives in: SQLite or PostgreSQL, by any SQLAlchemy URL."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL

from data.errors import UserError, first_line
from data.lock import file_lock
from search.storage.rdb import RetryingStorage
from search.storage.tables import TABLES
from search.storage.url import POSTGRESQL_CONNECTION, with_password, without_password

BUSY_SECONDS = 60
"""How long a SQLite connection waits for another's write."""


AWAY = (
    "Connection refused",
    "timeout expired",
    "too many clients",
    "remaining connection slots",
    "the database system is",  # starting up, shutting down, in recovery
    "server closed the connection",
)
"""What PostgreSQL and its driver say when a later try can succeed."""


class StorageAwayError(UserError):
    """The database cannot be opened now, but perhaps a little later."""


def open_storage(url: URL, connections: int = 5) -> RetryingStorage:
    """Open the database that the URL names; create it if it is absent.

    Args:
        url: of the database.
        connections: to a PostgreSQL at most. A worker has one, which training and heartbeats share, each for
            some milliseconds; a server that shows a study to many people has more.

    Raises:
        UserError: it cannot be reached, written, or was made by something else.
    """
    url = with_password(url)
    # No `pool_pre_ping`: it waits for the server before every transaction. The transaction itself notices a connection
    # that has died, and `search.storage.retry` then tries it again.
    engine_kwargs: dict[str, Any] = {}
    if url.drivername == "sqlite":
        engine_kwargs["connect_args"] = {"timeout": BUSY_SECONDS}
        _make_parent(url)
    else:
        pool_size = min(2, connections)
        # Optuna opens a second one for a moment while it looks at its tables' version.
        overflow = max(1, connections - pool_size)
        engine_kwargs |= {"pool_size": pool_size, "max_overflow": overflow, "connect_args": POSTGRESQL_CONNECTION}
    try:
        # Two processes cannot create the same tables at the same time.
        with contextlib.nullcontext() if _is_complete(url, engine_kwargs) else exclusive_lock(url, "creation"):
            storage = RetryingStorage(url, without_password(url), engine_kwargs)
            if url.drivername == "sqlite":
                _begin_immediate(storage.engine)
            TABLES.create_all(storage.engine)
            if connections == 1:
                storage.retry.connection_lock = threading.Lock()
    except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        inner = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        cause = getattr(inner, "orig", None) or inner or error
        kind = StorageAwayError if any(words in str(cause) for words in AWAY) else UserError
        raise kind(
            f"storage {without_password(url)} cannot be used: {_without_secret(first_line(cause), url)}"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"storage {without_password(url)} was made by another version of Optuna: {first_line(error)}; "
            "upgrade it with: optuna storage upgrade --storage URL"
        ) from error
    return storage


@contextlib.contextmanager
def storage_opened(
    url: URL, connections: int = 5, patience: float = 0.0, tell: Callable[[str], None] = lambda _: None
) -> Iterator[RetryingStorage]:
    """`open_storage` for as long as the context lasts; its connections are closed at the end.

    Args:
        url, connections: see there.
        patience: seconds for which a server is tried again that cannot be reached or has no connection left.
        tell: gets a line when that begins.

    Raises:
        UserError: see there.
    """
    until = time.monotonic() + patience
    told_outage = False
    while True:
        try:
            storage = open_storage(url, connections)
            break
        except StorageAwayError as error:
            if time.monotonic() >= until:
                raise
            if not told_outage:
                tell(f"{error}; trying again for {patience:.0f} s")
                told_outage = True
            time.sleep(random.uniform(0.5, 2.0))  # many workers that start at once do not come back at once
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _begin_immediate(engine: sa.Engine) -> None:
    """Every transaction takes SQLite's write lock at its start.

    Python's sqlite3 begins one only before the first write, so that what Optuna reads and then writes (such as a
    trial's state) could change in between; and a transaction that begins by reading fails at once with "database is
    locked" when it comes to write, however long the timeout.
    """

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sa.event.listen(engine, "connect", connected)
    sa.event.listen(engine, "begin", begun)
    engine.dispose()  # connections opened before this have no such listeners


def _without_secret(text: str, url: URL) -> str:
    return text.replace(str(url.password), "***") if url.password else text


def _make_parent(url: URL) -> None:
    parent = Path(str(url.database)).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"storage {without_password(url)}: folder {parent} cannot be made: {error.strerror}") from error


def _is_complete(url: URL, engine_kwargs: dict[str, Any]) -> bool:
    """Whether all tables exist. Turns on SQLite's write-ahead log.

    Raises:
        UserError: Optuna's tables would have to be added to a database that holds something else.
    """
    engine = sa.create_engine(url, **engine_kwargs)
    try:
        tables = set(sa.inspect(engine).get_table_names())
        complete = {"studies", "trials", "version_info", *TABLES.tables} <= tables
        # A creator that was killed half-way leaves a part of them.
        others = {
            name for name in tables if not name.startswith(("stud", "trial", "version_info", "alembic", "search_"))
        }
        if others and not {"studies", "trials", "version_info"} <= tables:
            raise UserError(
                f"storage {without_password(url)} holds something else (tables {', '.join(sorted(others)[:3])}); "
                "give a new file or an empty database"
            )
        if url.drivername == "sqlite":
            with engine.connect() as connection:
                connection.execute(sa.text("PRAGMA journal_mode=WAL"))
        return complete
    finally:
        engine.dispose()


@contextlib.contextmanager
def exclusive_lock(url: URL, what: str, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a part of a storage. It ends with the process, however that ends.

    Args:
        url: of the storage.
        what: is held, such as a study's finale.
        wait: until no other process holds it.

    Yields:
        whether it is held; always true with ``wait``.
    """
    if url.drivername == "sqlite":
        path = Path(f"{url.database}.{what}.lock")
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(file_lock(path, wait))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
            yield held
        return
    engine = sa.create_engine(with_password(url), poolclass=sa.NullPool, connect_args=POSTGRESQL_CONNECTION)
    with engine.connect() as connection:
        key = sa.func.hashtext(f"block-search {what}")
        if wait:
            connection.execute(sa.select(sa.func.pg_advisory_lock(key)))
            held = True
        else:
            held = bool(connection.scalar(sa.select(sa.func.pg_try_advisory_lock(key))))
        connection.commit()
        yield held


def study_names(storage: RDBStorage) -> list[str]:
    """Names of all studies in a storage."""
    return sorted(optuna.get_all_study_names(storage))
