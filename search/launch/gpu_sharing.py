"""How many workers share each GPU, decided from what is measured while they train. Brings no torch.

It starts with one worker on each GPU. Another one is added if the GPU is idle for much of the time and both its
memory and the host's have room. Whether that one paid is measured before the next. No worker is ever removed.

None of the thresholds below was measured on a GPU: they are a judgement.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from search.attributes import FAULT, IMAGES_PER_SECOND, PEAK_MEMORY, SECONDS, WORKER, Fault
from search.launch.nvidia_smi import GpuReader, GpuSample, gpu_key
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow, WorkerState

MOST_PER_GPU = 4
BUSY = 70.0
"""Median utilisation, in per cent, at which a GPU is busy enough."""
ROOM = 1.3
"""Free memory that another worker needs, in multiples of the largest one's so far: configurations to come may be
larger than those that were measured."""
GAIN = 1.1
"""Throughput that a worker must bring, as a multiple of that without it, before the next one is added."""
SAMPLES, SPAN_SECONDS = 10, 20.0
"""Samples, and the seconds that they span, that a decision needs."""
TRIALS_PER_WORKER = 3
"""Trials, begun and ended with the present workers, that a decision needs: configurations differ."""
CORES_PER_WORKER = 2
HOST_BYTES_PER_WORKER = 2 * 2**30
CONTEXT_BYTES = 2**29
"""A process's CUDA context, which the peak of torch's allocator does not contain."""

WINDOW = 150
"""The median is taken of this many of the latest samples, five minutes of them."""
SPACING_SECONDS = 30.0
"""Between two workers that are added on one machine, so that the first one's memory shows before the second starts."""

GIB = 2**30
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class HostLoad:
    """How much of this machine is taken.

    Attributes:
        workers: that this machine is to have by now.
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
        gain: throughput as a multiple of that with one worker fewer; None if that was not measured.
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
    """Why a GPU that was measured gets no other worker; None: it gets one.

    Args:
        load: of the GPU.
        host: of the machine.
        at_work: workers of the study, on all machines.
        waiting: configurations that wait for a worker.
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
    target: int = 1
    """Workers that it is to have; nothing is measured until all train."""
    phase: _Phase | None = None
    largest: int = 0
    speeds: dict[int, float] = field(default_factory=dict)
    """Images per second of all its workers together, by their number."""
    told_reasons: set[tuple[int, str]] = field(default_factory=set)
    closed: bool = False
    """Whether the last worker did not pay. Not measured again: some day it would seem to pay by chance."""


class GpuMonitor:
    """Watches the GPUs that workers of this machine train on and says which one gets another worker."""

    def __init__(self, ledger: Ledger, tell: Callable[[str], None], reader: GpuReader | None = None) -> None:
        self._ledger, self._tell = ledger, tell
        self._reader = GpuReader() if reader is None else reader
        self._gpus: dict[str, _Gpu] = {}
        self._added = -SPACING_SECONDS
        self._told_trouble = False

    def look(self, rows: Sequence[WorkerRow], names: Mapping[str, str], host: HostLoad, waiting: int) -> str | None:
        """Take in what was measured since the last look, and decide; never waits.

        Args:
            rows: all workers of the study.
            names: of the GPUs that this machine's workers train on, by their key, such as ``cuda:0``.
            host: the machine.
            waiting: configurations that wait for a worker.

        Returns:
            the name of the GPU on which another worker is to start.
        """
        samples = {sample.key: sample for sample in self._reader.read_gpus()}
        if self._reader.trouble is not None and not self._told_trouble:
            self._told_trouble = True
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
                self._added, gpu.target = time.monotonic(), load.workers + 1
                return name
            gpu.closed = load.gain is not None and load.gain < GAIN
            _tell_once(gpu, load.workers, why, self._tell, f"{state}: no further worker: {why}")
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
            _tell_once(gpu, 0, "unknown", self._tell, text)
            return None
        training = [row for row in rows if row.lives and gpu_key(row.device_key) == key]
        if len(training) < gpu.target or any(row.state != WorkerState.WORKING for row in training):
            return None
        workers, moment = frozenset(row.id for row in training), time.monotonic()
        phase = gpu.phase
        if phase is None or phase.workers != workers:
            phase = gpu.phase = _Phase(workers, len(self._trials()), moment, moment)
        phase.last = moment
        phase.busy.append(sample.utilisation)
        phase.used = max(phase.used, sample.used)
        gpu.largest = max(gpu.largest, sample.used // len(training))
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
    """Images per second of a trial that has ended; 0 if none was trained."""
    ended = trial.state.is_finished() and trial.user_attrs.get(SECONDS, 0) > 0
    return float(trial.user_attrs.get(IMAGES_PER_SECOND, 0)) if ended else 0.0


def _tell_once(gpu: _Gpu, workers: int, why: str, tell: Callable[[str], None], text: str) -> None:
    if (workers, why) not in gpu.told_reasons:
        gpu.told_reasons.add((workers, why))
        tell(text)
