"""The database that a study lives in: SQLite or PostgreSQL, by any SQLAlchemy URL."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url

from search.errors import UserError, first_line

DEFAULT_URL = "sqlite:///studies/search.db"
BUSY_SECONDS = 60
"""How long a SQLite connection waits for another's write."""


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


def shown(url: URL) -> str:
    """The URL as it may be shown: without a password, wherever in the URL it stands."""
    secrets = {"password", "passfile", "sslpassword"}
    query = {key: value for key, value in url.query.items() if key not in secrets}
    return url.set(query=query).render_as_string(hide_password=True)


def open_storage(url: URL) -> RDBStorage:
    """Open, and where needed create, the database that the URL names.

    Raises:
        UserError: it cannot be reached, written, or was made by something else.
    """
    engine_kwargs: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername == "sqlite":
        engine_kwargs["connect_args"] = {"timeout": BUSY_SECONDS}
        _make_parent(url)
    try:
        _refuse_foreign(url, engine_kwargs)
        storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
    except (sa.exc.SQLAlchemyError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        raise UserError(f"storage {shown(url)} cannot be used: {_without_secret(first_line(cause), url)}") from error
    except RuntimeError as error:
        raise UserError(
            f"storage {shown(url)} was made by another version of Optuna: {first_line(error)}; "
            "upgrade it with: optuna storage upgrade --storage URL"
        ) from error
    return storage


@contextlib.contextmanager
def opened(url: URL) -> Iterator[RDBStorage]:
    """`open_storage` for as long as the context lasts; its connections are closed behind it."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _without_secret(text: str, url: URL) -> str:
    return text.replace(str(url.password), "***") if url.password else text


def _make_parent(url: URL) -> None:
    parent = Path(str(url.database)).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"storage {shown(url)}: folder {parent} cannot be made: {error.strerror}") from error


def _refuse_foreign(url: URL, engine_kwargs: dict[str, Any]) -> None:
    """Never add Optuna's tables to a database that holds something else; turn on SQLite's write-ahead log."""
    engine = sa.create_engine(url, **engine_kwargs)
    try:
        tables = set(sa.inspect(engine).get_table_names())
        if tables and not {"studies", "trials", "version_info"} <= tables:
            raise UserError(
                f"storage {shown(url)} holds something else (tables {', '.join(sorted(tables)[:3])}); "
                "give a new file or an empty database"
            )
        if url.drivername == "sqlite":
            with engine.connect() as connection:
                connection.execute(sa.text("PRAGMA journal_mode=WAL"))
    finally:
        engine.dispose()


@contextlib.contextmanager
def exclusive(url: URL, study_name: str) -> Iterator[None]:
    """Hold a study for one `run`: the hold ends with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    taken = UserError(f"study {study_name!r} is being run by another process; wait for it or stop it first")
    if url.drivername == "sqlite":
        with _file_lock(Path(f"{url.database}.{study_name}.lock"), taken):
            yield
        return
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        key = sa.func.hashtext(f"block-search {study_name}")
        if not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(key))):
            raise taken
        connection.commit()
        yield


@contextlib.contextmanager
def _file_lock(path: Path, taken: UserError) -> Iterator[None]:
    import fcntl

    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise taken from None
        yield


def study_names(storage: RDBStorage) -> list[str]:
    """Names of all studies in a storage."""
    return sorted(optuna.get_all_study_names(storage))
