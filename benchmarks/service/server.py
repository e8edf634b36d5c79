"""A PostgreSQL of our own that can be stopped and started."""

import os
import signal
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL

from search.storage.local_postgres import local_postgres


class PostgresServer:
    """Started at once; its files are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = local_postgres(folder)
        server = self._context.__enter__()
        self.url = server.url.set(password=server.password)

    def database(self, name: str) -> URL:
        """An empty database."""
        admin = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
        admin.dispose()
        return self.url.set(database=name)

    def stop(self) -> None:
        """Stop it at once, as a crash of its machine would; what it has on disk stays."""
        os.kill(self._pid(), signal.SIGQUIT)
        while Path(f"/proc/{self._last}").exists():
            time.sleep(0.05)

    def start(self) -> None:
        """Start it again, on its old port."""
        self._context = local_postgres(self._folder)
        self._context.__enter__()

    def shut_down(self) -> None:
        """Ask it to end for good."""
        os.kill(self._pid(), signal.SIGINT)

    def _pid(self) -> int:
        self._last = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        return self._last
