"""What a worker sits at: its device, and the images on it. Importing this brings torch."""

import gc
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import torch

from data import source
from data.split import Split, first_images, load_split
from model.device import describe_device, device_key, keep_freed_pages, resolve_devices
from search import study as studies
from search.events import Note, Show
from search.ledger import Ledger
from search.process import place
from search.study import DIVISION_SEED
from search.study_file import StudyConfig
from search.worker import WorkerOptions
from search.workers import Place, take_device


@dataclass
class Seat:
    """A worker's device, images and folder."""

    worker: str
    worker_name: str
    device: torch.device
    split: Split
    checkpoints: Path
    _shortened: dict[int, Split] = field(default_factory=dict)

    def split_for(self, config: StudyConfig) -> Split:
        """The images that a trial uses."""
        count = config.trial.train_images or len(self.split.fit_labels)
        if count not in self._shortened:
            self._shortened = {count: first_images(self.split, count)}
        return self._shortened[count]

    def checkpoint(self, slot: int) -> Path:
        """Where the attempts at a slot keep their last epoch."""
        return self.checkpoints / f"slot-{slot:06d}.safetensors"

    def free_memory(self) -> None:
        """Give back what earlier trials left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def take_seat(ledger: Ledger, study: optuna.Study, worker: str, options: WorkerOptions, show: Show) -> Seat:
    """Choose a device, and load the study's images onto it.

    Raises:
        UserError, DataError, ConfigError: no such device, or not the study's images.
    """
    record = studies.record_of(study)
    assert record is not None
    torch.set_float32_matmul_precision("high")
    devices = {str(device): device for device in resolve_devices(options.device)}
    places = [Place(name, describe_device(device), _key(device)) for name, device in devices.items()]
    device = devices[take_device(ledger, worker, places).name]
    if device.type == "cpu":
        keep_freed_pages()
    else:
        torch.cuda.set_device(device)
    dataset = options.dataset or record.dataset.name
    source.prepare(dataset, options.data_dir)
    split = load_split(dataset, options.data_dir, DIVISION_SEED, device)
    studies.refuse_other_data(record, split.fingerprint)
    show(Note(f"worker {os.getpid()} on {describe_device(device)} works at study {record.name!r}"))
    name = f"{socket.gethostname()}:{os.getpid()}"
    return Seat(worker, name, device, split, options.out / "checkpoints")


def _key(device: torch.device) -> str:
    return device_key(device) or f"{place()}/cpu"
