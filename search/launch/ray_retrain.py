"""The retrain of a search's winner on a node of a Ray cluster."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace

import ray

from data.errors import RunError, UserError
from search.events import Note, Show
from search.host.exit_status import ExitStatus
from search.launch.base import LEAVE_SECONDS, StudyLocation, last_line
from search.launch.ray_cluster import Cluster, WorkerResources, alive_nodes, submit, task_result
from search.launch.ray_task import read_files

RETRAIN_POLL_SECONDS = 2.0
"""How often the study is asked how far its retrain is."""


def retrain_on(
    cluster: Cluster, study: StudyLocation, max_epochs: int | None, progress: Callable[[], str], show: Show
) -> None:
    """Retrain a search's winner on a node, by `python -m search retrain`, and bring the saved model here.

    Args:
        cluster: that has the node.
        study: the search. No process may hold its finale, which the node's process takes.
        max_epochs: of a training, at most.
        progress: gives a line that says where the retrain is; empty while nothing is known.
        show: gets events.

    Raises:
        UserError, RunError: the retrain's own error message.
    """
    share = cluster.share
    if not share.gpus:  # one training by itself: all of the largest node
        share = WorkerResources(max(node.resources.get("CPU", 1.0) for node in alive_nodes()), 0.0)
    gpus = math.ceil(share.gpus)
    most = () if max_epochs is None else ("--max-retrain-epochs", str(max_epochs))
    best = study.out / "best"
    # With the files of last time: a retrain that is done finds its model and does nothing.
    folder = str(best.resolve())
    command = replace(cluster.node_command("retrain", study, most, {}), folder=folder, files=read_files(folder))
    show(Note(f"retrain on a node of the Ray cluster, with {gpus} GPUs and {share.cpus:g} CPUs"))
    ref = submit(command, WorkerResources(share.cpus, gpus), f"search retrain of {study.name}")
    shown = ""
    try:
        while (result := task_result(ref)) is None:
            time.sleep(RETRAIN_POLL_SECONDS)
            if (line := progress()) not in ("", shown):
                shown = line
                show(Note(shown))
    except BaseException:
        with contextlib.suppress(Exception):
            ray.cancel(ref)
            ray.wait([ref], timeout=LEAVE_SECONDS)
        raise
    if result.status:
        message = last_line(result.lines)
        raise (
            UserError(message)
            if result.status == ExitStatus.WRONG_INPUT
            else RunError(f"the retrain failed: {message}")
        )
    best.mkdir(parents=True, exist_ok=True)
    for name, content in result.files.items():
        (best / name).write_bytes(content)
