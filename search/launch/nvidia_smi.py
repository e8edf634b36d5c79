"""What nvidia-smi says of this machine's GPUs, asked every few seconds without waiting for the answer."""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

EVERY_SECONDS, TIMEOUT_SECONDS = 2.0, 10.0

QUERY = "--query-gpu=uuid,utilization.gpu,memory.used,memory.total"
COMMAND = ("nvidia-smi", QUERY, "--format=csv,noheader,nounits")
MIB = 2**20


@dataclass(frozen=True)
class GpuSample:
    """What nvidia-smi says of one GPU; None for what it does not say.

    Attributes:
        key: the UUID as torch prints it: without ``GPU-``.
        utilisation: per cent of the last moments in which anything ran on it.
        used, total: its memory in bytes, all processes together.
    """

    key: str
    utilisation: int | None
    used: int | None
    total: int | None


def gpu_key(uuid: str) -> str:
    """A UUID in the form that is compared here: nvidia-smi puts ``GPU-`` before it, torch does not."""
    return uuid.strip().lower().removeprefix("gpu-")


def parse_gpus(text: str) -> tuple[GpuSample, ...]:
    """Read nvidia-smi's lines; what is not a number, such as ``[N/A]`` under MIG, is None. Other lines are left out."""
    samples = []
    for line in text.splitlines():
        fields = [word.strip() for word in line.split(",")]
        if len(fields) == 4 and fields[0]:
            utilisation, used, total = (int(word) if word.isdecimal() else None for word in fields[1:])
            samples.append(GpuSample(gpu_key(fields[0]), utilisation, _bytes(used), _bytes(total)))
    return tuple(samples)


def _bytes(mebibytes: int | None) -> int | None:
    return None if mebibytes is None else mebibytes * MIB


class GpuReader:
    """Runs nvidia-smi every few seconds, for a loop that polls for its answer and never waits for it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.trouble: str | None = None
        """Why there will be no more samples."""
        self._command = command
        self._child: subprocess.Popen[str] | None = None
        self._began = -EVERY_SECONDS

    def read_gpus(self) -> tuple[GpuSample, ...]:
        """What was measured since the last call; mostly nothing."""
        if self.trouble is not None:
            return ()
        waited = time.monotonic() - self._began
        if self._child is None:
            if waited >= EVERY_SECONDS:
                self._start()
            return ()
        status = self._child.poll()
        if status is None:
            if waited > TIMEOUT_SECONDS:
                self.close()
                self.trouble = f"{self._command[0]} gave no answer within {TIMEOUT_SECONDS:g} s"
            return ()
        text, _ = self._child.communicate()
        self._child = None
        samples = parse_gpus(text) if status == 0 else ()
        if not samples:
            output = text.strip().partition("\n")[0]
            self.trouble = f"{self._command[0]} ended with status {status} and shows no GPU" + (
                output and f": {output}"
            )
        return samples

    def _start(self) -> None:
        self._began = time.monotonic()
        try:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        except OSError as error:
            self.trouble = f"{self._command[0]} cannot be run ({error.strerror})"

    def close(self) -> None:
        """End what still runs."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even a killed process
                child.wait(timeout=1)
            if child.stdout is not None:
                child.stdout.close()
