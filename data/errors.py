"""The one error that this package raises for what a user can mend."""


class DataError(Exception):
    """Images that are absent, damaged or not what was asked for; its text is one line for the user."""
