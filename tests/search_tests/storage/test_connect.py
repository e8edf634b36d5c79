import multiprocessing
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL, make_url

from data.errors import UserError
from search.storage.connect import exclusive_lock, open_storage, storage_opened, study_names
from search.storage.url import DEFAULT_URL, storage_url, without_password


def test_a_url_is_taken_from_option_environment_or_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_STORAGE", "sqlite:///from-environment.db")
    assert storage_url("sqlite:///given.db").database == "given.db"
    assert storage_url(None).database == "from-environment.db"
    monkeypatch.delenv("SEARCH_STORAGE")
    assert str(storage_url(None)) == DEFAULT_URL


@pytest.mark.parametrize("driver", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_way_to_say_postgresql_means_psycopg_3(driver: str) -> None:
    assert storage_url(f"{driver}://u@h/d").drivername == "postgresql+psycopg"
    socket = storage_url(f"{driver}://u@/d?host=/run/postgresql")
    assert socket.query["host"] == "/run/postgresql"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mysql://u:secret@h/d", "driver 'mysql' is not supported; write sqlite:///FILE"),
        ("postgresql+psycopg2://u:secret@h/d", "driver 'postgresql+psycopg2' is not supported"),
        ("not a url secret", "not a database URL; write sqlite:///FILE"),
        ("postgresql://u:secret@h:port/d", "not a database URL"),
        ("sqlite://", "needs a database that outlives the command"),
        ("sqlite:///:memory:", "needs a database that outlives the command"),
    ],
)
def test_other_storages_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        storage_url(text)
    assert complaint in str(error.value)
    assert "secret" not in str(error.value)


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=6, max_size=30))
def test_a_password_is_never_shown(password: str) -> None:
    password = f"pw{password}pw"
    url = URL.create("postgresql", "user", password, "host", 5432, "db", {"sslpassword": password})
    assert password not in without_password(storage_url(url.render_as_string(hide_password=False)))


def test_sqlite_folder_is_made_and_the_write_ahead_log_is_on(home: Path) -> None:
    storage = open_storage(storage_url("sqlite:///deep/down/study.db"))
    with storage.engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA busy_timeout")) == 60_000


def test_opening_twice_keeps_what_is_stored(any_storage: URL) -> None:
    with storage_opened(any_storage) as storage:
        optuna.create_study(storage=storage, study_name="kept")
    with storage_opened(any_storage) as storage:
        assert study_names(storage) == ["kept"]


def test_a_database_of_something_else_is_refused_and_left_alone(any_storage: URL) -> None:
    engine = sa.create_engine(any_storage)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE invoices (id INTEGER)"))
    with pytest.raises(
        UserError, match=r"holds something else .tables invoices.; give a new file or an empty database"
    ):
        open_storage(any_storage)
    assert sa.inspect(engine).get_table_names() == ["invoices"]
    engine.dispose()


def test_a_file_that_is_no_database_is_refused_and_left_alone(home: Path) -> None:
    path = home / "letter.db"
    path.write_text("Dear reader, this is no database. " * 40)
    content = path.read_bytes()
    with pytest.raises(UserError, match="cannot be used: file is not a database"):
        open_storage(storage_url(f"sqlite:///{path}"))
    assert path.read_bytes() == content


def test_a_database_of_an_older_optuna_is_refused_with_the_way_out(home: Path) -> None:
    url = storage_url(f"sqlite:///{home / 'old.db'}")
    open_storage(url).engine.dispose()
    connection = sqlite3.connect(home / "old.db")
    connection.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match=r"another version of Optuna: .*optuna storage upgrade"):
        open_storage(url)


def test_a_folder_that_cannot_be_made_is_named(home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(UserError, match=r"sqlite:///file/study.db: folder file cannot be made"):
        open_storage(storage_url("sqlite:///file/study.db"))


def test_a_server_that_is_not_there(unused_port: int) -> None:
    with pytest.raises(UserError, match=r"storage postgresql\+psycopg://u:\*\*\*@127.0.0.1.* cannot be used") as error:
        open_storage(storage_url(f"postgresql://u:topsecret@127.0.0.1:{unused_port}/d"))
    assert "topsecret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_password(postgres_url: str) -> None:
    url = make_url(postgres_url).set(username="guest", password="wrongsecret").render_as_string(hide_password=False)
    with pytest.raises(UserError, match="password authentication failed") as error:
        open_storage(storage_url(url))
    assert "wrongsecret" not in str(error.value)


def _hold(url: URL, held: "multiprocessing.synchronize.Event", let_go: "multiprocessing.synchronize.Event") -> None:
    with exclusive_lock(url, "one"):
        held.set()
        let_go.wait(60)


@pytest.fixture
def holder(any_storage: URL) -> "Callable[[], multiprocessing.context.SpawnProcess]":
    """Starts another process that holds the study ``one``."""
    context = multiprocessing.get_context("spawn")

    def start() -> "multiprocessing.context.SpawnProcess":
        held, let_go = context.Event(), context.Event()
        process = context.Process(target=_hold, args=(any_storage, held, let_go), daemon=True)
        process.start()
        assert held.wait(60)
        return process

    return start


def test_what_is_held_is_let_go_when_its_holder_dies(
    any_storage: URL, holder: "Callable[[], multiprocessing.context.SpawnProcess]"
) -> None:
    open_storage(any_storage).engine.dispose()
    process = holder()
    with exclusive_lock(any_storage, "one", wait=False) as held:
        assert not held
    with exclusive_lock(any_storage, "two", wait=False) as held:
        assert held
    process.kill()
    process.join()
    _eventually(lambda: _can_hold(any_storage))
    with exclusive_lock(any_storage, "one") as held:
        assert held


def _can_hold(url: URL) -> bool:
    with exclusive_lock(url, "one", wait=False) as held:
        return held


def _eventually(check: Callable[[], bool], seconds: float = 20) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)
