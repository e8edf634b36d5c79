"""Cores, memory and out-of-memory kills of this machine or container."""

import os
from pathlib import Path

OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def oom_kills(counters: tuple[Path, ...] = OOM_COUNTERS) -> int:
    """So far, in this container where it has a counter of its own, else on this machine; 0 where nobody counts."""
    for path in counters:
        try:
            words = path.read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0


def available_cores() -> int:
    """Cores that this process may use: of its affinity, held to its container's share."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def threads_per_worker(workers: int) -> int:
    """Threads of each worker, the cores divided between them."""
    return max(1, available_cores() // max(1, workers))


def available_memory() -> int:
    """Bytes of memory that this process may still take: of the machine, held to its container's share."""
    free = _named_number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    group = Path("/sys/fs/cgroup")
    try:
        most, taken = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # Of what is taken, the kernel gives back what only holds copies of files.
        held = int(taken) - _named_number(group / "memory.stat", "inactive_file")
        return free if most == "max" else max(0, min(free, int(most) - held))
    except (OSError, ValueError):
        return free


def _named_number(path: Path, name: str) -> int:
    """The number after a name in a file of the kernel's; 0 where there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(name) + 1])
    except (OSError, ValueError, IndexError):
        return 0
