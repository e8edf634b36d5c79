"""The search space: what is varied, what is fixed, and how one configuration is drawn.

In a study file's ``[space]`` every key is a name from `search.config.settings.TrialSettings`:

    blocks = { low = 3, high = 6 }                        # whole numbers
    lr = { low = 1e-3, high = 1e-1, log = true }          # real, logarithmic
    augment = { low = 0, high = 1, step = 0.05 }          # real, in steps
    activation = ["relu", "silu"]                         # one of these
    batch_size = 128                                      # fixed
    block_widths = { low = 16, high = 128, step = 16 }    # one parameter per block: block_width_1, block_width_2, ...
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from model.config import ConfigError
from search.config.settings import TrialSettings, network_config, settings_from

Scalar = bool | int | float | str

PER_BLOCK = "block_widths"

Params = dict[str, Any]
"""Optuna's parameters of a trial, or some of them, by their plain names."""


class Range(BaseModel):
    """Numbers from ``low`` to ``high`` inclusive; with either ``step`` or ``log``, not both."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _is_not_empty(self) -> "Range":
        if self.low > self.high:
            raise ValueError(f"the range is empty: low = {self.low} is above high = {self.high}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, got {self.step}")
        if self.step is not None:
            steps = (self.high - self.low) / self.step
            if not math.isclose(steps, round(steps), abs_tol=1e-6):
                reached = self.low + math.floor(steps) * self.step
                raise ValueError(f"steps of {self.step} from low = {self.low} end at {reached:g}, not {self.high}")
        if self.log and self.step is not None:
            raise ValueError("a range has either a step or log = true")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs low above 0, got {self.low}")
        return self


class SearchSpace(BaseModel):
    """Varied parameters and fixed values, by their plain names. Together they cover all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    varied: dict[str, Range | tuple[Scalar, ...]]
    fixed: dict[str, Scalar]


class SpaceError(ValueError):
    """A mistake in a space: names the key and what is allowed there."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def parse_space(table: Mapping[str, Any]) -> SearchSpace:
    """A study file's ``[space]`` table as a space; what the table leaves out is fixed at its default.

    So a study stores every setting and keeps it even if a later version changes the defaults.

    Raises:
        SpaceError: an unknown name, a value out of bounds, an empty range, a network that cannot be built.
    """
    varied: dict[str, Range | tuple[Scalar, ...]] = {}
    fixed: dict[str, Scalar] = {}
    for name, value in table.items():
        if name not in TrialSettings.model_fields:
            raise SpaceError(name, f"is not a setting; allowed: {', '.join(TrialSettings.model_fields)}")
        if isinstance(value, Mapping):
            varied[name] = _parse_range(name, value)
        elif isinstance(value, list) and name != PER_BLOCK:
            if not value:
                raise SpaceError(name, "is an empty list; give at least one choice")
            varied[name] = tuple(_checked(name, choice) for choice in value)
        elif isinstance(value, list):
            raise SpaceError(name, "takes a range such as { low = 16, high = 64, step = 8 }")
        else:
            fixed[name] = _checked(name, value)
    if PER_BLOCK in table and (given := {"width", "width_growth"} & table.keys()):
        raise SpaceError(PER_BLOCK, f"stands in place of {' and '.join(sorted(given))}; give one or the other")
    space = SearchSpace(varied=varied, fixed=_defaults(table) | fixed)
    _check_corners(space, "pools" if "pools" in table else "blocks")
    return space


def _defaults(table: Mapping[str, Any]) -> dict[str, Scalar]:
    """Defaults of the settings that a table neither names nor replaces."""
    replaced = {"width", "width_growth"} if PER_BLOCK in table else set()
    return {
        name: field.default
        for name, field in TrialSettings.model_fields.items()
        if name not in table.keys() | replaced | {PER_BLOCK}
    }


def _parse_range(name: str, table: Mapping[str, Any]) -> Range:
    try:
        chosen = Range.model_validate(dict(table))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part in ("low", "high", "step", "log"))
        if first["type"] == "extra_forbidden":
            raise SpaceError(
                f"{name}.{first['loc'][-1]}", "is not allowed; a range has low, high, step and log"
            ) from error
        raise SpaceError(f"{name}.{place}" if place else name, _plain(first["msg"])) from error
    kind = _number_type(name)
    if kind is None:
        raise SpaceError(name, "is no number; give a list of choices or one value")
    ends = {"low": chosen.low, "high": chosen.high, "step": chosen.step}
    for end, value in ends.items():
        if kind is int and value is not None and value != int(value):
            raise SpaceError(f"{name}.{end}", f"must be a whole number, got {value}")
        if end != "step":
            _checked(name, value, f"{name}.{end}")
    return chosen


def _number_type(name: str) -> type[int] | type[float] | None:
    default = 1 if name == PER_BLOCK else TrialSettings.model_fields[name].default
    if isinstance(default, bool) or not isinstance(default, int | float):
        return None
    return type(default)


def _checked(name: str, value: Any, key: str | None = None) -> Scalar:
    """A value in its setting's type (2 for a real number becomes 2.0)."""
    try:
        settings = settings_from({name: (value,) if name == PER_BLOCK else value})
    except ValidationError as error:
        raise SpaceError(key or name, f"{_plain(error.errors()[0]['msg'])}, got {value!r}") from error
    checked = getattr(settings, name)
    scalar: Scalar = checked[0] if name == PER_BLOCK else checked
    return scalar


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should")


def _check_corners(space: SearchSpace, blamed: str) -> None:
    """Refuse a space with an impossible network. Corners suffice: what matters is monotone in blocks and pools."""
    presets, blocks, pools = (_extremes(space, name) for name in ("preset", "blocks", "pools"))
    for preset in presets:
        for block_count in blocks:
            for pool_count in pools:
                values = {"preset": preset, "blocks": block_count, "pools": pool_count}
                try:
                    network_config(settings_from(values), classes=2)
                except ConfigError as error:
                    raise SpaceError(blamed, str(error)) from error


