"""Which process is which, also after its pid was reused, and whether it still lives."""

import ctypes
import os
import signal
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PARENT_VARIABLE = "SEARCH_PARENT"
"""Environment variable: pid of the parent process whose end also ends the child."""


def end_with_parent() -> None:
    """Get SIGTERM when the process ends that `PARENT_VARIABLE` names; at once if it has ended. Linux only."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    set_parent_death_signal = 1  # prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Process:
    """One process of one machine.

    Attributes:
        host: the machine's name, for people.
        pid_namespace: names the one boot and pid namespace in which ``pid`` is valid: two containers of one host have
            two, though they may have one host name.
        pid: the process's number there.
        started: its start in kernel ticks since boot, which distinguishes it from a later process with the same number.
    """

    host: str
    pid_namespace: str
    pid: int
    started: str

    @property
    def key(self) -> str:
        """A text that names this process within its pid namespace."""
        return f"{self.pid}@{self.started}"


def is_key(text: str) -> bool:
    """Whether a text is a `Process.key`."""
    return "@" in text


def this_process() -> Process:
    """The calling process."""
    return Process(socket.gethostname(), pid_namespace(), os.getpid(), _started(os.getpid()) or "")


@cache
def pid_namespace() -> str:
    """Where this process's pid is valid; this process alone if the kernel does not say (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown/{socket.gethostname()}/{os.getpid()}"


def is_dead(namespace: str, key: str) -> bool:
    """Whether a process (its pid namespace and `Process.key`) has certainly ended; False if that cannot be known."""
    if namespace != pid_namespace():
        return False
    pid, _, started = key.partition("@")
    return bool(started) and _started(int(pid)) != started


def age() -> float | None:
    """Seconds since this process was created; None if the kernel does not say (not Linux)."""
    started = _started(os.getpid())
    if started is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def _started(pid: int) -> str | None:
    """Start time from the kernel; None if there is no such process, or it is a zombie."""
    try:
        # The name, in brackets, may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
