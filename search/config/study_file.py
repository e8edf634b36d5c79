"""A study definition as the TOML that `search.config.study_file` reads."""

import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.errors import UserError
from search.config.objective import Objective
from search.config.space import SearchSpace, SpaceError, check_start, parse_space

Start = dict[str, bool | int | float | str]
"""A known good configuration: values of some or all of the space's parameters."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrialLength(_Table):
    """``[trial]``: how long every trial trains. Scores are comparable only if this is the same."""

    epochs: int = Field(ge=1, le=10_000)
    train_images: int | None = Field(default=None, ge=1)
    """Fit images that a trial uses, balanced over the classes; default: all of them."""


class SamplerConfig(_Table):
    """``[sampler]``: how configurations are proposed."""

    kind: Literal["gp", "tpe", "random"] = "gp"
    """Gaussian processes (`search.samplers.gp`) for the first 300 trials if there is one objective, and TPE for all
    others; TPE (multivariate) for all; random draws."""
    startup_trials: int = Field(default=10, ge=0)
    """Configurations that fill the space, randomly or evenly, before the sampler takes over."""


class PrunerConfig(_Table):
    """``[pruner]``: which trials are stopped early."""

    kind: Literal["none", "median", "percentile"] = "percentile"
    percentile: float = Field(default=90.0, gt=0, lt=100)
    """Kind ``percentile``: a trial continues while it is in the best ``percentile`` % at its epoch, or misses that by
    no more than the noise between seeds."""
    startup_trials: int = Field(default=5, ge=0)
    """Trials that must finish before any is stopped."""
    warmup_epochs: int = Field(default=2, ge=0)
    """Epochs that every trial may train; the first stop comes right after them."""
    audit: float = Field(default=0.05, ge=0, le=1)
    """Share of the configurations that run to their end even if the pruner would stop them, so that the report can say
    how often the pruner is wrong."""


class NoiseConfig(_Table):
    """``[noise]``: how far chance alone moves a score, measured early in the search (`search.analysis.noise`)."""

    repeats: int = Field(default=2, ge=0, le=100)
    """Extra trainings of one configuration from other seeds. They count against the budget and are at most one trial
    in twenty."""


class WorkersConfig(_Table):
    """``[workers]``: when a silent worker counts as dead, and how long a database outage may last."""

    heartbeat: float = Field(default=5.0, gt=0, le=300)
    """Seconds between two signs of life."""
    lost_after: float = Field(default=60.0, gt=0, le=86_400)
    """After this many silent seconds a worker has lost its trial to another one. Other workers of this study on the
    same machine notice within a heartbeat that its process is gone."""
    max_outage: float = Field(default=600.0, ge=0, le=604_800)
    """Seconds that every process keeps trying to reach a lost database before it gives up."""

    @model_validator(mode="after")
    def _silence_is_longer_than_heartbeats(self) -> "WorkersConfig":
        if self.lost_after < 6 * self.heartbeat - 1e-9:
            raise ValueError(f"lost_after must be 6 heartbeats or more, so at least {6 * self.heartbeat:g}")
        return self

    @property
    def lease(self) -> float:
        """Seconds that a lease lasts unless it is renewed."""
        return self.lost_after / 2

    @property
    def grace(self) -> float:
        """Seconds between noticing that a lease has expired and taking it away."""
        return self.lost_after / 2


class ConfirmConfig(_Table):
    """``[confirm]``: trains the best configurations again, at a trial's length, from fresh seeds."""

    configurations: int = Field(default=5, ge=0, le=1000)
    """How many of the best; 0 trusts the search's best trial."""
    seeds: int = Field(default=3, ge=1, le=100)
    """Trainings of each, one per seed; every configuration gets the same seeds."""


class RetrainConfig(_Table):
    """``[retrain]``: the winner's last trainings."""

    epochs: int = Field(ge=1, le=100_000)
    """Epochs of the first training on the fit images; each further one is twice as long, until that no longer helps."""
    max_epochs: int | None = Field(default=None, ge=1, le=100_000)
    """No training is longer; default: eight times ``epochs``."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Planned limit for all these trainings together, at the measured speed."""
    seeds: int = Field(default=3, ge=1, le=100)
    """Final trainings at the length that was found, on fit and validation images together; each is tested once."""

    @property
    def longest(self) -> int:
        """Epochs of the longest training that may be tried."""
        return max(self.epochs, 8 * self.epochs if self.max_epochs is None else self.max_epochs)


