"""Which sampler and which pruner find the best configuration in the least device time, on measured learning curves.

    python -m benchmarks.searching.replay [--seeds 30] [--curves FILE] [--workers 1] [--trainings 100] [--only NAME ...]
        [--json FILE] [--plot FILE]

Every search runs on a simulated clock (`benchmarks.searching.clock`) over a surrogate of the curves that
`benchmarks.searching.curves` measured. The target is 99.5 % of the best accuracy of the table's configurations. A
search has reached it when the configuration that it would hand over, the one with the best score so far, has that
accuracy on average over seeds, whatever its lucky score was.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.searching.command import checked_methods, command_line, open_world, run_all, write_json
from benchmarks.searching.methods import RANDOM
from benchmarks.searching.replay_page import comparison, plot, table
from benchmarks.searching.simulated import run_one


def main() -> None:
    """Simulate, print, write."""
    parser = command_line("replay", __doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trainings", type=int, default=100, help="device time of a search, in whole trainings")
    parser.add_argument("--plot", type=Path, help="a picture of regret by device time, .png or .svg")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    world = open_world(parser, given.curves)
    print(f"surrogate: {asdict(world.surrogate.error)}; target {100 * world.target:.2f} %", flush=True)
    names = checked_methods(parser, world, given.only and [RANDOM, *given.only])
    search = partial(run_one, given.curves, workers=given.workers, trainings=given.trainings)
    result = comparison(world, run_all(search, names, given.seeds))
    print(table(result))
    write_json(given.json, result)
    if given.plot:
        plot(result, given.plot)


if __name__ == "__main__":
    main()
