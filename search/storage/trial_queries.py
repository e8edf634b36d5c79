"""Trials read from Optuna's tables in two statements instead of its six or seven."""

import datetime
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

TRIALS = models.TrialModel.__table__
PARAMS = models.TrialParamModel.__table__
USER = models.TrialUserAttributeModel.__table__
SYSTEM = models.TrialSystemAttributeModel.__table__
STEPS = models.TrialIntermediateValueModel.__table__
VALUES = models.TrialValueModel.__table__


def _parts(which: sa.ColumnElement[bool]) -> sa.CompoundSelect[Any]:
    """Everything that belongs to some trials, in rows of one shape: trial, kind, id, name, number and text."""

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
class TrialQuery:
    """Two statements, instead of Optuna's six or seven, that read trials: the trials, and what belongs to them.

    Made once: making them takes longer than the database takes to answer.
    """

    trials: sa.Select[Any]
    parts: sa.CompoundSelect[Any]


def _query(which: sa.ColumnElement[bool]) -> TrialQuery:
    return TrialQuery(sa.select(TRIALS).where(which).order_by(TRIALS.c.trial_id), _parts(which))


_AFTER = sa.and_(TRIALS.c.study_id == sa.bindparam("study"), TRIALS.c.trial_id > sa.bindparam("after"))
ONE_TRIAL = _query(TRIALS.c.trial_id == sa.bindparam("trial"))
TRIALS_AFTER = _query(_AFTER)
TRIALS_AFTER_AND_SOME = _query(sa.or_(_AFTER, TRIALS.c.trial_id.in_(sa.bindparam("some", expanding=True))))


def read_trials(connection: sa.Connection, query: TrialQuery, values: Mapping[str, Any]) -> list[FrozenTrial]:
    """Trials in the order of their ids."""
    rows = connection.execute(query.trials, values).all()
    parts: dict[int, list[sa.Row[Any]]] = {row.trial_id: [] for row in rows}
    for part in connection.execute(query.parts, values) if rows else ():
        if part.trial_id in parts:  # not of a trial that was created a moment ago
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
    """Cached: parsing is most of the time that reading a trial takes, and a study has few. None is ever changed."""
    return json_to_distribution(text)


def _number(part: sa.Row[Any]) -> float:
    """A value that Optuna stores by name if databases may not know it."""
    return part.value if part.text == "FINITE" else {"INF_POS": math.inf, "INF_NEG": -math.inf}.get(part.text, math.nan)


def _local(utc: datetime.datetime | None) -> datetime.datetime | None:
    """A stored time as Optuna gives it: local, without a zone."""
    return None if utc is None else utc.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
