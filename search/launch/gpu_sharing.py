"""How many workers share each GPU, decided from what is measured while they train. Brings no torch.

It starts with one worker on each GPU. Another one is added where the GPU is idle for much of the time and its memory,
and the host's, has room; whether that one paid is measured before the next. No worker is ever taken away.

None of the thresholds below was measured on a GPU: they are judgement.
"""

import contextlib
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from search.attributes import FAULT, IMAGES_PER_SECOND, PEAK_MEMORY, SECONDS, WORKER, Fault
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow

MOST_PER_GPU = 4
BUSY = 70.0
"""Median utilisation in per cent from which on a GPU is busy enough."""
ROOM = 1.3
"""Free memory that another worker needs, in multiples of the largest one's so far: configurations to come may be
larger than those that were measured."""
GAIN = 1.1
"""Throughput that a worker must have brought, as a multiple of that without it, before the next one is added."""
SAMPLES, SPAN_SECONDS = 10, 20.0
"""Samples, and the time that they span, without which nothing is decided."""
TRIALS_PER_WORKER = 3
"""Trials, begun and ended with the present workers, without which nothing is decided: configurations differ."""
CORES_PER_WORKER = 2
HOST_BYTES_PER_WORKER = 2 * 2**30
CONTEXT_BYTES = 2**29
"""A process's CUDA context, which the peak of torch's allocator does not contain."""

EVERY_SECONDS, TIMEOUT_SECONDS = 2.0, 10.0
WINDOW = 150
"""The latest samples, five minutes of them, that the median is taken of."""
SPACING_SECONDS = 30.0
"""Between two workers that are added on one machine, so that the host's memory shows the first before the second."""

