"""The exit statuses of this project's commands, which launchers, job scripts and Kubernetes read."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ended. A crash ends with FAILED, or with a signal, which is no exit status."""

    OK = 0
    FAILED = 1
    WRONG_INPUT = 2
    """Trying again will not help: the input has to change."""
    INTERRUPTED = 130
    """The process was asked to stop, as shells report it after Ctrl-C."""
