"""Which sampler and which pruner find the best configuration in the least device time, on measured learning curves.

    python -m benchmarks.searching.replay [--seeds 30] [--curves FILE] [--workers 1] [--trainings 100] [--only NAME ...]
        [--json FILE] [--plot FILE]

Every search runs on a simulated clock (`benchmarks.searching.clock`) over a surrogate of the curves that
`benchmarks.searching.curves`
measured. The target is 99.5 % of the best accuracy of the table's configurations; a search has reached it when the
configuration that it would hand over, the one with the best score so far, has that accuracy on average over seeds,
whatever its lucky score was.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from benchmarks.searching.methods import RANDOM, SLOW, methods
from benchmarks.searching.replay_page import plot, table, told
from benchmarks.searching.simulated import run_one, world_in

TABLE = Path(__file__).parents[1] / "results" / "curves-cpu.jsonl"


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searching.replay", description=__doc__)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--curves", type=Path, default=TABLE)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trainings", type=int, default=100, help="device time of a search, in whole trainings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of regret by device time, .png or .svg")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    if not given.curves.exists():
        parser.error(
            f"no curves at {given.curves}: `python -m benchmarks.searching.curves --out {given.curves}` measures them"
        )
    world = world_in(given.curves)
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
