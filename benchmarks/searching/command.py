"""What the commands that simulate searches have in common: options, their checks, the pool of processes, the report."""

import argparse
import json
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.searching.methods import SLOW, methods
from benchmarks.searching.simulated import World, world_in

TABLE = Path(__file__).parents[1] / "results" / "curves-cpu.jsonl"

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every one of these commands has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.searching.{name}", description=description)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--curves", type=Path, default=TABLE)
    parser.add_argument("--json", type=Path)
    return parser


def open_world(parser: argparse.ArgumentParser, curves: Path) -> World:
    """The world of a file of curves; a usage error if there is no such file."""
    if not curves.exists():
        parser.error(f"no curves at {curves}: `python -m benchmarks.searching.curves --out {curves}` measures them")
    return world_in(curves)


def checked_methods(parser: argparse.ArgumentParser, world: World, names: Iterable[str] | None) -> list[str]:
    """Names of methods, each once; None: all but the slow ones. A usage error if one is not known."""
    known = methods(world.config, world.surrogate.epochs)
    chosen = list(dict.fromkeys(names or (name for name in known if name not in SLOW)))
    if absent := set(chosen) - known.keys():
        parser.error(f"no method {', '.join(sorted(absent))}; there are: {', '.join(known)}")
    return chosen


def run_all(search: Callable[[Key, int], Result], keys: Iterable[Key], seeds: int) -> dict[Key, list[Result]]:
    """Run one search for every key and seed, in as many processes as there are processors.

    Args:
        search: of a key and a seed; it must pickle.
        keys: what is compared.
        seeds: of each key, from 0.
    """
    keys = list(keys)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = {(key, seed): pool.submit(search, key, seed) for key in keys for seed in range(seeds)}
        return {key: [jobs[key, seed].result() for seed in range(seeds)] for key in keys}


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report; None writes nothing."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
