"""Math-verify's own test cases: each is judged as it expects, or has the reason why not.

The reasons are explained in docs/verifier.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verifier import extract_answer, verify_answer

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "math_verify_cases.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
REASONS = {
    *("prose", "several boxes", "false chain", "rounded", "decimal comma", "unreadable"),
    *("set and pair", "setting", "undecided", "name", "range"),
}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_case_is_judged_as_expected_or_says_why_not(case: dict[str, Any]) -> None:
    gold, said = (extract_answer(case[side]) or case[side] for side in ("gold", "prediction"))
    verdict = verify_answer(gold, said)
    if "differs" in case:
        assert case["differs"] in REASONS
    else:
        assert verdict.equal is case["expected"], verdict


def test_what_their_cases_refuse_is_accepted_only_where_a_setting_of_theirs_refuses_it() -> None:
    accepted = [
        case.get("differs")
        for case in CASES
        if not case["expected"]
        and verify_answer(
            *(extract_answer(case[side]) or case[side] for side in ("gold", "prediction"))
        ).equal
    ]
    assert accepted == ["setting"]
