"""``summary.json`` and ``status --format json`` keep their keys, their order, their nesting and their types.

``tests/recorded/summary_shapes.json`` was made by ``support.shapes`` with the code before results had types.
"""

import json
from pathlib import Path

import pytest

from support.command import Command
from support.shapes import take_snapshots

RECORDED = Path(__file__).parents[2] / "recorded" / "summary_shapes.json"


@pytest.mark.slow
def test_summary_and_status_have_the_recorded_shapes(search: Command, home: Path) -> None:
    def call(*words: str) -> str:
        ended = search(*words)
        assert ended.status == 0, ended.err
        return ended.out

    shapes = take_snapshots(call, home)
    for title, recorded in json.loads(RECORDED.read_text()).items():
        assert json.dumps(shapes[title], indent=1) == json.dumps(recorded, indent=1), title
