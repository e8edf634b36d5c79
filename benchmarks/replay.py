"""Which sampler and which pruner find the best configuration in the least device time, on measured learning curves.

    python -m benchmarks.replay [--seeds 30] [--curves FILE] [--workers 1] [--trainings 100] [--only NAME ...]
        [--json FILE] [--plot FILE]

Every search runs on a simulated clock (`search.replay.clock`) over a surrogate of the curves that `benchmarks.curves`
measured. The target is 99.5 % of the best accuracy of the table's configurations; a search has reached it when the
configuration that it would hand over, the one with the best score so far, has that accuracy on average over seeds,
whatever its lucky score was.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna import pruners, samplers
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from scipy import stats

from benchmarks.peers import peers
from benchmarks.replay_plot import plot
from search import study as studies
from search.extrapolation import regression
from search.forecast import MORE, expected_gain
from search.noise import pooled_noise
from search.replay.clock import Ended, Method, SamplerAt, simulate
from search.replay.surrogate import Curve, Surrogate, fit_surrogate
from search.space import parameter_distributions
from search.study_file import StudyConfig, find_study

TABLE = Path(__file__).parent / "results" / "curves-cpu.jsonl"
TARGET = 0.995
"""Of the best accuracy in the table."""
OVERHEAD = 0.5
"""Seconds of a trial beside its epochs."""
LONGER = 6
"""Times the others' time that the random search has, which needs it to come to the target."""
FORECASTS = (20, 40)
"""Trials after which a forecast is checked."""
SLOW = ("Syne Tune ASHABORE", "Syne Tune ASHACQR")
"""Think for half a second and more before every trial; compared where `--only` names them."""
PLACES = (3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 100)
"""Whole trainings after which the regret is told."""
COLUMNS = (5, 10, 20, 40, 100)
"""Those of them that the printed table has."""
DEFAULT = "default"
RANDOM = "random"


@dataclass(frozen=True)
class Table:
    """Measured curves and the study that they are of."""

    config: StudyConfig
    curves: tuple[Curve, ...]


def read_table(path: Path) -> Table:
    """A file of `benchmarks.curves`."""
    first, *rows = map(json.loads, path.read_text().splitlines())
    _, config = find_study(first["study"])
    curves = tuple(
        Curve(row["params"], tuple(row["accuracy"]), tuple(row["seconds"])) for row in rows if row["seconds"]
    )
    return Table(config, curves)


@dataclass(frozen=True)
class World:
    """What every search of a comparison shares.

    Attributes:
        surrogate: of the curves.
        config: of the study.
        target: accuracy on average over seeds.
        training: mean seconds of a whole training of a configuration drawn at random.
    """

    surrogate: Surrogate
    config: StudyConfig
    target: float
    training: float


def world_of(table: Table) -> World:
    """Fit the surrogate; find the target."""
    surrogate = fit_surrogate(parameter_distributions(table.config.space), table.curves)
    params = [curve.params for curve in table.curves]
    best = float(surrogate.mean(params)[:, -1].max())
    training = surrogate.epochs * float(surrogate.seconds(params).mean()) + OVERHEAD
    return World(surrogate, table.config, TARGET * best, training)


def _optuna(
    sampler: Callable[..., BaseSampler], pruner: Callable[[], BasePruner] = pruners.NopPruner, **options: Any
) -> Method:
    """Optuna as its users have it: one sampler for a whole search."""

    def make(seed: int) -> tuple[SamplerAt, BasePruner]:
        one = sampler(seed=seed, **options)
        return lambda _: one, pruner()

    return Method(make)


def _ours(config: StudyConfig, pruner: bool = True, starts: bool = True) -> Method:
    """A study as `search.worker` works it off."""

    def make(seed: int) -> tuple[SamplerAt, BasePruner]:
        seeded = config.model_copy(update={"seed": seed})
        stopping = studies.build_pruner(config) if pruner else pruners.NopPruner()
        return lambda slot: studies.build_sampler(seeded, slot), stopping

    config = config if starts else config.model_copy(update={"start": ()})

    def given(slot: int, trials: Callable[[], Sequence[FrozenTrial]]) -> Mapping[str, Any]:
        return studies.given_parameters(config, slot, slot if slot < len(config.start) else None, trials)

    return Method(make, given, config.pruner.audit, config.repeat_slots)


