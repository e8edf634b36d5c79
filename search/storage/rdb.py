"""Optuna's storage as this project uses it: it lives through outages, and asks the database for little.

What is stored is what Optuna stores, in its own tables, and plain Optuna reads and writes it beside this. Those of its
calls that happen in every trial are written anew, in fewer statements: with hundreds of workers the database's time is
what a study waits for, and each statement is a wait of its worker.
"""

import contextlib
import datetime
import functools
import json
import math
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL

from search.storage.retry import Retry

TRIALS = models.TrialModel.__table__
PARAMS = models.TrialParamModel.__table__
USER = models.TrialUserAttributeModel.__table__
SYSTEM = models.TrialSystemAttributeModel.__table__
STEPS = models.TrialIntermediateValueModel.__table__
VALUES = models.TrialValueModel.__table__
STUDY_USER = models.StudyUserAttributeModel.__table__

OPEN = (TrialState.RUNNING, TrialState.WAITING)


def _parts(which: sa.ColumnElement[bool]) -> sa.CompoundSelect[Any]:
    """All that belongs to some trials, whatever it is, in rows of one shape: trial, kind, id, name, number and text."""

    def part(table: Any, kind: str, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        names = ("id", "name", "value", "text")
        labelled = [column.label(name) for name, column in zip(names, columns, strict=True)]
        constant = sa.literal_column(f"'{kind}'", sa.String).label("kind")
        return sa.select(table.c.trial_id, constant, *labelled).join(TRIALS).where(which)

    def text(column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
        return sa.cast(column, sa.String)

    no_number = sa.cast(sa.null(), sa.Double)
    param, user, system, step, value = PARAMS.c, USER.c, SYSTEM.c, STEPS.c, VALUES.c
    step_kind, value_kind = text(step.intermediate_value_type), text(value.value_type)
    return sa.union_all(
        part(PARAMS, "param", param.param_id, param.param_name, param.param_value, param.distribution_json),
        part(USER, "user", user.trial_user_attribute_id, user.key, no_number, user.value_json),
        part(SYSTEM, "system", system.trial_system_attribute_id, system.key, no_number, system.value_json),
        part(STEPS, "step", step.trial_intermediate_value_id, text(step.step), step.intermediate_value, step_kind),
        part(VALUES, "value", value.trial_value_id, text(value.objective), value.value, value_kind),
    )


@dataclass(frozen=True)
class _Reading:
    """Two statements, where Optuna has six or seven, that read trials: those themselves, and all that belongs to them.

    Made once: to make them takes longer than the database takes to answer.
    """

    trials: sa.Select[Any]
    parts: sa.CompoundSelect[Any]


def _reading(which: sa.ColumnElement[bool]) -> _Reading:
    return _Reading(sa.select(TRIALS).where(which).order_by(TRIALS.c.trial_id), _parts(which))


_AFTER = sa.and_(TRIALS.c.study_id == sa.bindparam("study"), TRIALS.c.trial_id > sa.bindparam("after"))
ONE = _reading(TRIALS.c.trial_id == sa.bindparam("trial"))
AFTER = _reading(_AFTER)
AFTER_AND_SOME = _reading(sa.or_(_AFTER, TRIALS.c.trial_id.in_(sa.bindparam("some", expanding=True))))


def _read(connection: sa.Connection, reading: _Reading, values: dict[str, Any]) -> list[FrozenTrial]:
    """Trials by their ids."""
    rows = connection.execute(reading.trials, values).all()
    parts: dict[int, list[sa.Row[Any]]] = {row.trial_id: [] for row in rows}
    for part in connection.execute(reading.parts, values) if rows else ():
        if part.trial_id in parts:  # no other that came a moment ago
            parts[part.trial_id].append(part)
    return [_frozen(row, parts[row.trial_id]) for row in rows]


def _frozen(row: sa.Row[Any], parts: Sequence[sa.Row[Any]]) -> FrozenTrial:
    """A trial as Optuna builds it (`RDBStorage._build_frozen_trial_from_trial_model`)."""
    kinds: dict[str, list[sa.Row[Any]]] = {"param": [], "user": [], "system": [], "step": [], "value": []}
    for part in parts:
        kinds[part.kind].append(part)
    params = sorted(kinds["param"], key=lambda part: part.id)
    values = sorted(kinds["value"], key=lambda part: int(part.name))
    distributions = {part.name: _distribution(part.text) for part in params}
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        values=[_number(part) for part in values] or None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        params={part.name: distributions[part.name].to_external_repr(part.value) for part in params},
        distributions=distributions,
        user_attrs={part.name: json.loads(part.text) for part in kinds["user"]},
        system_attrs={part.name: json.loads(part.text) for part in kinds["system"]},
        intermediate_values={int(part.name): _number(part) for part in kinds["step"]},
        trial_id=row.trial_id,
    )


@functools.lru_cache(maxsize=1000)
def _distribution(text: str) -> BaseDistribution:
    """Parsing it is most of what reading a trial takes, and a study has few. Nobody changes one."""
    return json_to_distribution(text)


def _number(part: sa.Row[Any]) -> float:
    """A value that databases may not know, as Optuna stores it."""
    return part.value if part.text == "FINITE" else {"INF_POS": math.inf, "INF_NEG": -math.inf}.get(part.text, math.nan)


def _local(utc: datetime.datetime | None) -> datetime.datetime | None:
    """A stored time as Optuna gives it: local, without a zone."""
    return None if utc is None else utc.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)