QUERY = "--query-gpu=uuid,utilization.gpu,memory.used,memory.total"
COMMAND = ("nvidia-smi", QUERY, "--format=csv,noheader,nounits")
MIB, GIB = 2**20, 2**30
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class GpuSample:
    """What nvidia-smi says of one GPU; None where it does not say it.

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
    """A UUID in the one form that is compared here: nvidia-smi puts ``GPU-`` before it, torch does not."""
    return uuid.strip().lower().removeprefix("gpu-")


def parse_gpus(text: str) -> tuple[GpuSample, ...]:
    """Read nvidia-smi's lines; what is not a number, such as ``[N/A]`` under MIG, is None, other lines are left out."""
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
    """Runs nvidia-smi every few seconds, beside a loop that asks for its answer and never waits for it."""

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
            said = text.strip().partition("\n")[0]
            self.trouble = f"{self._command[0]} ended with status {status} and shows no GPU" + (said and f": {said}")
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
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError as error:
            self.trouble = f"{self._command[0]} cannot be run ({error.strerror})"

    def close(self) -> None:
        """End what still runs."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs holds it even against that
                child.wait(timeout=1)
            if child.stdout is not None:
                child.stdout.close()


@dataclass(frozen=True)
class HostLoad:
    """The machine's side of it.

    Attributes:
        workers: that this machine shall have by now.
        cores: of the CPU.
        memory: bytes that are free.
    """

    workers: int
    cores: int
    memory: int


@dataclass(frozen=True)
class GpuLoad:
    """What was measured at one GPU since its present workers have been training.

    Attributes:
        workers: that train on it.
        samples, seconds, trials: how much was measured.
        busy: median utilisation, per cent.
        used, total: its memory in bytes: the most that was taken, and all.
        largest: bytes that the largest worker took, its context included, ever.
        ran_out: whether a trial ever ran out of its memory.
        gain: throughput as a multiple of that with one worker fewer; None where that was not measured.
    """

    workers: int
    samples: int
    seconds: float
    trials: int
    busy: float
    used: int
    total: int
    largest: int
    ran_out: bool = False
    gain: float | None = None


def is_measured(load: GpuLoad) -> bool:
    """Whether enough was measured to decide anything."""
    enough = load.samples >= SAMPLES and load.seconds >= SPAN_SECONDS
    return enough and load.trials >= TRIALS_PER_WORKER * load.workers


def why_no_more_workers(load: GpuLoad, host: HostLoad, at_work: int, waiting: int) -> str | None:
    """Why no other worker shall start on a GPU that was measured; None: it shall.

    Args:
        load: of the GPU.
        host: of the machine.
        at_work: workers of the study, on all machines.
        waiting: configurations that wait for one.
    """
    if load.workers >= MOST_PER_GPU:
        return f"{MOST_PER_GPU} are the most"
    if load.gain is not None and load.gain < GAIN:
        return f"with the {ORDINALS[load.workers - 1]} one it trains only {load.gain:.2f} times as many images"
    if load.busy >= BUSY:
        return "it is busy enough"
    if load.ran_out:
        return "a trial ran out of its memory"
    if load.total - load.used < ROOM * load.largest:
        return f"a worker takes up to {_gib(load.largest)} GiB, and {ROOM} times that is not free"
    if host.cores < CORES_PER_WORKER * (host.workers + 1):
        return f"every worker wants {CORES_PER_WORKER} of the host's {host.cores} cores"
    if host.memory < HOST_BYTES_PER_WORKER:
        return f"it wants {_gib(HOST_BYTES_PER_WORKER)} GiB of the host's memory"
    if waiting < at_work:
        return "fewer configurations wait than workers are there"
    return None


def _gib(count: int) -> str:
    return f"{count / GIB:.0f}" if count >= 10 * GIB else f"{count / GIB:.1f}".removesuffix(".0")


@dataclass
class _Phase:
    """What is measured while the same workers train on one GPU."""

    workers: frozenset[str]
    first_trial: int
    """Trials below this number began with other workers."""
    began: float
    last: float
    busy: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    used: int = 0


@dataclass
class _Gpu:
    wanted: int = 1
    """Workers that it shall have; until all train, nothing is measured."""
    phase: _Phase | None = None
    largest: int = 0
    speeds: dict[int, float] = field(default_factory=dict)
    """Images a second of all its workers together, by their number."""
    told: set[tuple[int, str]] = field(default_factory=set)
    closed: bool = False
    """Whether the last worker did not pay; asked again and again, chance would say one day that it did."""


class GpuMonitor:
    """Watches the GPUs of a team of workers and says where another one shall start."""

    def __init__(self, ledger: Ledger, tell: Callable[[str], None], reader: GpuReader | None = None) -> None:
        self._ledger, self._tell = ledger, tell
        self._reader = GpuReader() if reader is None else reader
        self._gpus: dict[str, _Gpu] = {}
        self._added = -SPACING_SECONDS
        self._told = False

    def look(self, rows: Sequence[WorkerRow], names: Mapping[str, str], host: HostLoad, waiting: int) -> str | None:
        """Take in what was measured since the last look, and decide; never waits.

        Args:
            rows: all workers of the study.
            names: of the GPUs that this machine's team trains on, by their key, such as ``cuda:0``.
            host: the machine.
            waiting: configurations that wait for a worker.

        Returns:
            the name of the GPU that another worker shall start on.
        """
        samples = {sample.key: sample for sample in self._reader.read_gpus()}
        if self._reader.trouble is not None and not self._told:
            self._told = True
            self._tell(
                f"{self._reader.trouble}, so no further worker will share a GPU; --workers-per-gpu sets a number"
            )
        if not samples:
            return None
        for key, name in names.items():
            gpu = self._gpus.setdefault(key, _Gpu())
            load = self._measure(gpu, key, samples.get(key), rows, name)
            settling = time.monotonic() - self._added < SPACING_SECONDS
            if load is None or not is_measured(load) or gpu.closed or settling:
                continue
            why = why_no_more_workers(load, host, sum(row.lives for row in rows), waiting)
            state = f"{name}: {load.busy:.0f} % busy, {_gib(load.used)} of {_gib(load.total)} GiB used"
            if why is None:
                self._tell(f"{state}: a {ORDINALS[load.workers]} worker starts")
                self._added, gpu.wanted = time.monotonic(), load.workers + 1
                return name
            gpu.closed = load.gain is not None and load.gain < GAIN
            _once(gpu, load.workers, why, self._tell, f"{state}: no further worker: {why}")
        return None

    def close(self) -> None:
        """End what still runs."""
        self._reader.close()

    def _measure(
        self, gpu: _Gpu, key: str, sample: GpuSample | None, rows: Sequence[WorkerRow], name: str
    ) -> GpuLoad | None:
        """The load of a GPU on which all workers train; None while they do not, or nothing can be known."""
        if sample is None or sample.utilisation is None or sample.used is None or sample.total is None:
            text = f"{name}: nvidia-smi does not say how busy it is (as under MIG), so no further worker will share it"
            _once(gpu, 0, "unknown", self._tell, text)
            return None
        there = [row for row in rows if row.lives and gpu_key(row.device_key) == key]
        if len(there) < gpu.wanted or any(row.state != "working" for row in there):
            return None
        workers, now = frozenset(row.id for row in there), time.monotonic()
        phase = gpu.phase
        if phase is None or phase.workers != workers:
            phase = gpu.phase = _Phase(workers, len(self._trials()), now, now)
        phase.last = now
        phase.busy.append(sample.utilisation)
        phase.used = max(phase.used, sample.used)
        gpu.largest = max(gpu.largest, sample.used // len(there))
        names = {row.name for row in rows if gpu_key(row.device_key) == key}
        return self._load(gpu, phase, sample.total, names)

    def _trials(self) -> list[FrozenTrial]:
        return self._ledger.storage.get_all_trials(self._ledger.study_id, deepcopy=False)

    def _load(self, gpu: _Gpu, phase: _Phase, total: int, names: set[str]) -> GpuLoad:
        trials = [trial for trial in self._trials() if trial.user_attrs.get(WORKER) in names]
        peaks = [trial.user_attrs.get(PEAK_MEMORY, 0) for trial in trials]
        gpu.largest = max([gpu.largest, *(peak + CONTEXT_BYTES for peak in peaks)])
        count = len(phase.workers)
        measured = [trial for trial in trials if trial.number >= phase.first_trial and _speed(trial)]
        if measured:
            seconds = sum(trial.user_attrs[SECONDS] for trial in measured)
            images = sum(_speed(trial) * trial.user_attrs[SECONDS] for trial in measured)
            gpu.speeds[count] = count * images / seconds
        before = gpu.speeds.get(count - 1)
        return GpuLoad(
            workers=count,
            samples=len(phase.busy),
            seconds=phase.last - phase.began,
            trials=len(measured),
            busy=statistics.median(phase.busy),
            used=phase.used,
            total=total,
            largest=gpu.largest,
            ran_out=any(trial.user_attrs.get(FAULT) == Fault.OUT_OF_MEMORY for trial in trials),
            gain=gpu.speeds[count] / before if before and count in gpu.speeds else None,
        )


def _speed(trial: FrozenTrial) -> float:
    """Images a second of a trial that has ended; 0 where none was trained."""
    ended = trial.state.is_finished() and trial.user_attrs.get(SECONDS, 0) > 0
    return float(trial.user_attrs.get(IMAGES_PER_SECOND, 0)) if ended else 0.0


def _once(gpu: _Gpu, workers: int, why: str, tell: Callable[[str], None], text: str) -> None:
    if (workers, why) not in gpu.told:
        gpu.told.add((workers, why))
        tell(text)
