"""What starting the command line costs."""

import subprocess
import sys

HEAVY = ("torch", "torchvision", "optuna", "sqlalchemy", "numpy", "matplotlib")


def test_the_command_line_starts_without_what_only_commands_need() -> None:
    code = f"import sys, search.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