class StudyConfig(_Table):
    """A study definition."""

    description: str = ""
    trials: int = Field(default=200, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    objective: Objective = "accuracy"
    """Accuracy alone, or with a cost for a Pareto search. Fixed for the life of a study."""
    trial: TrialLength
    space: SearchSpace
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    noise: NoiseConfig = NoiseConfig()
    workers: WorkersConfig = WorkersConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    retrain: RetrainConfig
    start: tuple[Start, ...] = ()
    """``[[start]]``: known good configurations, tried first; names left out are sampled."""
    start_seeds: tuple[int, ...] = ()
    """Seed of each ``[[start]]``; default: chosen as for all configurations."""

    @property
    def repeat_slots(self) -> range:
        """Slots that train an earlier slot's configuration again: the last ones of the sampler's startup.

        There they cost the search least; right after the startup they delayed the sampler (benchmarks/results/replay).
        """
        count = min(self.noise.repeats, self.trials // 20)
        end = max(self.sampler.startup_trials, max(1, len(self.start)) + count)
        return range(end - count, end)

    @property
    def prunes(self) -> bool:
        """Whether trials may be stopped early: Optuna compares their epochs on a single objective only."""
        return self.objective == "accuracy" and self.pruner.kind != "none"


def comparable_part(config: StudyConfig) -> dict[str, Any]:
    """What must not change during a study: scores from different spaces or lengths cannot be compared."""
    space = config.space.model_dump(mode="json")
    return {"space": space["varied"] | space["fixed"], "trial": config.trial.model_dump(mode="json")}


def load_study_file(path: Path) -> StudyConfig:
    """Read and check a study file.

    Raises:
        UserError: unreadable, not TOML, or wrong; the text names the file, the key and what is allowed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no study file {path}; shipped with the package: {', '.join(shipped_names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    return parse_study(table, str(path))


def parse_study(table: Mapping[str, Any], source: str) -> StudyConfig:
    """Check a study definition read from ``source``; `UserError` names source, key and what is allowed."""
    values = dict(table)
    space_table = values.get("space", {})
    if not isinstance(space_table, Mapping):
        raise UserError(f"{source}: space: should be a table")
    try:
        space = parse_space(space_table)
        config = StudyConfig.model_validate(values | {"space": space})
    except SpaceError as error:
        raise UserError(f"{source}: space.{error.key}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"]]
        raise UserError(f"{source}: {'.'.join(parts)}: {_explain(first, parts)}") from error
    for start in config.start:
        try:
            check_start(space, start)
        except SpaceError as error:
            raise UserError(f"{source}: start.{error.key}: {error}") from error
    return config


def _explain(error: Any, parts: list[str]) -> str:
    if error["type"] == "extra_forbidden":
        return f"is not a key; allowed: {', '.join(_allowed_keys(parts[:-1]))}"
    if error["type"] == "missing":
        return "is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"{message}, got {error['input']!r}"


def _allowed_keys(path: list[str]) -> list[str]:
    model: Any = StudyConfig
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def shipped_names() -> list[str]:
    """Names of the study definitions in the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("studies").iterdir()
        if entry.name.endswith(".toml")
    )


def find_study(name_or_file: str) -> tuple[str, StudyConfig]:
    """Find a study definition by shipped name or by file; also returns its study's default name."""
    path = Path(name_or_file)
    if path.suffix != ".toml" and name_or_file in shipped_names():
        text = (resources.files("studies") / f"{name_or_file}.toml").read_text(encoding="utf-8")
        return name_or_file, parse_study(tomllib.loads(text), f"studies/{name_or_file}.toml")
    if path.suffix != ".toml" and not path.exists():
        raise UserError(f"unknown study {name_or_file!r}; give a .toml file or one of: {', '.join(shipped_names())}")
    return path.stem, load_study_file(path)


def as_toml(config: StudyConfig) -> str:
    """A study file that says the same as ``config``."""
    values = config.model_dump(mode="json", exclude_none=True)  # TOML has no null: absent keys get their defaults
    values["space"] = values["space"]["varied"] | values["space"]["fixed"]
    plain = [f"{name} = {_value(value)}" for name, value in values.items() if not _is_table(value)]
    parts = ["\n".join(plain)]
    for name, value in values.items():
        if isinstance(value, Mapping):
            parts.append("\n".join([f"[{name}]", *(f"{key} = {_value(inner)}" for key, inner in value.items())]))
        elif _is_table(value):
            parts += ["\n".join([f"[[{name}]]", *(f"{key} = {_value(v)}" for key, v in row.items())]) for row in value]
    return "\n\n".join(parts) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and all(isinstance(row, Mapping) for row in value))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_value(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(_value(inner) for inner in value)}]"
    # JSON writes strings, numbers and booleans as TOML does, except for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
