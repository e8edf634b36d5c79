"""Trains networks: a device, and the images on it. Importing this imports torch."""

import gc
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import torch

from data import source
from data.errors import first_line
from data.split import DIVISION_SEED, Split, first_images, load_split
from model import checkpoint
from model.checkpoint import CheckpointWriter
from model.device import describe_device, device_key, keep_freed_pages, resolve_devices
from model.fit import NonFiniteLossError
from search import study as studies
from search.artifacts.mirror import Mirror, mirror_of
from search.config.study_file import StudyConfig
from search.events import Note, Show
from search.host.process import pid_namespace
from search.ledger.attempts import Attempt
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Ledger
from search.ledger.registry import DeviceOption, take_device
from search.worker.memory import is_broken_device, is_out_of_memory
from search.worker.runner import Failure, TrialResult, WorkerOptions
from search.worker.stop import StopRequest
from search.worker.trial import TrialContext, run_trial


@dataclass
class TorchRunner:
    """A worker's images, on its device, and its files."""

    worker_name: str
    split: Split
    mirror: Mirror
    _shortened: dict[int, Split] = field(default_factory=dict)
    _writer: CheckpointWriter | None = None

    def run(
        self, attempt: Attempt, config: StudyConfig, heartbeat: Heartbeat, stop: StopRequest, show: Show
    ) -> TrialResult:
        path = self._checkpoint(attempt.lease.slot)

        def warn(error: Exception) -> None:
            cause = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
            show(Note(f"warning: no checkpoint, so a killed trial starts afresh: {path.parent}: {cause}"))

        self._writer = CheckpointWriter(path, warn, self.mirror.upload_if_reachable)
        split = self._split_for(config)
        return run_trial(TrialContext(attempt, config, split, self._writer, self.mirror, heartbeat, stop, show))

    def classify_failure(self, error: Exception) -> Failure:
        if isinstance(error, NonFiniteLossError):
            return Failure.NON_FINITE_LOSS
        if is_out_of_memory(error):
            return Failure.OUT_OF_MEMORY
        return Failure.BROKEN_DEVICE if is_broken_device(error) else Failure.ERROR

    def remove_checkpoint(self, slot: int) -> None:
        if self._writer is not None:
            self._writer.wait()
        path = self._checkpoint(slot)
        checkpoint.remove_checkpoint(path)
        self.mirror.remove(path)

    def free_memory(self) -> None:
        gc.collect()
        if self.split.fit_images.device.type == "cuda":
            torch.cuda.empty_cache()

    def _split_for(self, config: StudyConfig) -> Split:
        """The study's images, without those that it leaves out; the last number of images is kept."""
        count = config.trial.train_images or len(self.split.fit_labels)
        if count not in self._shortened:
            self._shortened = {count: first_images(self.split, count)}
        return self._shortened[count]

    def _checkpoint(self, slot: int) -> Path:
        return self.mirror.out / "checkpoints" / f"slot-{slot:06d}.safetensors"


def open_torch_runner(
    ledger: Ledger, study: optuna.Study, worker: str, options: WorkerOptions, show: Show
) -> TorchRunner:
    """Choose a device, and load the study's images onto it.

    Raises:
        UserError, DataError, ConfigError: no such device, not the study's images, or no boto3 for the study's store.
    """
    record = studies.record_of(study)
    assert record is not None
    mirror = mirror_of(study, options.out, show)
    torch.set_float32_matmul_precision("high")
    devices = {str(device): device for device in resolve_devices(options.device)}
    choices = [DeviceOption(name, describe_device(device), _device_key(device)) for name, device in devices.items()]
    device = devices[take_device(ledger, worker, choices).name]
    if device.type == "cpu":
        keep_freed_pages()
    else:
        torch.cuda.set_device(device)
    dataset = options.dataset or record.dataset.name
    source.prepare(dataset, options.data_dir, notify=lambda text: show(Note(text)))
    split = load_split(dataset, options.data_dir, DIVISION_SEED, device)
    studies.refuse_other_data(record, split.fingerprint)
    show(Note(f"worker {os.getpid()} on {describe_device(device)} works at study {record.name!r}"))
    return TorchRunner(f"{socket.gethostname()}:{os.getpid()}", split, mirror)


def _device_key(device: torch.device) -> str:
    return device_key(device) or f"{pid_namespace()}/cpu"
