"""The options of `run`, and how a run ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import URL

from search.config.objective import CostName, Objective
from search.summary import Summary


@dataclass(frozen=True)
class RayOptions:
    """Options for workers that are tasks of a Ray cluster.

    Attributes:
        address: as `ray.init` takes it.
        cpus: CPUs of each worker; None: chosen from its nodes.
        install: whether every node first installs what this project needs, in this machine's versions.
    """

    address: str = "auto"
    cpus: float | None = None
    install: bool = False


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for; None means: as in the study file, as stored, or as measured.

    ``limits`` holds the limits to change; None removes one.
    """

    storage: URL
    study: str | None = None
    name: str | None = None
    trials: int | None = None
    seed: int | None = None
    objective: Objective | None = None
    limits: Mapping[CostName, float | None] = field(default_factory=dict)
    data_dir: Path | None = None
    dataset: str = "auto"
    device: str = "auto"
    out: Path | None = None
    artifacts: str | None = None
    timeout: float | None = None
    finale: bool = True
    warm_start: str | None = None
    workers: int | None = None
    workers_per_gpu: int | None = None
    ray: RayOptions | None = None
    dashboard: bool = False
    max_epochs: int | None = None
    train_images: int | None = None
    max_retrain_epochs: int | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: its summary, the output folder, and whether the budget is done."""

    summary: Summary
    out: Path
    finished: bool
