"""Names of all user attributes of studies and trials, and the faults that an attempt can end with."""

from typing import Literal

WOULD_STOP = "would_stop"
"""User attribute of a trial: the epoch after which the pruner wanted to stop it."""

LIMITS = "limits"
"""User attribute of a search: the limits that its finale keeps to, so that whoever works at it knows them."""

CONFIRM_ENTRIES = "confirms"
"""User attribute of a confirming study: for each slot the trial of the search that it repeats, and the seed."""

SLOT, ATTEMPT, WORKER, START = "slot", "attempt", "worker", "start"
"""User attributes of a trial: which configuration of the budget it is, the how-manieth try at it, and whose."""

CAUSE, FAULT = "cause", "fault"
"""User attributes of a trial that did not end COMPLETE by itself: why, in words, and which `Fault`."""

Fault = Literal["killed", "lost", "preempted", "out of memory", "infeasible", "non-finite loss", "error"]

OVERHEAD = "overhead_seconds"
"""User attribute of trials that ended COMPLETE, or PRUNED for their accuracy: others break off in mid-epoch."""

PUBLISHED = "published"
"""User attribute of a study: what of it has been published (`_empty`)."""

RETRAIN, RETRAIN_PARTS = "retrain", "retrain_parts"
"""User attributes of a study: the retrain's whole result; the trainings of it that are done."""

RETRAIN_PROGRESS, HOLDOUT_READS = "retrain_progress", "holdout_reads"
"""User attributes of a study: where the retrain is; every read of the test images."""


CONFIRM_SUFFIX = ".confirm"
"""Ends the name of the study that confirms another one's best configurations (`search.finale.confirm`)."""


FINALE = "finale"
"""User attribute of a search: whether its end is followed by a confirmation and a retrain."""
ARTIFACTS = "artifacts"
"""User attribute of a study: the URL of the store (`search.artifacts.store`) that its files are copied to."""
