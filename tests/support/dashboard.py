"""optuna-dashboard as this project serves it, in a process of its own."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.engine import URL

SERVER = """
import sys
from pathlib import Path
from search.dashboard.server import serve
from search.storage.connect import open_storage
from search.storage.url import storage_url

serve(open_storage(storage_url(sys.argv[1])), Path(sys.argv[2]), port=int(sys.argv[3]),
      ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@contextmanager
def served(url: URL, folder: Path, port: int) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The real server in a process of its own: its address."""
    command = [sys.executable, "-c", SERVER, url.render_as_string(hide_password=False), str(folder), str(port)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as response:
        content: bytes = response.read()
        return content


def page(address: str, study: optuna.Study) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(get(f"{address}api/studies/{study._study_id}"))
    return content
