import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import PRESETS, ConfigError
from search.config.settings import WIDTH_STEP, TrialSettings, grown_widths, network_config, pooled_blocks, trial_config

blocks_and_pools = st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(blocks_and_pools)
def test_pools_are_spread_evenly_from_the_first_block_on(numbers: tuple[int, int]) -> None:
    blocks, pools = numbers
    pooled = pooled_blocks(blocks, pools)
    assert len(pooled) == blocks
    assert sum(pooled) == pools
    if pools:
        assert pooled[0]
        places = [place for place, here in enumerate(pooled) if here]
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 512), st.floats(0.25, 4), st.integers(1, 1024), blocks_and_pools)
def test_widths_grow_behind_pooled_blocks_in_whole_eights(
    width: int, growth: float, most: int, numbers: tuple[int, int]
) -> None:
    pooled = pooled_blocks(*numbers)
    widths = grown_widths(width, growth, most, pooled)
    assert len(widths) == len(pooled)
    assert widths[0] == min(width, most)
    assert all(w == most or w % WIDTH_STEP == 0 for w in widths[1:])
    for here, after, pooled_here in zip(widths[1:], widths[2:], pooled[1:], strict=False):
        if not pooled_here:
            assert after == here


def test_the_prototype_network_by_hand() -> None:
    network = network_config(TrialSettings(blocks=6, convs=3, width=48, width_growth=2, pools=3, head_layers=2), 10)
    assert network.pooled == (True, False, True, False, True, False)
    assert network.widths == (48, 96, 96, 192, 192, 384)
    assert network.head == (384,)
    assert network.convs == 3


def test_block_widths_stand_for_themselves() -> None:
    assert network_config(TrialSettings(blocks=3, block_widths=(5, 7, 9)), 10).widths == (5, 7, 9)
    with pytest.raises(ConfigError, match="3 blocks but 2 block widths"):
        network_config(TrialSettings(blocks=3, block_widths=(5, 7)), 10)


@pytest.mark.parametrize("name", ["seed-basic", "seed-advanced"])
def test_a_preset_replaces_the_networks_settings_alone(name: str) -> None:
    config = trial_config(TrialSettings.model_validate({"preset": name, "blocks": 9, "lr": 0.5}), 7, 1, classes=10)
    assert config.network == PRESETS[name]
    assert (config.fit.lr, config.fit.epochs, config.fit.seed) == (0.5, 7, 1)
    assert network_config(TrialSettings.model_validate({"preset": name}), classes=4).classes == 4


def test_more_pools_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="pools = 3 needs at least as many blocks, got 2"):
        network_config(TrialSettings(blocks=2, pools=3), 10)
