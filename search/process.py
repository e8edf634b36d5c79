"""Which process is which, also after a pid was given out again, and whether it still lives."""

import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process of one machine.

    Attributes:
        host: the machine's name, for people.
        place: names the one boot and pid namespace in which ``pid`` means something: two containers of one host
            have two, though they may have one host name.
        pid: the process's number there.
        started: its start in kernel ticks since boot, which tells it from a later process of the same number.
    """

    host: str
    place: str
    pid: int
    started: str

    @property
    def key(self) -> str:
        """A text that names this process within its place."""
        return f"{self.pid}@{self.started}"


def this_process() -> Process:
    """The calling process."""
    return Process(socket.gethostname(), place(), os.getpid(), _started(os.getpid()) or "")


@cache
def place() -> str:
    """Where this process's pid means something; nowhere else where the kernel does not say (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown/{socket.gethostname()}/{os.getpid()}"


def is_dead(place_: str, key: str) -> bool:
    """Whether a process (its place and `Process.key`) has certainly ended; False where that cannot be known."""
    if place_ != place():
        return False
    pid, _, started = key.partition("@")
    return bool(started) and _started(int(pid)) != started


def age() -> float | None:
    """Seconds since this process was created; None where the kernel does not say (not Linux)."""
    started = _started(os.getpid())
    if started is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def _started(pid: int) -> str | None:
    """Start time from the kernel; None where there is no such process, or it is a zombie."""
    try:
        # The name, in brackets, may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
