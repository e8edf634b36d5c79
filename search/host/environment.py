"""What the repetition of a study needs: versions, commit and machine."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

VERSIONED = ("torch", "torchvision", "optuna", "sqlalchemy", "numpy", "scikit-learn")


def environment() -> dict[str, str]:
    """Versions of Python and of what decides numbers, the project's commit if known, and the platform."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONED},
        "commit": commit(),
        "platform": platform.platform(),
    }


def required() -> tuple[str, ...]:
    """What this project depends on, without extras, in the versions that are installed here."""
    needs = [need for need in metadata.requires("block-search") or () if "extra ==" not in need]
    return tuple(
        f"{name}=={metadata.version(name)}" for name in (re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs)
    )


def differences(other: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What decides numbers and differs between two `environment`s; empty if nothing does."""
    both = {name: (other.get(name, "unknown"), here.get(name, "unknown")) for name in (*VERSIONED, "commit")}
    return ", ".join(
        f"{name} {version} (here {local})"
        for name, (version, local) in both.items()
        if version != local and "unknown" not in (version, local)
    )


def commit() -> str:
    """The checkout's commit, marked ``+`` if files differ from it; outside a checkout ``$SEARCH_COMMIT``, which an
    image is built with, else ``unknown``.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("SEARCH_COMMIT") or "unknown"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
