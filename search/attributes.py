"""Names of all user attributes of studies and trials in Optuna's storage, and the faults of attempts."""

from enum import StrEnum

# Trials

SLOT, ATTEMPT, WORKER, START = "slot", "attempt", "worker", "start"
"""Which configuration of the budget, which attempt at it (from 1), by which worker, and which known good start."""

CONFIG, PARAMETERS, FLOPS, LATENCY, DEVICE = "config", "parameters", "flops", "latency", "device"
"""What is trained, its cost (latency in seconds), and the device that trains it."""

CURVE, SECONDS, IMAGES_PER_SECOND, PEAK_MEMORY = "curve", "seconds", "images_per_second", "peak_memory_bytes"
"""What was measured: every epoch, the attempt's seconds, its epochs' median speed, its peak memory."""

CAUSE, FAULT, TRACEBACK = "cause", "fault", "traceback"
"""Why a trial did not end COMPLETE by itself: in words, as a `Fault`, and the exception's traceback."""

OVERHEAD = "overhead_seconds"
"""Only for trials that ended COMPLETE, or PRUNED for their accuracy: others stop in the middle of an epoch."""

WOULD_STOP = "would_stop"
"""The epoch after which the pruner wanted to stop an audited trial."""

# Studies

DEFINITION, DATASET, SPACE_HASH, ENVIRONMENT = "definition", "dataset", "space_hash", "environment"
"""The study file, the images, the hash of what makes trials comparable, and the versions that began the study."""

FINALE = "finale"
"""Whether a confirmation and a retrain follow the search."""

ARTIFACTS = "artifacts"
"""URL of the store (`search.artifacts.store`) for copies of the study's files."""

LIMITS = "limits"
"""The limits of the search's finale, stored so that every process that works on it knows them."""

CONFIRM_ENTRIES = "confirms"
"""In a confirming study: for each slot, the trial of the search that it repeats, and the seed."""

CONFIRM_SUFFIX = ".confirm"
"""Ends the name of the study that confirms another one's best configurations (`search.finale.confirm`)."""

RETRAIN, RETRAIN_PARTS, RETRAIN_PROGRESS = "retrain", "retrain_parts", "retrain_progress"
"""The retrain's whole result, its finished trainings, and the progress of the current one."""

HOLDOUT_READS = "holdout_reads"
"""Every read of the test images."""

STUDY_SECONDS = "seconds"
"""Total seconds of the study's searches and finales."""

PUBLISHED = "published"
"""What has been published of the study (`search.dashboard.publish`)."""


class Fault(StrEnum):
    """Why an attempt did not end with an accuracy, as trials store it in their attribute `FAULT`."""

    KILLED = "killed"
    LOST = "lost"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out of memory"
    INFEASIBLE = "infeasible"
    NON_FINITE_LOSS = "non-finite loss"
    ERROR = "error"
