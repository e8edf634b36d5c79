"""Optuna's storage as this project uses it: it lives through outages, and asks the database for little.

It stores what Optuna stores, in Optuna's own tables, and plain Optuna can read and write them at the same time. The
calls that happen in every trial are rewritten with fewer statements: with hundreds of workers a study waits for the
database, and each statement is a wait of its worker.
"""

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL

from search.storage.retry import Retry
from search.storage.trial_queries import (
    ONE_TRIAL,
    STEPS,
    SYSTEM,
    TRIALS,
    TRIALS_AFTER,
    TRIALS_AFTER_AND_SOME,
    USER,
    read_trials,
)

STUDY_USER = models.StudyUserAttributeModel.__table__

OPEN = (TrialState.RUNNING, TrialState.WAITING)


@dataclass
class _Batch:
    """What is to be written of one trial in one transaction: values as they are stored, by name."""

    trial_id: int
    params: dict[str, tuple[float, str]] = field(default_factory=dict)
    user: dict[str, str] = field(default_factory=dict)
    system: dict[str, str] = field(default_factory=dict)


class RetryingStorage(RDBStorage):
    """Optuna's storage, each of whose calls lives through an outage (`search.storage.retry`).

    A call that is done twice gives the same result as once, with two exceptions: a trial may be created twice, and the
    end of a trial may be refused since it is stored already. `search.ledger` handles both.
    """

    def __init__(self, url: URL, shown: str, engine_kwargs: dict[str, Any]) -> None:
        self.location = url
        """Its URL with the password; show it through `search.storage.url.without_password` only."""
        self.retry = Retry(shown)
        self._creation, self._batches, self._reads = threading.local(), threading.local(), threading.local()
        super().__init__(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
        # A transaction by itself: without BEGIN and COMMIT, each of which is a wait for the server. SQLite's are begun
        # by an event (`search.storage.connect`), and cost nothing.
        postgres = self.engine.dialect.name == "postgresql"
        self._single = self.engine.execution_options(isolation_level="AUTOCOMMIT") if postgres else self.engine
        self._insert = postgresql.insert if postgres else sqlite.insert  # both can update what is there already

    def rows(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        """The rows of one statement, in a transaction of its own."""
        with self._single.begin() as connection:
            return connection.execute(query).all()

    def study_attribute(self, study_id: int, key: str) -> str | None:
        """The JSON text of one user attribute of a study, without reading the others."""
        query = sa.select(STUDY_USER.c.value_json).where(STUDY_USER.c.study_id == study_id, STUDY_USER.c.key == key)
        return next((row.value_json for row in self.retry.call(lambda: self.rows(query))), None)

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        """As Optuna's, which reads the trial's number for its message: within a transaction that would wait for itself,
        since trials are read on a connection of their own here.
        """
        if trial_state.is_finished():
            raise UpdateFinishedTrialError(f"trial {trial_id} has ended and cannot be changed any more")

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self.retry.call(lambda: self._read_trial(trial_id))

    def _read_trial(self, trial_id: int) -> FrozenTrial:
        with self._single.begin() as connection:
            trials = read_trials(connection, ONE_TRIAL, {"trial": trial_id})
        if not trials:
            raise KeyError(models.NOT_FOUND_MSG)
        return trials[0]

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self.retry.call(lambda: self._write_step(trial_id, step, intermediate_value))

    def _write_step(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """In one statement instead of Optuna's three."""
        stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(intermediate_value)
        # Locked, so that it cannot end in between.
        open_trial = (
            sa.select(
                TRIALS.c.trial_id,
                sa.literal(step, sa.Integer),
                sa.literal(stored, STEPS.c.intermediate_value.type),
                sa.literal(kind, STEPS.c.intermediate_value_type.type),
            )
            .where(TRIALS.c.trial_id == trial_id, TRIALS.c.state.in_(OPEN))
            .with_for_update(read=True)
        )
        columns = ["trial_id", "step", "intermediate_value", "intermediate_value_type"]
        new = self._insert(STEPS).from_select(columns, open_trial)
        changed = {name: new.excluded[name] for name in columns[2:]}
        written = new.on_conflict_do_update(index_elements=columns[:2], set_=changed).returning(STEPS.c.trial_id)
        if not self.rows(written):
            self.check_trial_is_updatable(trial_id, self._read_trial(trial_id).state)

    @contextlib.contextmanager
    def cached_reads(self) -> Iterator[None]:
        """Read the trials of a study at most once by this thread within the context.

        A sampler or a pruner asks for them up to three times in one decision. Later reads of Optuna's cache find
        nothing new, so it returns what it has.
        """
        self._reads.studies = set()
        try:
            yield
        finally:
            self._reads.studies = None

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        read = getattr(self._reads, "studies", None)
        if read is not None and trial_id_greater_than > -1:  # from the cache, which holds something
            if study_id in read:
                return []
            read.add(study_id)
        early = [trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than]
        query = TRIALS_AFTER_AND_SOME if early else TRIALS_AFTER
        values = {"study": study_id, "after": trial_id_greater_than, **({"some": early} if early else {})}

        def read_all() -> list[FrozenTrial]:
            with self._single.begin() as connection:
                trials = read_trials(connection, query, values)
            return trials if states is None else [trial for trial in trials if trial.state in states]

        return self.retry.call(read_all)

    @contextlib.contextmanager
    def batched_writes(self, trial_id: int) -> Iterator[None]:
        """Write the parameters and attributes that this thread gives a trial in one transaction, when the context ends.

        Otherwise each is a transaction: with six parameters and four attributes, ten instead of one. Optuna's tables
        hold the same. They are written also if the context ends with an error.

        Raises:
            UpdateFinishedTrialError: the trial has ended; nothing is written.
        """
        batch = self._batches.current = _Batch(trial_id)
        try:
            yield
        finally:
            self._batches.current = None
            if batch.params or batch.user or batch.system:
                self.retry.call(lambda: self._write(batch))

    def _write(self, batch: _Batch) -> None:
        trials = models.TrialModel.__table__
        # Locked as long as this lasts, so that it cannot end in between.
        state = sa.select(trials.c.state).where(trials.c.trial_id == batch.trial_id).with_for_update(read=True)
        with self.engine.begin() as connection:
            # Not Optuna's own check, which reads the trial in another transaction: that one would wait for this one.
            if connection.execute(state).scalar_one().is_finished():
                raise UpdateFinishedTrialError(f"trial {batch.trial_id} has ended and cannot be changed any more")
            for model, key, rows in (
                (models.TrialParamModel, "param_name", _param_rows(batch)),
                (models.TrialUserAttributeModel, "key", _attribute_rows(batch.user)),
                (models.TrialSystemAttributeModel, "key", _attribute_rows(batch.system)),
            ):
                if rows:
                    new = self._insert(model).values([{"trial_id": batch.trial_id, **row} for row in rows])
                    changed = {name: new.excluded[name] for name in rows[0] if name != key}
                    connection.execute(new.on_conflict_do_update(index_elements=["trial_id", key], set_=changed))

    def _batch_of(self, trial_id: int) -> _Batch | None:
        batch: _Batch | None = getattr(self._batches, "current", None)
        return batch if batch is not None and batch.trial_id == trial_id else None

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (batch := self._batch_of(trial_id)) is None:
            plain = super().set_trial_user_attr
            self.retry.call(lambda: plain(trial_id, key, value))
        else:
            batch.user[key] = json.dumps(value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (batch := self._batch_of(trial_id)) is None:
            plain = super().set_trial_system_attr
            self.retry.call(lambda: plain(trial_id, key, value))
        else:
            batch.system[key] = json.dumps(value)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        batch = self._batch_of(trial_id)
        # A process's first value of a parameter is for Optuna to compare with what others have stored.
        if batch is None or previous_distribution is None:
            plain, known = super()._set_trial_param, previous_distribution
            self.retry.call(lambda: plain(trial_id, param_name, param_value_internal, distribution, known))
        else:
            check_distribution_compatibility(previous_distribution, distribution)
            batch.params[param_name] = (param_value_internal, distribution_to_json(distribution))

    @contextlib.contextmanager
    def checked_creation(self, check: Callable[[sa.Connection], None]) -> Iterator[None]:
        """Run a check, which may raise, in the transaction of each trial that this thread creates in the context."""
        self._creation.check = check
        try:
            yield
        finally:
            del self._creation.check

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        """Within Optuna's transaction, which holds the study's row: no other trial of it can be created meanwhile."""
        connection: sa.Connection = session.connection()
        if check := getattr(self._creation, "check", None):
            check(connection)
        if template_trial is None or template_trial.params or template_trial.state != TrialState.RUNNING:
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        # Optuna counts the study's trials, which takes longer the more there are, and writes each attribute in two
        # statements. Here: the last one's number, and one statement for all. Ids of a study rise with its numbers.
        last = sa.select(TRIALS.c.number).where(TRIALS.c.study_id == study_id).order_by(TRIALS.c.trial_id.desc())
        number = connection.scalar(last.limit(1))
        row = models.TrialModel(
            study_id=study_id,
            number=0 if number is None else number + 1,
            state=TrialState.RUNNING,
            datetime_start=template_trial.datetime_start,
        )
        session.add(row)
        session.flush()
        for table, attributes in ((USER, template_trial.user_attrs), (SYSTEM, template_trial.system_attrs)):
            if attributes:
                written = _attribute_rows({key: json.dumps(value) for key, value in attributes.items()})
                connection.execute(
                    sa.insert(table).values([{"trial_id": row.trial_id, **attribute} for attribute in written])
                )
        return row


def _param_rows(batch: _Batch) -> list[dict[str, Any]]:
    return [
        {"param_name": name, "param_value": value, "distribution_json": distribution}
        for name, (value, distribution) in batch.params.items()
    ]


def _attribute_rows(attributes: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": value} for key, value in attributes.items()]


def _retried(name: str) -> Callable[..., Any]:
    plain = getattr(RDBStorage, name)

    @functools.wraps(plain)
    def call(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        return self.retry.call(lambda: plain(self, *args, **kwargs))

    return call


# What Optuna calls: the interface, and what its cache in front of a database calls past the interface.
STORAGE_CALLS = (
    *BaseStorage.__abstractmethods__,
    *("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id"),
    "get_trial_id_from_study_id_trial_number",
)
for _name in STORAGE_CALLS:
    if _name not in vars(RetryingStorage):  # these retry by themselves
        setattr(RetryingStorage, _name, _retried(_name))
