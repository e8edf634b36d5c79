from typing import Any

import optuna
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.network import build_network
from search.config.settings import TrialSettings, network_config
from search.config.space import (
    SpaceError,
    check_start,
    differences,
    parameter_distributions,
    parse_space,
    sample,
    settings_of,
    space_hash,
)
from search.config.study_file import comparable_part, find_study, shipped_names

FULL = {
    "blocks": {"low": 2, "high": 4},
    "convs": {"low": 1, "high": 3},
    "width": {"low": 8, "high": 32, "step": 8},
    "width_growth": {"low": 1.0, "high": 2.0, "step": 0.25},
    "lr": {"low": 1e-3, "high": 1, "log": True},
    "augment": {"low": 0, "high": 1},
    "pools": 2,
}


def ask(space: Any, seed: int = 0) -> tuple[TrialSettings, dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    return sample(space, trial), trial.params


def test_every_study_parameter_is_an_optuna_parameter_with_its_plain_name() -> None:
    space = parse_space(FULL)
    drawn, params = ask(space)
    assert set(params) == {"blocks", "convs", "width", "width_growth", "lr", "augment"}
    assert {name: getattr(drawn, name) for name in params} == params
    assert drawn.pools == 2
    assert settings_of(space, params) == drawn


def test_ranges_become_distributions() -> None:
    found = parameter_distributions(parse_space(FULL))
    assert found["width"] == optuna.distributions.IntDistribution(8, 32, step=8)
    assert found["lr"] == optuna.distributions.FloatDistribution(1e-3, 1.0, log=True)
    assert found["width_growth"] == optuna.distributions.FloatDistribution(1.0, 2.0, step=0.25)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", {"low": 1e-5, "high": 1e-2, "log": True}),
        ("label_smoothing", {"low": 0, "high": 0.2}),
        ("batch_size", [64, 128, 256]),
        ("activation", ["relu", "gelu", "silu"]),
        ("shortcut", [True, False]),
        ("head_layers", {"low": 1, "high": 3}),
        ("pool_place", ["branch", "conv", "sum"]),
        ("optimizer", ["muon", "sgd", "adamw"]),
    ],
)
def test_any_setting_can_be_varied_from_the_file_alone(name: str, value: Any) -> None:
    drawn, params = ask(parse_space({**FULL, name: value}))
    assert name in params
    assert getattr(drawn, name) == params[name]


def test_block_widths_vary_one_by_one() -> None:
    table = {"blocks": {"low": 2, "high": 5}, "pools": 1, "block_widths": {"low": 8, "high": 64, "step": 8}}
    space = parse_space(table)
    for seed in range(8):
        drawn, params = ask(space, seed)
        assert drawn.block_widths is not None
        assert len(drawn.block_widths) == drawn.blocks
        assert [params[f"block_width_{n + 1}"] for n in range(drawn.blocks)] == list(drawn.block_widths)
        assert f"block_width_{drawn.blocks + 1}" not in params
        assert settings_of(space, params) == drawn


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(shipped_names()), st.integers(0, 2**16))
def test_what_the_shipped_studies_sample_builds_on_the_meta_device(name: str, seed: int) -> None:
    drawn, _ = ask(find_study(name)[1].space, seed)
    with torch.device("meta"):
        config = network_config(drawn, classes=10)
        assert len(config.widths) == len(config.pooled)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16))
def test_any_sampled_configuration_gives_finite_logits(seed: int) -> None:
    drawn, _ = ask(parse_space(FULL), seed)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert build_network(network_config(drawn, 10), seed)(images).isfinite().all()


