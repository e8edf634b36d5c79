"""What a Ray task does on its node: one command of `python -m search` as a child of its own.

Not in the task's own process, which Ray keeps for the next task: a broken GPU, a crash or a leak ends with the child.
Only the standard library is imported here; if a node lacks something, the child says so, and its text travels back.
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
"""How often the child is polled. Ray's cancellation arrives between two of Python's steps, so the naps are short."""


@dataclass(frozen=True)
class NodeCommand:
    """A command for a node.

    Attributes:
        words: after ``python -m search``.
        environment: on top of the node's own. It may hold a password, so it is passed as an argument, which Ray shows
            nowhere, and not as a runtime environment, which its dashboard shows.
        patience: seconds that the child has to stop when it is asked to.
        folder: whose files travel back at the end.
        files: written into it at the beginning, if they are absent.
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


def run_command(command: NodeCommand) -> CommandResult:
    """Run a command until it ends; if the task is cancelled, ask the child to stop."""
    _write_missing_files(command)
    environment = {**os.environ, **command.environment, PARENT_VARIABLE: str(os.getpid()), **_log_location()}
    child = subprocess.Popen(
        [sys.executable, "-m", "search", *command.words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last_lines: deque[str] = deque(maxlen=50)

    def relay() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)  # into the node's log of this task
            last_lines.append(line)

    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
    except BaseException:  # Ray cancels a task by KeyboardInterrupt
        child.terminate()
        try:
            child.wait(command.patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    finally:
        reader.join(timeout=5)
    return CommandResult(child.returncode, "".join(last_lines), read_files(command.folder))


def _log_location() -> dict[str, str]:
    """Where the node keeps what this task prints, for `search.ledger.registry.read_logs`."""
    import ray

    context = ray.get_runtime_context()
    text = f"Ray node {ray.util.get_node_ip_address()}: ray logs task --id {context.get_task_id()}"
    return {"SEARCH_WORKER_LOG": text}


def _write_missing_files(command: NodeCommand) -> None:
    for name, content in command.files.items():
        path = Path(str(command.folder)) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def read_files(folder: str | None) -> dict[str, bytes]:
    """The files of a folder, if it is there, by their names."""
    if folder is None or not Path(folder).is_dir():
        return {}
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
