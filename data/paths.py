"""Where data is on this machine. Importing this does not import torch."""

import os
from pathlib import Path


def data_folder(given: Path | None) -> Path:
    """``--data-dir``, else ``$SEARCH_DATA_DIR``, else a folder in the user's cache."""
    if given is not None:
        return given.expanduser()
    if from_environment := os.environ.get("SEARCH_DATA_DIR"):
        return Path(from_environment).expanduser()
    return cache_folder() / "data"


def cache_folder() -> Path:
    """Where this project keeps what it can recreate (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "block-search"
