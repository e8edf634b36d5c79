"""Enums that are stored: the database and JSON hold plain words and numbers."""

import json
from enum import StrEnum

import pytest

from search.attributes import Fault
from search.ledger.registry import WorkerState
from search.storage.tables import DeviceClaim, SlotState


@pytest.mark.parametrize("kind", [Fault, SlotState, WorkerState])
def test_a_word_is_stored_as_plain_text_and_equals_what_is_read(kind: type[StrEnum]) -> None:
    for member in kind:
        assert json.loads(json.dumps({"fault": member})) == {"fault": member.value}
        assert json.loads(json.dumps(member)) == member
        assert f"{member}" == member.value


def test_claims_keep_their_numbers() -> None:
    assert [int(claim) for claim in DeviceClaim] == [0, 1, 2]
