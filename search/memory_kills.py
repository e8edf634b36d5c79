"""How often the kernel killed a process for want of memory."""

from pathlib import Path

COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def memory_kills(counters: tuple[Path, ...] = COUNTERS) -> int:
    """So far, in this container where it has a counter of its own, else on this machine; 0 where nobody counts."""
    for path in counters:
        try:
            words = path.read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0
