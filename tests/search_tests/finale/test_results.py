"""What a finale stored before its results had types is read into the types and written back key for key.

``tests/recorded/finale.json`` holds it: of a study of digits with its trainings under way and done, and of one of
CIFAR-10 with latencies and a limit. Long lists are cut; nothing else was changed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.finale.confirm import _Entry
from search.results import (
    Confirmation,
    RetrainParts,
    RetrainProgress,
    RetrainResult,
    as_json,
    from_json,
    optional_from_json,
)

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "recorded" / "finale.json").read_text(encoding="utf-8")
)

KINDS: dict[str, Any] = {
    "confirms": list[_Entry],
    "confirm": Confirmation,
    "retrain": RetrainResult,
    "retrain_parts": RetrainParts,
    "begun_parts": RetrainParts,
    "retrain_progress": RetrainProgress,
}


@pytest.mark.parametrize(
    ("study", "part"), [(study, part) for study, parts in RECORDED.items() for part in parts if part in KINDS]
)
def test_stored_results_are_read_and_written_back_key_for_key(study: str, part: str) -> None:
    stored = RECORDED[study][part]
    assert json.dumps(as_json(from_json(KINDS[part], stored))) == json.dumps(stored)


@pytest.mark.parametrize("study", list(RECORDED))
def test_metrics_are_the_result_without_what_belongs_to_the_study(study: str) -> None:
    result = from_json(RetrainResult, RECORDED[study]["retrain"])
    metrics = as_json(replace(result, plan=None, folder=None, chosen_by=None, limits=None))
    assert json.dumps(metrics) == json.dumps(RECORDED[study]["metrics"])


@pytest.mark.parametrize("study", list(RECORDED))
def test_the_summary_holds_a_part_of_the_result(study: str) -> None:
    written = as_json(from_json(RetrainResult, RECORDED[study]["retrain"]))
    recorded = RECORDED[study]["summary"]
    assert {key: written[key] for key in recorded} == recorded


def test_seeds_and_batches_are_numbers_that_json_writes_as_text() -> None:
    confirmed = from_json(Confirmation, RECORDED["digits"]["confirm"])
    assert all(set(row.accuracies) <= set(confirmed.seeds) for row in confirmed.configurations)
    assert set(from_json(RetrainResult, RECORDED["digits"]["retrain"]).latency or ()) == {1, 256}


def test_what_is_not_known_is_absent_or_null_as_it_was() -> None:
    digits, small = (RECORDED[study]["retrain"] for study in ("digits", "small"))
    assert "flip" not in as_json(from_json(RetrainResult, digits))["watched"][0]
    assert as_json(from_json(RetrainResult, small))["watched"][0]["flip"] is not None
    assert as_json(from_json(RetrainResult, small))["converged"] is None
    rows = as_json(from_json(Confirmation, RECORDED["digits"]["confirm"]))["configurations"]
    assert "latency" not in rows[0]
    assert rows[0]["behind"] is None


def test_nothing_stored_is_no_result() -> None:
    assert optional_from_json(RetrainResult, None) is None