@dataclass
class _Gathered:
    """What shall be written of one trial in one transaction: values as they are stored, by name."""

    trial_id: int
    params: dict[str, tuple[float, str]] = field(default_factory=dict)
    user: dict[str, str] = field(default_factory=dict)
    system: dict[str, str] = field(default_factory=dict)


class RetryingStorage(RDBStorage):
    """Optuna's storage, each of whose calls lives through an outage (`search.storage.retry`).

    Done twice, its calls give what they give done once, but for two: a trial may be created twice, and the end of
    a trial may be refused as told already. `search.ledger` knows of both.
    """

    def __init__(self, url: URL, shown: str, engine_kwargs: dict[str, Any]) -> None:
        self.location = url
        """Its URL with the password, which only `search.storage.url.without_password` makes fit to be seen."""
        self.retry = Retry(shown)
        self._creation, self._gathering, self._reading = threading.local(), threading.local(), threading.local()
        super().__init__(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
        # A transaction by itself: without BEGIN and COMMIT, each of which is a wait for the server. SQLite's are begun
        # by an event (`search.storage.connect`), and cost nothing.
        postgres = self.engine.dialect.name == "postgresql"
        self._single = self.engine.execution_options(isolation_level="AUTOCOMMIT") if postgres else self.engine
        self._insert = postgresql.insert if postgres else sqlite.insert  # both can update what is there already

    def rows(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        """What one statement gives, in a transaction of its own."""
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
            found = _read(connection, ONE, {"trial": trial_id})
        if not found:
            raise KeyError(models.NOT_FOUND_MSG)
        return found[0]

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self.retry.call(lambda: self._write_step(trial_id, step, intermediate_value))

    def _write_step(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """In one statement where Optuna has three."""
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
        """Let the trials of a study be read once by this thread meanwhile.

        A sampler or a pruner asks for them up to three times in one decision. Only what Optuna's cache asks for is
        left out, which then gives what it has.
        """
        self._reading.studies = set()
        try:
            yield
        finally:
            self._reading.studies = None

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        read = getattr(self._reading, "studies", None)
        if read is not None and trial_id_greater_than > -1:  # from the cache, which holds something
            if study_id in read:
                return []
            read.add(study_id)
        early = [one for one in included_trial_ids if one <= trial_id_greater_than]
        reading = AFTER_AND_SOME if early else AFTER
        values = {"study": study_id, "after": trial_id_greater_than, **({"some": early} if early else {})}

        def read_all() -> list[FrozenTrial]:
            with self._single.begin() as connection:
                found = _read(connection, reading, values)
            return found if states is None else [trial for trial in found if trial.state in states]

        return self.retry.call(read_all)

    @contextlib.contextmanager
    def batched_writes(self, trial_id: int) -> Iterator[None]:
        """Write the parameters and attributes that this thread gives a trial meanwhile in one transaction, at the end.

        By themselves they are a transaction each: with six parameters and four attributes, ten in place of one. In
        Optuna's tables they are the same. They are written also where the context ends with an error.

        Raises:
            UpdateFinishedTrialError: the trial has ended; nothing is written.
        """
        gathered = self._gathering.now = _Gathered(trial_id)
        try:
            yield
        finally:
            self._gathering.now = None
            if gathered.params or gathered.user or gathered.system:
                self.retry.call(lambda: self._write(gathered))

    def _write(self, gathered: _Gathered) -> None:
        trials = models.TrialModel.__table__
        # Locked as long as this lasts, so that it cannot end in between.
        state = sa.select(trials.c.state).where(trials.c.trial_id == gathered.trial_id).with_for_update(read=True)
        with self.engine.begin() as connection:
            # Not Optuna's own check, which reads the trial in another transaction: that one would wait for this one.
            if connection.execute(state).scalar_one().is_finished():
                raise UpdateFinishedTrialError(f"trial {gathered.trial_id} has ended and cannot be changed any more")
            for model, key, rows in (
                (models.TrialParamModel, "param_name", _param_rows(gathered)),
                (models.TrialUserAttributeModel, "key", _attribute_rows(gathered.user)),
                (models.TrialSystemAttributeModel, "key", _attribute_rows(gathered.system)),
            ):
                if rows:
                    new = self._insert(model).values([{"trial_id": gathered.trial_id, **row} for row in rows])
                    changed = {name: new.excluded[name] for name in rows[0] if name != key}
                    connection.execute(new.on_conflict_do_update(index_elements=["trial_id", key], set_=changed))

    def _gathered(self, trial_id: int) -> _Gathered | None:
        gathered: _Gathered | None = getattr(self._gathering, "now", None)
        return gathered if gathered is not None and gathered.trial_id == trial_id else None

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (gathered := self._gathered(trial_id)) is None:
            plain = super().set_trial_user_attr
            self.retry.call(lambda: plain(trial_id, key, value))
        else:
            gathered.user[key] = json.dumps(value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (gathered := self._gathered(trial_id)) is None:
            plain = super().set_trial_system_attr
            self.retry.call(lambda: plain(trial_id, key, value))
        else:
            gathered.system[key] = json.dumps(value)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        gathered = self._gathered(trial_id)
        # A process's first value of a parameter is for Optuna to compare with what others have stored.
        if gathered is None or previous_distribution is None:
            plain, known = super()._set_trial_param, previous_distribution
            self.retry.call(lambda: plain(trial_id, param_name, param_value_internal, distribution, known))
        else:
            check_distribution_compatibility(previous_distribution, distribution)
            gathered.params[param_name] = (param_value_internal, distribution_to_json(distribution))

    @contextlib.contextmanager
    def checked_creation(self, check: Callable[[sa.Connection], None]) -> Iterator[None]:
        """Run a check in the transaction of every trial that this thread creates meanwhile; it may raise."""
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
        # Optuna counts the study's trials, which takes the longer the more there are; its attributes are two
        # statements each. Here the last one's number, and one statement for all. Ids of a study rise with its numbers.
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
                connection.execute(sa.insert(table).values([{"trial_id": row.trial_id, **one} for one in written]))
        return row


def _param_rows(gathered: _Gathered) -> list[dict[str, Any]]:
    return [
        {"param_name": name, "param_value": value, "distribution_json": distribution}
        for name, (value, distribution) in gathered.params.items()
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
    if _name not in vars(RetryingStorage):  # which see to outages themselves
        setattr(RetryingStorage, _name, _retried(_name))
