"""A study definition as the TOML that `search.study_file` reads."""

import json
from collections.abc import Mapping
from typing import Any

from search.study_file import StudyConfig


def as_toml(config: StudyConfig) -> str:
    """A study file that says the same as ``config``."""
    values = config.model_dump(mode="json", exclude_none=True)  # TOML has no null: what is absent has its default
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
    # JSON writes strings, numbers and booleans as TOML does, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
