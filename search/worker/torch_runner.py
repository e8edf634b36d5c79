"""The seat at which networks are trained: a device, and the images on it. Importing this brings torch."""

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
from model.checkpoint import CheckpointWriter, remove_checkpoint
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
from search.worker.trial import run_attempt


@dataclass
class TorchRunner:
    """A worker's device, images and files."""

    worker: str
    worker_name: str
    device: torch.device
    split: Split
    files: Mirror
    _shortened: dict[int, Split] = field(default_factory=dict)
    _writer: CheckpointWriter | None = None

    def run(
        self, attempt: Attempt, config: StudyConfig, heart: Heartbeat, stop: StopRequest, show: Show
    ) -> TrialResult:
        path = self._checkpoint(attempt.lease.slot)

        def warn(error: Exception) -> None:
            cause = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
            show(Note(f"warning: no checkpoint, so a killed trial starts afresh: {path.parent}: {cause}"))

        self._writer = CheckpointWriter(path, warn, self.files.keep_up)
        return run_attempt(attempt, config, self._split_for(config), self._writer, self.files, heart, stop, show)

    def trouble(self, error: Exception) -> Failure:
        if isinstance(error, NonFiniteLossError):
            return "non-finite loss"
        if is_out_of_memory(error):
            return "out of memory"
        return "broken device" if is_broken_device(error) else "error"

    def forget(self, slot: int) -> None:
        if self._writer is not None:
            self._writer.wait()
        path = self._checkpoint(slot)
        remove_checkpoint(path)
        self.files.remove(path)

    def free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _split_for(self, config: StudyConfig) -> Split:
        count = config.trial.train_images or len(self.split.fit_labels)
        if count not in self._shortened:
            self._shortened = {count: first_images(self.split, count)}
        return self._shortened[count]

    def _checkpoint(self, slot: int) -> Path:
        return self.files.out / "checkpoints" / f"slot-{slot:06d}.safetensors"


def open_torch_runner(
    ledger: Ledger, study: optuna.Study, worker: str, options: WorkerOptions, show: Show
) -> TorchRunner:
    """Choose a device, and load the study's images onto it.

    Raises:
        UserError, DataError, ConfigError: no such device, not the study's images, or no boto3 for the study's store.
    """
    record = studies.record_of(study)
    assert record is not None
    files = mirror_of(study, options.out, show)
    torch.set_float32_matmul_precision("high")
    devices = {str(device): device for device in resolve_devices(options.device)}
    places = [DeviceOption(name, describe_device(device), _device_key(device)) for name, device in devices.items()]
    device = devices[take_device(ledger, worker, places).name]
    if device.type == "cpu":
        keep_freed_pages()
    else:
        torch.cuda.set_device(device)
    dataset = options.dataset or record.dataset.name
    source.prepare(dataset, options.data_dir, tell=lambda text: show(Note(text)))
    split = load_split(dataset, options.data_dir, DIVISION_SEED, device)
    studies.refuse_other_data(record, split.fingerprint)
    show(Note(f"worker {os.getpid()} on {describe_device(device)} works at study {record.name!r}"))
    name = f"{socket.gethostname()}:{os.getpid()}"
    return TorchRunner(worker, name, device, split, files)


def _device_key(device: torch.device) -> str:
    return device_key(device) or f"{pid_namespace()}/cpu"
