"""The front of accuracy and cost, and its knee: arithmetic on points.

The knee is where the front bends most: with the logarithm of the cost and the accuracy each scaled to 0 to 1 between
the front's two ends, it is the point farthest above the chord that joins these ends (Satopaa et al., "Finding a
'Kneedle' in a Haystack", ICDCSW 2011, section III; a knee as the point of a front to prefer: Branke et al., "Finding
Knees in Multi-objective Optimization", PPSN 2004). The cost is logarithmic, as networks differ in it by factors: a
step is a doubling anywhere on the axis. So the knee does not depend on the units of either axis. A front without a
bulge, such as one of two points, has no knee: its most accurate point replaces it. Of several points equally far from
the chord the most accurate one is taken too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

EQUAL = 1e-9
"""Distances from the chord, of a square of side 1, that differ by less are equal."""


@dataclass(frozen=True)
class Point:
    """A network.

    Attributes:
        key: identifies it.
        accuracy: higher is better.
        cost: above 0; lower is better.
    """

    key: int
    accuracy: float
    cost: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates (is both at most as costly and at least as accurate), cheapest first.

    Of points that are equal in both, the one with the smallest key.
    """
    undominated: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy, point.key)):
        if not undominated or point.accuracy > undominated[-1].accuracy:
            undominated.append(point)
    return undominated


def knee(points: Sequence[Point]) -> Point | None:
    """The knee of the front of these points; None if there are no points."""
    undominated = front(points)
    if not undominated:
        return None
    heights = [above_chord(point, undominated[0], undominated[-1]) for point in undominated]
    farthest = max(heights)
    return max(
        (point for point, height in zip(undominated, heights, strict=True) if height >= farthest - EQUAL),
        key=lambda point: point.accuracy,
    )


def above_chord(point: Point, cheapest: Point, best: Point) -> float:
    """How far a point lies above the chord of a front, as the difference of normalised accuracy and cost, -1 to 1.

    The perpendicular distance to the chord is this divided by the square root of 2.
    """
    if cheapest.cost == best.cost or cheapest.accuracy == best.accuracy:
        return 0.0
    cost = math.log(point.cost / cheapest.cost) / math.log(best.cost / cheapest.cost)
    return (point.accuracy - cheapest.accuracy) / (best.accuracy - cheapest.accuracy) - cost
