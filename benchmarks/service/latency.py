"""How long workers wait for the storage, from the events that they note."""

import statistics
from collections.abc import Iterable


def ask_and_tell(events: Iterable[tuple[str, float]]) -> tuple[list[float], list[float]]:
    """Seconds of each ask and each tell of one worker.

    An ask runs from the end of one trial's tell to the beginning of the next one's sleep: lease, creation, sampling.
    A tell runs from the end of the sleep until the result is stored. The first ask is left out: it waits for no tell.

    Args:
        events: what happened (``asked``, ``slept``, ``told``) and when, in order.
    """
    asks: list[float] = []
    tells: list[float] = []
    slept = stored = None
    for what, at in events:
        if what == "asked" and stored is not None:
            asks.append(at - stored)
        elif what == "slept":
            slept = at
        elif what == "told" and slept is not None:
            tells.append(at - slept)
            stored = at
    return asks, tells


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median_ms": round(1000 * statistics.median(ordered), 1),
        "p99_ms": round(1000 * ordered[int(0.99 * len(ordered))], 1),
    }
