"""How a command ended, as tests look at it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error, and nothing else there."""
        assert self.err.startswith("search: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("search: ").rstrip("\n")


Command = Callable[..., Ended]