def methods(config: StudyConfig, epochs: int) -> dict[str, Method]:
    """Everything that is compared, by name."""
    tpe = partial(_optuna, samplers.TPESampler)
    multivariate = partial(tpe, multivariate=True)
    cma_es = _optuna(samplers.CmaEsSampler, warn_independent_sampling=False) if find_spec("cmaes") else None
    return {
        RANDOM: _optuna(samplers.RandomSampler),
        DEFAULT: _ours(config),
        "default, no pruner": _ours(config, pruner=False),
        "default, no start": _ours(config, starts=False),
        "TPE + Median (Optuna's defaults)": tpe(pruners.MedianPruner),
        "TPE": tpe(),
        "TPE multivariate": multivariate(),
        "TPE group": multivariate(group=True),
        "TPE without constant liar": tpe(constant_liar=False),
        "TPE + Percentile 90": tpe(lambda: pruners.PercentilePruner(90.0, n_warmup_steps=2)),
        "TPE + Patient Median": tpe(lambda: pruners.PatientPruner(pruners.MedianPruner(), 1)),
        "TPE + SuccessiveHalving": tpe(pruners.SuccessiveHalvingPruner),
        "TPE + Hyperband": tpe(lambda: pruners.HyperbandPruner(max_resource=epochs)),
        "TPE + Wilcoxon": tpe(pruners.WilcoxonPruner),
        "GP": _optuna(samplers.GPSampler),
        "QMC": _optuna(samplers.QMCSampler),
        **({"CMA-ES": cma_es} if cma_es else {}),
        **peers(config.space, epochs),
    }


@dataclass(frozen=True)
class Search:
    """One simulated search.

    Attributes:
        reached: seconds until the target was; None: never.
        regret: accuracy that the incumbent lacked to the table's best, after the time of 1, 2, ... whole trainings.
        pruned: trainings that were stopped. would: that the pruner wanted to stop.
        false: of `would`, those among the best `top` at the end.
        trials: that ended.
        foretold: after each of `FORECASTS` trials, whether the gain of `search.forecast` covered what came.
        thought: seconds of real time in sampler and pruner.
    """

    reached: float | None
    regret: tuple[float, ...]
    pruned: int
    would: int
    false: int
    trials: int
    foretold: tuple[bool, ...]
    thought: float


def summed_up(world: World, ended: Sequence[Ended], trainings: int, thought: float) -> Search:
    """What a simulated search came to."""
    truth = world.surrogate.mean([one.params for one in ended])[:, -1] if ended else np.zeros(0)
    best_score, value, reached = -math.inf, 0.0, None
    incumbents: list[tuple[float, float]] = []
    for one, true in zip(ended, truth, strict=True):
        if not one.stopped and one.whole > best_score:
            best_score, value = one.whole, float(true)
            incumbents.append((one.seconds, value))
            if reached is None and value >= world.target:
                reached = one.seconds
    best = world.target / TARGET
    regret = []
    for place in range(1, trainings + 1):
        there = [value for seconds, value in incumbents if seconds <= place * world.training]
        regret.append(best - (there[-1] if there else 0.1))
    top = world.config.confirm.configurations
    ranked = sorted(ended, key=lambda one: -one.whole)[:top]
    would = [one for one in ended if one.would_stop is not None]
    return Search(
        reached,
        tuple(round(value, 5) for value in regret),
        sum(one.stopped for one in ended),
        len(would),
        sum(one in ranked for one in would),
        len(ended),
        tuple(
            _covers(world, ended[:count], ended[: count + MORE]) for count in FORECASTS if len(ended) >= count + MORE
        ),
        thought,
    )


def _covers(world: World, known: Sequence[Ended], later: Sequence[Ended]) -> bool:
    """Whether the gain that is foretold of the trials that are known covers the one that came."""
    whole = [one for one in known if not one.stopped]
    ends = []
    for one in known:
        pairs = [(other.curve[len(one.curve) - 1], other.whole) for other in whole]
        ends.append(regression(pairs).at(one.curve[-1]).mean if one.stopped else one.whole)

    def chosen(some: Sequence[Ended]) -> Ended:
        return max((one for one in some if not one.stopped), key=lambda one: one.whole)

    noise = pooled_noise(_of_one_configuration(whole))
    told = expected_gain(ends, chosen(known).whole, noise.std if noise else 0.0)
    before, after = world.surrogate.mean([chosen(known).params, chosen(later).params])[:, -1]
    return told is not None and told.low <= after - before <= told.high


def _of_one_configuration(ended: Sequence[Ended]) -> list[list[float]]:
    groups: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for one in ended:
        groups.setdefault(tuple(sorted(one.params.items())), []).append(one.whole)
    return list(groups.values())


@cache
def _world(path: Path) -> World:
    return world_of(read_table(path))


def run_one(path: Path, name: str, seed: int, workers: int, trainings: int) -> Search:
    """One simulated search, in a process of its own, with the device time of so many whole trainings."""
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    world = _world(path)
    method = methods(world.config, world.surrogate.epochs)[name]
    began = time.perf_counter()
    seconds = trainings * (LONGER if name == RANDOM else 1) * world.training / workers
    ended = simulate(world.surrogate, world.config.space, method, seed, seconds, workers, OVERHEAD)
    return summed_up(world, ended, trainings, time.perf_counter() - began)


