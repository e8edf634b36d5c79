"""Errors that end a command: what a user can correct, and what failed."""


class UserError(Exception):
    """Wrong usage or input: one line that says what is wrong and what would be right (exit status 2)."""


class DataError(UserError):
    """Images that are absent, damaged or not what was asked for."""


class RunError(Exception):
    """The run itself failed (exit status 1); what is stored stays."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