def _extremes(space: SearchSpace, name: str) -> tuple[Any, ...]:
    parameter = space.varied.get(name)
    if isinstance(parameter, Range):
        return parameter.low, parameter.high
    if parameter is not None:
        return parameter
    return (space.fixed[name],)


def distribution(name: str, parameter: Range | tuple[Scalar, ...]) -> BaseDistribution:
    """Optuna's distribution of one parameter."""
    if not isinstance(parameter, Range):
        return CategoricalDistribution(parameter)
    low, high, step, log = parameter.low, parameter.high, parameter.step, parameter.log
    if _number_type(name) is int:
        return IntDistribution(int(low), int(high), step=int(step or 1), log=log)
    return FloatDistribution(float(low), float(high), step=step and float(step), log=log)


def sample(space: SearchSpace, trial: optuna.Trial) -> TrialSettings:
    """Draw one configuration: every varied name becomes an Optuna parameter of that name."""
    for name, parameter in space.varied.items():
        if name != PER_BLOCK:
            _suggest(trial, name, distribution(name, parameter))
    if PER_BLOCK in space.varied:
        form = distribution(PER_BLOCK, space.varied[PER_BLOCK])
        for block in range(_blocks(space, trial.params)):
            _suggest(trial, block_width(block), form)
    return settings_of(space, trial.params)


def settings_of(space: SearchSpace, params: Mapping[str, Any]) -> TrialSettings:
    """The settings that a trial's Optuna parameters mean in this space."""
    values: dict[str, Any] = {
        **space.fixed,
        **{name: params[name] for name in space.varied if name != PER_BLOCK},
    }
    if PER_BLOCK in space.varied:
        values[PER_BLOCK] = tuple(params[block_width(block)] for block in range(_blocks(space, params)))
    return settings_from(values)


def block_width(block: int) -> str:
    """The Optuna parameter that holds a block's width in the per-block form; blocks count from 0, names from 1."""
    return f"block_width_{block + 1}"


def _blocks(space: SearchSpace, params: Mapping[str, Any]) -> int:
    return int(params["blocks"] if "blocks" in space.varied else space.fixed["blocks"])


def _suggest(trial: optuna.Trial, name: str, form: BaseDistribution) -> Scalar:
    if isinstance(form, IntDistribution):
        return trial.suggest_int(name, form.low, form.high, step=form.step, log=form.log)
    if isinstance(form, FloatDistribution):
        return trial.suggest_float(name, form.low, form.high, step=form.step, log=form.log)
    assert isinstance(form, CategoricalDistribution)
    choice = trial.suggest_categorical(name, form.choices)
    assert choice is not None
    return choice


def parameter_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Every Optuna parameter that the space can ask for, with its distribution."""
    distributions = {n: distribution(n, p) for n, p in space.varied.items() if n != PER_BLOCK}
    if PER_BLOCK in space.varied:
        form = distribution(PER_BLOCK, space.varied[PER_BLOCK])
        most = max(_extremes(space, "blocks"))
        distributions |= {block_width(block): form for block in range(most)}
    return distributions


def relevant(space: SearchSpace, params: Mapping[str, Any]) -> Params:
    """Keep only the parameters that one configuration uses, out of all that the space can ask for."""
    if PER_BLOCK not in space.varied:
        return dict(params)
    present = {block_width(block) for block in range(_blocks(space, params))}
    absent = {block_width(block) for block in range(max(_extremes(space, "blocks")))} - present
    return {name: value for name, value in params.items() if name not in absent}


def check_start(space: SearchSpace, values: Mapping[str, Any]) -> None:
    """Raise `SpaceError` unless the space itself could draw every value."""
    allowed = parameter_distributions(space)
    for name, value in values.items():
        if name not in allowed:
            raise SpaceError(name, f"is not varied by this space; allowed: {', '.join(allowed)}")
        if not _contains(allowed[name], value):
            raise SpaceError(name, f"{value!r} is not in {_describe(allowed[name])}")


def fitting(space: SearchSpace, values: Mapping[str, Any]) -> Params:
    """The part of another space's configuration that fits this one: the parameters that this space varies, too.

    Empty if this space could not draw one of their values: the configuration would be a different one.
    """
    allowed = parameter_distributions(space)
    shared = {name: value for name, value in values.items() if name in allowed}
    return shared if all(_contains(allowed[name], value) for name, value in shared.items()) else {}


def _contains(form: BaseDistribution, value: Any) -> bool:
    if isinstance(form, CategoricalDistribution):
        return value in form.choices
    assert isinstance(form, IntDistribution | FloatDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float) or not form.low <= value <= form.high:
        return False
    steps = (value - form.low) / form.step if form.step else 0.0
    return math.isclose(steps, round(steps), abs_tol=1e-6)


def _describe(form: BaseDistribution) -> str:
    if isinstance(form, CategoricalDistribution):
        return ", ".join(repr(choice) for choice in form.choices)
    assert isinstance(form, IntDistribution | FloatDistribution)
    return f"{form.low} to {form.high}" + (f" in steps of {form.step}" if form.step not in (None, 1) else "")


def space_hash(rules: Mapping[str, Any]) -> str:
    """SHA-256 of what makes scores comparable: see `search.config.study_file.comparable_part`."""
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two nested tables, one phrase each: ``space.lr.high: 0.1 -> 0.2``."""
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{name}.")
        elif before != after:
            changes.append(f"{name}: {_shown(before)} -> {_shown(after)}")
    return changes


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
