"""What a study needs to be repeated: versions, commit and machine."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

VERSIONED = ("torch", "torchvision", "optuna", "sqlalchemy", "numpy", "scikit-learn")


def environment() -> dict[str, str]:
    """Versions of Python and of what decides numbers, the project's commit where known, and the platform."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONED},
        "commit": commit(),
        "platform": platform.platform(),
    }


def commit() -> str:
    """The checkout's commit, marked ``+`` where files differ from it; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
