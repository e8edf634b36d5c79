import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.config.study_file import StudyConfig, as_toml, find_study, parse_study, shipped_names


def read_back(config: StudyConfig) -> StudyConfig:
    return parse_study(tomllib.loads(as_toml(config)), "here")


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_definition_is_written_as_it_is_read(name: str) -> None:
    config = find_study(name)[1]
    assert read_back(config) == config


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(description=TEXT, rate=st.floats(1e-12, 1.0), width=st.integers(1, 64), shortcut=st.booleans())
def test_any_definition_is_written_as_it_is_read(description: str, rate: float, width: int, shortcut: bool) -> None:
    table: dict[str, Any] = {
        "description": description,
        "trial": {"epochs": 2},
        "space": {
            "lr": {"low": rate, "high": 2.0, "log": True},
            "block_widths": {"low": width, "high": width + 8, "step": 4},
            "activation": ["relu", "gelu"],
            "shortcut": [True, False],
            "convs": 2,
        },
        "retrain": {"epochs": 3},
        "start": [{"shortcut": shortcut, "lr": rate, "activation": "gelu"}, {}],
    }
    config = parse_study(table, "there")
    assert read_back(config) == config
