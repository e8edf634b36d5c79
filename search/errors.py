"""Errors that a user can mend, told in one line."""

from data.errors import DataError
from model.config import ConfigError


class UserError(Exception):
    """Wrong usage or input: one line that says what is wrong and what would be right (exit status 2)."""


class RunError(Exception):
    """The run itself failed (exit status 1); what is stored stays."""


USER_ERRORS = (UserError, DataError, ConfigError)
"""Everything that ends the command with one line and exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
