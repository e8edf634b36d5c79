from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.errors import UserError
from search.config.settings import TrialSettings, trial_config
from search.config.space import sample
from search.config.study_file import StudyConfig, find_study, load_study_file, parse_study, shipped_names

GOOD = """
[trial]
epochs = 2
[space]
lr = { low = 0.01, high = 0.1 }
[retrain]
epochs = 3
"""


def test_the_shipped_studies_load_and_have_a_description() -> None:
    assert {"cifar10", "cpu", "seed"} <= set(shipped_names())
    for name in shipped_names():
        found, config = find_study(name)
        assert found == name
        assert config.description


def test_a_stored_definition_comes_back_equal() -> None:
    for name in shipped_names():
        _, config = find_study(name)
        assert StudyConfig.model_validate_json(config.model_dump_json()) == config


def test_a_file_names_its_study(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert find_study(str(path)) == ("mine", load_study_file(path))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("", "speed = 3\n", "speed: is not a key; allowed: description, trials"),
        ("epochs = 2", "epochs = 0", "trial.epochs: should be greater than or equal to 1, got 0"),
        ("epochs = 2", "epochs = 2\nbatch = 3", "trial.batch: is not a key; allowed: epochs, train_images"),
        ("epochs = 2", "", "trial.epochs: is missing"),
        ("[retrain]\nepochs = 3", "", "retrain: is missing"),
        ("[trial]\nepochs = 2", "", "trial: is missing"),
        ("high = 0.1", "high = 0.001", "space.lr: the range is empty"),
        ("lr =", "speed =", "space.speed: is not a setting; allowed: preset, blocks"),
        ("", "trials = 0\n", "trials: should be greater than or equal to 1, got 0"),
        ("", "space = 3\n", "is not TOML"),
        ("[space]\nlr = { low = 0.01, high = 0.1 }", "", None),
        (
            "[retrain]",
            "[pruner]\nkind = 'best'\n[retrain]",
            "pruner.kind: should be 'none', 'median' or 'percentile'",
        ),
        ("epochs = 3", "epochs = 3\nsettings = 1", "retrain.settings: is not a key; allowed: epochs, max_"),
        ("epochs = 3", "epochs = 3\n[[start]]\nlr = 5.0", "start.lr: 5.0 is not in 0.01 to 0.1"),
        ("epochs = 3", "epochs = 3\n[[start]]\nwidth = 8", "start.width: is not varied by this space; allowed: lr"),
        ("epochs = 2", "epochs = [", "is not TOML"),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(tmp_path: Path, old: str, new: str, text: str | None) -> None:
    path = tmp_path / "study.toml"
    path.write_text(GOOD.replace(old, new) if old else new + GOOD)
    if text is None:
        assert load_study_file(path).space.varied == {}
        return
    with pytest.raises(UserError) as error:
        load_study_file(path)
    assert str(path) in str(error.value)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study file .*shipped with the package: cifar10, cpu, seed"):
        load_study_file(tmp_path / "absent.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load_study_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"description = '\xff\xfe'")
    with pytest.raises(UserError, match="cannot be read"):
        load_study_file(tmp_path / "latin.toml")
    with pytest.raises(UserError, match=r"unknown study 'cifar11'; give a .toml file or one of: cifar10, cpu, seed"):
        find_study("cifar11")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10**20), st.floats(), st.text(max_size=5), st.dates(), st.just("relu")
)
names = st.sampled_from([*TrialSettings.model_fields, "low", "high", "step", "log", "epochs", "kind", "x"])
tables = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*StudyConfig.model_fields, "x"]), tables, max_size=4),
    st.dictionaries(
        names, st.dictionaries(st.sampled_from(["low", "high", "step", "log"]), scalars) | tables, max_size=3
    ),
)
def test_whatever_a_file_holds_it_is_a_study_or_one_line(others: dict[str, Any], space: dict[str, Any]) -> None:
    base = {"trial": {"epochs": 1}, "retrain": {"epochs": 1}, "space": space}
    for table in (base, {**base, **others}):
        try:
            config = parse_study(table, "file.toml")
        except UserError as refusal:
            complaint = str(refusal)
        else:
            trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
            trial_config(sample(config.space, trial), 1, 0, 10)
            complaint = "file.toml: "
        assert complaint.startswith("file.toml: ")
        assert len(complaint.splitlines()) == 1


def test_a_definition_is_frozen() -> None:
    _, config = find_study("cpu")
    with pytest.raises(ValidationError, match="frozen"):
        config.trials = 3  # type: ignore[misc]
