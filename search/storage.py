"""The database that a study lives in: SQLite or PostgreSQL, by any SQLAlchemy URL."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url

from data.lock import file_lock
from search.errors import UserError, first_line
from search.outage import Outage
from search.tables import TABLES

DEFAULT_URL = "sqlite:///studies/search.db"
BUSY_SECONDS = 60
"""How long a SQLite connection waits for another's write."""

POSTGRESQL_CONNECTION: dict[str, Any] = {
    "application_name": "block-search",
    "connect_timeout": 10,
    # A server that lost its power says nothing; without these a worker would wait for it for two hours ...
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
    ``$SEARCH_STORAGE_PASSWORD_FILE`` names. Where there is neither, libpq looks in ``$PGPASSWORD`` and ``~/.pgpass``.

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


def shown(url: URL) -> str:
    """The URL as it may be shown: without a password, wherever in the URL it stands."""
    secrets = {"password", "passfile", "sslpassword"}
    query = {key: value for key, value in url.query.items() if key not in secrets}
    return url.set(query=query).render_as_string(hide_password=True)


@dataclass
class _Gathered:
    """What shall be written of one trial in one transaction: values as they are stored, by name."""

    trial_id: int
    params: dict[str, tuple[float, str]] = field(default_factory=dict)
    user: dict[str, str] = field(default_factory=dict)
    system: dict[str, str] = field(default_factory=dict)


class PersistentStorage(RDBStorage):
    """Optuna's storage, each of whose calls lives through an outage (`search.outage`).

    Done twice, its calls give what they give done once, but for two: a trial may be created twice, and the end of
    a trial may be refused as told already. `search.ledger` knows of both.
    """

    def __init__(self, url: URL, engine_kwargs: dict[str, Any]) -> None:
        self.location = url
        """Its URL with the password, which only `shown` makes fit to be seen."""
        self.outage = Outage(shown(url))
        self._creation, self._gathering = threading.local(), threading.local()
        super().__init__(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)

    @contextlib.contextmanager
    def gathering(self, trial_id: int) -> Iterator[None]:
        """Write the parameters and attributes that this thread gives a trial meanwhile in one transaction, at the end.

        By themselves they are a transaction each: with six parameters and four attributes, ten in place of one. In
        Optuna's tables they are the same. They are written also where the context ends with an error.

        Raises:
            UpdateFinishedTrialError: the trial has ended; nothing is written.
        """
        gathered = self._gathering.now = _Gathered(trial_id)
        try:
            yield
        finally:
            self._gathering.now = None
            if gathered.params or gathered.user or gathered.system:
                self.outage.persist(lambda: self._write(gathered))

    def _write(self, gathered: _Gathered) -> None:
        insert = postgresql.insert if self.engine.dialect.name == "postgresql" else sqlite.insert
        trials = models.TrialModel.__table__
        # Locked as long as this lasts, so that it cannot end in between.
        state = sa.select(trials.c.state).where(trials.c.trial_id == gathered.trial_id).with_for_update(read=True)
        with self.engine.begin() as connection:
            # Not Optuna's own check, which reads the trial in another transaction: that one would wait for this one.
            if connection.execute(state).scalar_one().is_finished():
                raise UpdateFinishedTrialError(f"trial {gathered.trial_id} has ended and cannot be changed any more")
            for model, key, rows in (
                (models.TrialParamModel, "param_name", _param_rows(gathered)),
                (models.TrialUserAttributeModel, "key", _attribute_rows(gathered.user)),
                (models.TrialSystemAttributeModel, "key", _attribute_rows(gathered.system)),
            ):
                if rows:
                    new = insert(model).values([{"trial_id": gathered.trial_id, **row} for row in rows])
                    changed = {name: new.excluded[name] for name in rows[0] if name != key}
                    connection.execute(new.on_conflict_do_update(index_elements=["trial_id", key], set_=changed))

    def _gathered(self, trial_id: int) -> _Gathered | None:
        gathered: _Gathered | None = getattr(self._gathering, "now", None)
        return gathered if gathered is not None and gathered.trial_id == trial_id else None

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (gathered := self._gathered(trial_id)) is None:
            plain = super().set_trial_user_attr
            self.outage.persist(lambda: plain(trial_id, key, value))
        else:
            gathered.user[key] = json.dumps(value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (gathered := self._gathered(trial_id)) is None:
            plain = super().set_trial_system_attr
            self.outage.persist(lambda: plain(trial_id, key, value))
        else:
            gathered.system[key] = json.dumps(value)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        gathered = self._gathered(trial_id)
        # A process's first value of a parameter is for Optuna to compare with what others have stored.
        if gathered is None or previous_distribution is None:
            plain, known = super()._set_trial_param, previous_distribution
            self.outage.persist(lambda: plain(trial_id, param_name, param_value_internal, distribution, known))
        else:
            check_distribution_compatibility(previous_distribution, distribution)
            gathered.params[param_name] = (param_value_internal, distribution_to_json(distribution))

    @contextlib.contextmanager
    def checking(self, check: Callable[[sa.Connection], None]) -> Iterator[None]:
        """Run a check in the transaction of every trial that this thread creates meanwhile; it may raise."""
        self._creation.check = check
        try:
            yield
        finally:
            del self._creation.check

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        if check := getattr(self._creation, "check", None):
            check(session.connection())
        return super()._get_prepared_new_trial(study_id, template_trial, session)


def _param_rows(gathered: _Gathered) -> list[dict[str, Any]]:
    return [
        {"param_name": name, "param_value": value, "distribution_json": distribution}
        for name, (value, distribution) in gathered.params.items()
    ]


def _attribute_rows(attributes: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": value} for key, value in attributes.items()]


def _persistent(name: str) -> Callable[..., Any]:
    plain = getattr(RDBStorage, name)

    @functools.wraps(plain)
    def call(self: PersistentStorage, *args: Any, **kwargs: Any) -> Any:
        return self.outage.persist(lambda: plain(self, *args, **kwargs))

    return call


# What Optuna calls: the interface, and what its cache in front of a database calls past the interface.
STORAGE_CALLS = (
    *BaseStorage.__abstractmethods__,
    *("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id"),
    "get_trial_id_from_study_id_trial_number",
)
for _name in STORAGE_CALLS:
    if _name not in vars(PersistentStorage):  # which see to outages themselves
        setattr(PersistentStorage, _name, _persistent(_name))


def open_storage(url: URL) -> PersistentStorage:
    """Open, and where needed create, the database that the URL names.

    Raises:
        UserError: it cannot be reached, written, or was made by something else.
    """
    url = with_password(url)
    engine_kwargs: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername == "sqlite":
        engine_kwargs["connect_args"] = {"timeout": BUSY_SECONDS}
        _make_parent(url)
    else:
        engine_kwargs |= {"pool_size": 2, "max_overflow": 3, "connect_args": POSTGRESQL_CONNECTION}
    try:
        # Two processes that create the same tables at once would trip over each other.
        with contextlib.nullcontext() if _is_complete(url, engine_kwargs) else exclusive(url, "creation"):
            storage = PersistentStorage(url, engine_kwargs)
            if url.drivername == "sqlite":
                _begin_immediate(storage.engine)
            TABLES.create_all(storage.engine)
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
def opened(url: URL) -> Iterator[PersistentStorage]:
    """`open_storage` for as long as the context lasts; its connections are closed behind it."""
    storage = open_storage(url)
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
    engine.dispose()  # connections opened before this know nothing of it


def _without_secret(text: str, url: URL) -> str:
    return text.replace(str(url.password), "***") if url.password else text


def _make_parent(url: URL) -> None:
    parent = Path(str(url.database)).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"storage {shown(url)}: folder {parent} cannot be made: {error.strerror}") from error


def _is_complete(url: URL, engine_kwargs: dict[str, Any]) -> bool:
    """Whether all tables are there. Turns on SQLite's write-ahead log.

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
                f"storage {shown(url)} holds something else (tables {', '.join(sorted(others)[:3])}); "
                "give a new file or an empty database"
            )
        if url.drivername == "sqlite":
            with engine.connect() as connection:
                connection.execute(sa.text("PRAGMA journal_mode=WAL"))
        return complete
    finally:
        engine.dispose()


@contextlib.contextmanager
def exclusive(url: URL, what: str, wait: bool = True) -> Iterator[bool]:
    """Hold something of a storage alone: the hold ends with the process, however that ends.

    Args:
        url: of the storage.
        what: is held, such as a study's finale.
        wait: until nobody else holds it.

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


def network_file_system(url: URL, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The kind of network file system that a SQLite database lies on, whose locks cannot be trusted; else None."""
    if url.drivername != "sqlite":
        return None
    folder = Path(str(url.database)).resolve().parent
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    kinds = {Path(line[1].replace("\\040", " ")): line[2] for line in lines if len(line) > 2}
    for place in (folder, *folder.parents):
        if place in kinds:
            return kinds[place] if kinds[place].startswith(NETWORK_FILE_SYSTEMS) else None
    return None
