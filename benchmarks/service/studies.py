"""Studies that are created for a measurement, without real images."""

from sqlalchemy.engine import URL

from search import study as studies
from search.config.study_file import StudyConfig, parse_study
from search.ledger.budget import request_budget
from search.ledger.leases import open_ledger
from search.storage.connect import storage_opened
from search.study import DatasetRecord, StudyRecord

SPACE = {
    "blocks": {"low": 3, "high": 6},
    "convs": {"low": 1, "high": 3},
    "width": {"low": 24, "high": 48, "step": 8},
    "lr": {"low": 0.05, "high": 1.0, "log": True},
    "augment": {"low": 0.2, "high": 0.6, "step": 0.05},
}

NO_IMAGES = DatasetRecord("digits", "none", ("0", "1"), 1, 1, False)


def sleeping_study(trials: int, epochs: int) -> StudyConfig:
    """A study of sleeping trials: random sampling, no pruning."""
    table = {
        "trials": trials,
        "trial": {"epochs": epochs},
        "space": SPACE,
        "sampler": {"kind": "random"},
        "pruner": {"kind": "none"},
        "workers": {"heartbeat": 1.0, "lost_after": 8.0},
        "retrain": {"epochs": 1},
    }
    return parse_study(table, "benchmarks/service/studies.py")


def create_study(url: URL, name: str, config: StudyConfig, dataset: DatasetRecord = NO_IMAGES) -> None:
    """Create a study, with its budget."""
    with storage_opened(url) as storage:
        studies.create(storage, StudyRecord(name, config, dataset), {})
        ledger, _ = open_ledger(storage, name, config.workers)
        request_budget(ledger, config.trials)
