"""Cores, memory and out-of-memory kills of this machine or container."""

import os
from pathlib import Path

OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def oom_kills(counters: tuple[Path, ...] = OOM_COUNTERS) -> int:
    """Kills so far, in this container if it has a counter of its own, else on this machine; 0 if there is none."""
    for path in counters:
        try:
            words = path.read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0


def available_cores() -> int:
    """Cores that this process may use: of its affinity, at most its container's share."""
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
    """Bytes of memory that this process may still take: of the machine, at most its container's share."""
    free = _named_number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # The kernel frees on demand the part that only holds copies of files.
        held = int(used) - _named_number(group / "memory.stat", "inactive_file")
        return free if limit == "max" else max(0, min(free, int(limit) - held))
    except (OSError, ValueError):
        return free


def _named_number(path: Path, name: str) -> int:
    """The number after a name in a file of the kernel; 0 if there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(name) + 1])
    except (OSError, ValueError, IndexError):
        return 0
