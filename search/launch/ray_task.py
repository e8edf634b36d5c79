"""What a Ray task does on its node: one command of `python -m search` as a child of its own.

Not in the task's own process, which Ray keeps for the next task: a broken GPU, a crash or a leak ends with the child.
Only the standard library is imported here; what a node lacks is the child's complaint, which travels back as text.
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from search.host.process import PARENT_VARIABLE

POLL_SECONDS = 0.2
"""How often the child is looked at. Ray's wish that the task end comes between two of Python's steps: short naps."""


@dataclass(frozen=True)
class NodeCommand:
    """A command for a node.

    Attributes:
        words: behind ``python -m search``.
        environment: beside the node's own; may hold a password, so it goes as an argument, which Ray shows nowhere, and
            not as a runtime environment, which its dashboard shows.
        patience: seconds that the child has to go when it is asked to.
        folder: whose files shall travel back in the end.
        files: that shall be in it in the beginning, where they are not.
    """

    words: tuple[str, ...]
    environment: dict[str, str]
    patience: float
    folder: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandResult:
    """How the child ended: exit status (negative: a signal), the last lines that it printed, the files it made."""

    status: int
    lines: str
    files: dict[str, bytes]


def run_command(order: NodeCommand) -> CommandResult:
    """Run a command until it ends; where the task is cancelled, the child is asked to go."""
    _place_files(order)
    environment = {**os.environ, **order.environment, PARENT_VARIABLE: str(os.getpid()), **_where()}
    child = subprocess.Popen(
        [sys.executable, "-m", "search", *order.words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    kept: deque[str] = deque(maxlen=50)

    def relay() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)  # into the node's log of this task
            kept.append(line)

    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
    except BaseException:  # Ray cancels a task by KeyboardInterrupt
        child.terminate()
        try:
            child.wait(order.patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    finally:
        reader.join(timeout=5)
    return CommandResult(child.returncode, "".join(kept), read_files(order.folder))


def _where() -> dict[str, str]:
    """Where the node keeps what this task prints, for `search.ledger.registry.read_logs`."""
    import ray

    context = ray.get_runtime_context()
    text = f"Ray node {ray.util.get_node_ip_address()}: ray logs task --id {context.get_task_id()}"
    return {"SEARCH_WORKER_LOG": text}


def _place_files(order: NodeCommand) -> None:
    for name, content in order.files.items():
        path = Path(str(order.folder)) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def read_files(folder: str | None) -> dict[str, bytes]:
    """The files of a folder, if it is there, by their names."""
    if folder is None or not Path(folder).is_dir():
        return {}
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
