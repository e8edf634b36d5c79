"""Code for this very processor: C++ sources of this package, compiled once per machine.

A source is compiled by the C++ compiler found there (`$CXX`, c++, g++, clang++; a few seconds), for that very
processor, and kept in the cache folder. If there is no compiler, or a source does not compile because it needs
instructions that the processor lacks, the caller has other ways to do the same.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from data.paths import cache_folder

# No -ffast-math: a NaN must stay a NaN, so that a diverged training is seen.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-std=c++17")
LINK_FLAGS = ("-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled code of a source, loaded; None if it is not available."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    for folder in (cache_folder, _passing_folder):  # the cache may be in a place that cannot be written
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return ctypes.CDLL(str(_compiled(compiler, source, folder() / "compiled")))
    return None


def _passing_folder() -> Path:
    """A folder of this process alone, gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="block-search-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compiled(compiler: str, source: Path, folder: Path) -> Path:
    """The shared library of this source, compiler and processor, compiled if it does not exist yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout
    headers = (header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    parts = (source.read_bytes(), *headers, " ".join(FLAGS + LINK_FLAGS).encode(), version, _processor().encode())
    path = folder / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several workers may compile at once: each into a file of its own, and the last one's stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, *LINK_FLAGS, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_SECONDS)
            made.replace(path)
    return path


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by machines that differ."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() or platform.machine()