def told(world: World, searches: Mapping[str, Sequence[Search]]) -> dict[str, Any]:
    """The comparison as the JSON file has it."""

    def row(name: str) -> dict[str, Any]:
        mine, random = searches[name], searches[RANDOM]
        ratio, low, high = _ratio(_times(mine), _times(random))
        would = sum(one.would for one in mine)
        foretold = sum(len(one.foretold) for one in mine)
        false = sum(one.false for one in mine)
        interval = stats.binomtest(false, would).proportion_ci(0.95, method="exact") if would else None
        return {
            "time_to_target_vs_random": ratio,
            "time_to_target_interval": [low, high],
            "time_to_target_trainings": _finite(statistics.median(_times(mine)) / world.training),
            "reached": sum(one.reached is not None for one in mine) / len(mine),
            "false_prune_rate": false / would if would else None,
            "interval": interval and [float(interval.low), float(interval.high)],
            "pruned_share": sum(one.pruned for one in mine) / sum(one.trials for one in mine),
            "regret": {
                str(place): _median([one.regret[place - 1] for one in mine])
                for place in PLACES
                if place <= len(mine[0].regret)
            },
            "forecast_covered": sum(map(sum, (one.foretold for one in mine))) / foretold if foretold else None,
            "forecasts": foretold,
            "seconds_a_trial": sum(one.thought for one in mine) / sum(one.trials for one in mine),
            "seeds": len(mine),
        }

    return {
        "target": world.target,
        "best": world.target / TARGET,
        "surrogate": asdict(world.surrogate.error),
        "training_seconds": world.training,
        "default": row(DEFAULT) if DEFAULT in searches else None,
        "others": {name: row(name) for name in searches if name != DEFAULT},
    }


def _times(searches: Sequence[Search]) -> list[float]:
    return [math.inf if one.reached is None else one.reached for one in searches]


def _ratio(mine: Sequence[float], other: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Ratio of medians with its 95 % interval (bootstrap over seeds); None: never reached."""
    rng = np.random.default_rng(0)
    pairs = np.array([mine, other])
    drawn = [np.median(pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])], axis=1) for _ in range(2000)]
    ratios = np.sort([one / another if math.isfinite(another) else math.nan for one, another in drawn])
    whole = statistics.median(mine) / statistics.median(other)
    return _finite(whole), _finite(ratios[50]), _finite(ratios[-51])


def _median(values: Sequence[float]) -> dict[str, float]:
    """A median with its 95 % interval (bootstrap over seeds)."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    told = {"median": statistics.median(values), "low": float(low), "high": float(high)}
    return {key: round(value, 5) for key, value in told.items()}


def table(result: Mapping[str, Any]) -> str:
    """The comparison in Markdown, those first that come to the target soonest."""
    rows = {DEFAULT: result["default"], **result["others"]}
    known = {name: row for name, row in rows.items() if row is not None}
    places = [str(place) for place in COLUMNS if str(place) in next(iter(known.values()))["regret"]]
    heads = [
        "method", "trainings to the target", "of random's time (95 %)", "reached it",
        *(f"regret at {place}" for place in places), "stopped", "of these wrongly (95 %)", "s a trial",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]

    def order(name: str) -> tuple[float, float]:
        row = known[name]
        whole = row["time_to_target_trainings"]
        return (math.inf if whole is None else whole, row["regret"][places[-1]]["median"])

    for name in sorted(known, key=order):
        row = known[name]
        low, high = row["time_to_target_interval"]
        wrong = "" if row["interval"] is None else f" ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})"
        lines.append([
            f"**{name}**" if name == DEFAULT else name,
            _cell(row["time_to_target_trainings"], ".1f"),
            f"{_cell(row['time_to_target_vs_random'], '.3f')} ({_cell(low, '.3f')} to {_cell(high, '.3f')})",
            f"{row['reached']:.0%}",
            *(f"{100 * row['regret'][place]['median']:.2f}" for place in places),
            f"{row['pruned_share']:.0%}",
            f"{_cell(row['false_prune_rate'], '.1%')}{wrong}",
            f"{row['seconds_a_trial']:.3f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--curves", type=Path, default=TABLE)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trainings", type=int, default=100, help="device time of a search, in whole trainings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of regret by device time, .png or .svg")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    if not given.curves.exists():
        parser.error(f"no curves at {given.curves}: `python -m benchmarks.curves --out {given.curves}` measures them")
    world = _world(given.curves)
    print(f"surrogate: {asdict(world.surrogate.error)}; target {100 * world.target:.2f} %", flush=True)
    known = methods(world.config, world.surrogate.epochs)
    names = list(dict.fromkeys([RANDOM, *(given.only or (name for name in known if name not in SLOW))]))
    if absent := set(names) - known.keys():
        parser.error(f"no method {', '.join(sorted(absent))}; there are: {', '.join(known)}")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = {
            key: pool.submit(run_one, given.curves, *key, given.workers, given.trainings)
            for key in product(names, range(given.seeds))
        }
        searches = {name: [jobs[name, seed].result() for seed in range(given.seeds)] for name in names}
    result = told(world, searches)
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.plot:
        plot(result, given.plot)


if __name__ == "__main__":
    main()