@pytest.mark.parametrize(
    ("table", "key", "text"),
    [
        ({"blocs": 3}, "blocs", "is not a setting; allowed: preset, blocks"),
        ({"lr": {"low": 0.1, "high": 0.01}}, "lr", "the range is empty: low = 0.1 is above high = 0.01"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "lr", "log = true needs low above 0"),
        ({"lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "lr", "either a step or log"),
        ({"width": {"low": 8, "high": 32, "step": 0}}, "width", "step must be above 0"),
        ({"width": {"low": 8, "high": 30, "step": 8}}, "width", "steps of 8 from low = 8 end at 24, not 30"),
        ({"augment": {"low": 0, "high": 0.5, "step": 0.2}}, "augment", "end at 0.4, not 0.5"),
        ({"blocks": {"low": 1.5, "high": 3}}, "blocks.low", "must be a whole number"),
        ({"blocks": {"low": 0, "high": 3}}, "blocks.low", "greater than or equal to 1"),
        ({"blocks": {"low": 1}}, "blocks.high", "required"),
        ({"blocks": {"low": 3, "high": 4, "max": 3}}, "blocks.max", "a range has low, high, step and log"),
        ({"augment": {"low": 0, "high": 1.5}}, "augment.high", "less than or equal to 1"),
        ({"activation": []}, "activation", "is an empty list"),
        ({"activation": ["relu", "tanh"]}, "activation", "'relu', 'leaky_relu', 'gelu' or 'silu', got 'tanh'"),
        ({"activation": {"low": 1, "high": 2}}, "activation", "is no number"),
        ({"shortcut": "perhaps"}, "shortcut", "valid boolean"),
        ({"lr": "fast"}, "lr", "valid number"),
        ({"block_widths": [8, 16]}, "block_widths", "takes a range"),
        ({"block_widths": {"low": 8, "high": 8}, "width": 8}, "block_widths", "in place of width"),
        ({"blocks": {"low": 2, "high": 6}, "pools": 3}, "pools", "pools = 3 needs at least as many blocks, got 2"),
        ({"blocks": 8, "pools": 6}, "pools", "would shrink a 32-pixel image to nothing"),
        ({"blocks": 2}, "blocks", "pools = 3 needs"),
    ],
)
def test_mistakes_name_key_and_what_is_allowed(table: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse_space(table)
    assert error.value.key == key
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pools": 2}, "is not varied by this space"),
        ({"width": 12}, "12 is not in 8 to 32 in steps of 8"),
        ({"lr": 2.0}, "2.0 is not in 0.001 to 1.0"),
        ({"blocks": True}, "True is not in 2 to 4"),
        ({"blocks": "three"}, "'three' is not in 2 to 4"),
        ({"blocks": 2.5}, "2.5 is not in 2 to 4"),
    ],
)
def test_a_start_that_the_space_cannot_draw_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SpaceError) as error:
        check_start(parse_space(FULL), values)
    assert text in str(error.value)


def test_a_start_that_the_space_can_draw_is_taken() -> None:
    check_start(parse_space(FULL), {"blocks": 3, "width": 24, "width_growth": 1.75, "lr": 0.3})


def test_the_hash_follows_what_makes_scores_comparable_and_nothing_else() -> None:
    _, config = find_study("cpu")
    same = config.model_copy(update={"trials": 7, "seed": 3, "description": "other"})
    longer = config.model_copy(update={"trial": config.trial.model_copy(update={"epochs": 99})})
    assert space_hash(comparable_part(config)) == space_hash(comparable_part(same))
    assert space_hash(comparable_part(config)) != space_hash(comparable_part(longer))
    assert differences(comparable_part(config), comparable_part(longer)) == [
        f"trial.epochs: {config.trial.epochs} -> 99"
    ]


def test_differences_are_named_one_by_one() -> None:
    old, new = {"a": {"low": 1, "high": 2}, "b": 3}, {"a": {"low": 1, "high": 4}, "c": "x"}
    assert differences(old, new) == ["a.high: 2 -> 4", "b: 3 -> nothing", 'c: nothing -> "x"']


def test_a_space_holds_every_setting() -> None:
    """Another version may have other defaults; a study goes on with those it began with."""
    space = parse_space({"lr": {"low": 0.01, "high": 0.1}, "blocks": 3})
    names = set(TrialSettings.model_fields)
    assert space.varied.keys() | space.fixed.keys() == names - {"block_widths"}
    assert settings_of(space, {"lr": 0.05}) == TrialSettings(lr=0.05, blocks=3)
    per_block = parse_space({"block_widths": {"low": 8, "high": 32, "step": 8}})
    assert per_block.varied.keys() | per_block.fixed.keys() == names - {"width", "width_growth"}
