"""Faults, on purpose: what becomes of the budget, the trials and the workers, next to plain Optuna in the same run.

    python -m benchmarks.service.faults [--only kills,outage,...] [--json FILE] [--seeds 3]

Every worker is a real process whose trials sleep (`benchmarks.service.sleeper`), every PostgreSQL a real server, every
kill a real signal. Scenarios:

kills       8 workers, 1-second trials, a worker killed with -9 every 2 to 4 seconds at random and replaced
sqlite      the same with 4 workers on SQLite
outage      PostgreSQL stopped for a minute in mid-study and started again
dropped     one connection after another terminated by the server
preempted   a real training worker gets SIGTERM in mid-trial, 20 times
throughput  64 workers, 0.2-second trials: trials/s, ask and tell, against plain ``study.optimize``
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import optuna

from benchmarks.service.record import report_head, write_report
from benchmarks.service.scenarios import dropped, kills, outage, preempted, throughput
from benchmarks.service.server import PostgresServer
from benchmarks.service.workers import Kind
from search.storage.url import storage_url


def main() -> None:
    """Run the scenarios and print a JSON line for each result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.faults", description=__doc__)
    parser.add_argument("--only", default="kills,sqlite,outage,dropped,preempted,throughput")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chosen = arguments.only.split(",")
    results = report_head("benchmarks.service.faults")

    def record(scenario: str, result: dict[str, Any]) -> None:
        results.setdefault(scenario, []).append(result)
        print(json.dumps({"scenario": scenario, **result}), flush=True)
        write_report(arguments.json, results)

    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        server = PostgresServer(Path(scratch) / "postgres")
        folders = iter(range(1000))

        def fresh() -> Path:
            folder = Path(scratch) / f"run-{next(folders)}"
            folder.mkdir()
            return folder

        kinds: tuple[Kind, Kind] = ("ours", "optuna")
        for seed in range(arguments.seeds):
            for kind in kinds:
                if "kills" in chosen:
                    record("kills", kills(server.database(f"kills-{kind}-{seed}"), fresh(), kind, seed, 8))
                if "sqlite" in chosen:
                    folder = fresh()
                    url = storage_url(f"sqlite:///{folder / 'study.db'}")
                    record("sqlite", kills(url, folder, kind, seed, 4, trials=100))
        for kind in kinds:
            if "dropped" in chosen:
                record("dropped", dropped(server.database(f"dropped-{kind}"), fresh(), kind))
                if kind == "optuna":
                    record("dropped", dropped(server.database("dropped-ping"), fresh(), kind, "--pre-ping"))
            if "outage" in chosen:
                record("outage", outage(server.database(f"outage-{kind}"), fresh(), kind, server))
        if "preempted" in chosen:
            record("preempted", preempted(fresh()))
        if "throughput" in chosen:
            for round_ in range(arguments.rounds):
                for kind in kinds[::-1] if round_ % 2 else kinds:
                    url = server.database(f"throughput-{kind}-{round_}")
                    count = arguments.workers
                    record("throughput", throughput(url, fresh(), kind, count, 20 * count, round_))
        server.shut_down()


if __name__ == "__main__":
    main()
