"""What every report of these benchmarks begins with, and how it is written."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from search.host.environment import commit

PACKAGES = ("optuna", "sqlalchemy", "psycopg")


def report_head(module: str, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """The command, the commit, the machine and the versions of ``packages``."""
    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in packages},
    }


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report as JSON, in a folder that is made if necessary; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
