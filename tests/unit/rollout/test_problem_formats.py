from __future__ import annotations

from typing import Any

import pytest

from rollout.problem import Level
from rollout.problems.formats import (
    RowError,
    answer_of_solution,
    converter,
    detect,
    level_of_source,
    parse_columns,
)
from rollout.problems.rows import ProblemFileError
from rollout.problems.text import problem_id, problem_key

NUMINA_COT = {
    "source": "amc_aime",
    "problem": "How many?",
    "solution": r"First \boxed{3}, no: \boxed{\frac{1}{2}}.",
    "messages": [],
}
NUMINA_15 = {
    "problem": "How many?",
    "solution": "...",
    "answer": "7",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads_ref",
    "synthetic": False,
}
METAMATH = {
    "query": "How many?",
    "response": "He has 1,110.\n#### 1,110\nThe answer is: 1,110",
    "type": "GSM_Rephrased",
    "original_question": "How many?",
}
GSM8K = {"question": "How many?", "answer": "Two <<1+1=2>>2.\n#### 2,000"}
MATH = {
    "problem": "How many?",
    "level": "Level 5",
    "type": "Geometry",
    "solution": r"\boxed{\sqrt{2}}",
}
DAPO = {
    "data_source": "math_dapo",
    "prompt": [
        {
            "role": "user",
            "content": "Solve the following math problem step by step. The last line of your "
            "response should be of the form Answer: $Answer (without quotes) where $Answer is the "
            "answer to the problem.\n\nHow many?\n\nRemember to put your answer on its own line "
            'after "Answer:".',
        }
    ],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule"},
    "extra_info": {"index": "9a9b"},
}
ORZ = [
    {"from": "human", "value": "How many?"},
    {"from": "assistant", "ground_truth": {"value": "\\boxed{12}"}},
]
RSTAR = {"index": 3, "question": "How many?", "answer": "5"}
TABLE = {"id": "a", "source": "s", "level": "gsm", "problem": "How many?", "answer": 4}


@pytest.mark.parametrize(
    ("row", "format", "answer", "level", "source"),
    [
        (NUMINA_COT, "numina-cot", r"\frac{1}{2}", Level.OLYMPIAD, "numina/amc_aime"),
        (NUMINA_15, "numina-1.5", "7", Level.OLYMPIAD, "numina/olympiads_ref"),
        (METAMATH, "metamath", "1110", Level.GSM, "metamath"),
        (GSM8K, "gsm8k", "2000", Level.GSM, "gsm8k"),
        (MATH, "math", r"\sqrt{2}", Level.MATH, "math"),
        (DAPO, "dapo", "34", Level.OLYMPIAD, "math_dapo"),
        (ORZ, "orz", "12", None, "file"),
        (RSTAR, "rstar", "5", None, "file"),
        (TABLE, "table", "4", Level.GSM, "s"),
        ({**DAPO, "reward_model": {"ground_truth": '["34", "35"]'}}, "dapo", "34", *"12"),
        (
            {"messages": DAPO["prompt"], "ground_truth": 3, "dataset": "aime_1983"},
            "dapo",
            "3",
            *"12",
        ),
        ({"problem": "How many?", "solution": "#### 8"}, "table", "8", None, "file"),
    ],
)
def test_format_is_told_from_the_columns_and_gives_problem_answer_level_and_source(
    row: Any, format: str, answer: str, level: Any, source: str
) -> None:
    assert detect(row, "file, row 1") == format
    draft = converter(format)(row, "file")
    assert draft.problem == "How many?"
    assert draft.answer == answer
    if level != "1":
        assert (draft.level, draft.source) == (level, source)
    assert draft.exclusion is None


def test_metamath_says_which_problem_a_row_varies() -> None:
    convert = converter("metamath")
    reworded = convert({**METAMATH, "original_question": "What is their number?"}, "file")
    other = convert({**METAMATH, "query": "So many?", "original_question": "How many? "}, "file")
    assert reworded.rewording_of == problem_id(problem_key("What is their number?"))
    assert other.rewording_of == problem_id(problem_key("How many?"))
    assert convert(METAMATH, "file").rewording_of is None


def test_marks_of_a_data_set_are_kept() -> None:
    math = converter("math")(MATH, "file")
    assert (math.difficulty, math.subject) == (5, "Geometry")
    dapo = converter("dapo")({**DAPO, "reward_model": {"ground_truth": '["1", "2"]'}}, "file")
    assert (dapo.answers_alt, dapo.origin_id) == (("2",), "9a9b")
    assert converter("rstar")(RSTAR, "file").origin_id == "3"
    interval = converter("dapo")({**DAPO, "reward_model": {"ground_truth": "[1, 2]"}}, "file")
    assert (interval.answer, interval.answers_alt) == ("[1, 2]", ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "orca_math"}, "subset orca_math is not among those kept"),
        ({"question_type": "proof", "answer": "proof"}, "marked as a proof"),
        ({"problem_is_valid": "Incomplete"}, r"problem marked as not valid (Incomplete)"),
        ({"solution_is_valid": "No"}, "solution marked as not valid (No)"),
        ({"answer": "notfound"}, "no answer was found by its makers"),
    ],
)
def test_numina_rows_that_its_makers_doubt_and_other_subsets_are_excluded(
    change: dict[str, str], reason: str
) -> None:
    draft = converter("numina-1.5")({**NUMINA_15, **change}, "file")
    assert draft.exclusion == reason


def test_all_or_other_subsets_of_numina_can_be_kept() -> None:
    row = {**NUMINA_COT, "source": "cn_k12"}
    assert converter("numina-cot")(row, "f").exclusion is not None
    assert converter("numina-cot", subsets=None)(row, "f").exclusion is None
    kept = converter("numina-cot", subsets=("cn_k12",))(row, "f")
    assert (kept.exclusion, kept.level) == (None, Level.MATH)


def test_a_column_map_reaches_into_structures() -> None:
    columns = parse_columns("problem=turns.0.text, answer=meta.gold")
    convert = converter("columns", columns=columns)
    draft = convert({"turns": [{"text": "How many?"}], "meta": {"gold": 3.5}}, "file")
    assert (draft.problem, draft.answer) == ("How many?", "3.5")
    with pytest.raises(RowError, match=r"no column 'turns.0.text'"):
        convert({"turns": []}, "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem", "expected NAME=COLUMN"),
        ("text=problem", "NAME one of problem, answer"),
        ("problem=a", "name at least problem and one of answer and solution"),
    ],
)
def test_a_column_map_that_says_too_little_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProblemFileError, match=message):
        converter("columns", columns=parse_columns(text))


def test_unknown_columns_are_named() -> None:
    with pytest.raises(ProblemFileError, match=r"f.csv, row 1: .*columns a, b; name them with"):
        detect({"b": 1, "a": 2}, "f.csv, row 1")


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("table", {**TABLE, "problem": " "}, "no problem text"),
        ("table", {**TABLE, "problem": 3}, "problem is a number, not text"),
        ("table", {**TABLE, "answer": True}, "answer is bool"),
        ("table", {**TABLE, "level": "hard"}, "unknown level 'hard'"),
        ("table", "text", "expected named columns, got text"),
        ("metamath", {"query": "q"}, "no column 'response'"),
        ("dapo", {"prompt": "p"}, "no reward_model.ground_truth"),
        ("orz", [{"from": "human", "value": "v"}, {}], "no turn has a ground_truth"),
    ],
)
def test_rows_that_are_not_what_the_format_says_are_named(
    format: str, row: Any, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        converter(format)(row, "file")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"a \boxed{1} b \boxed{\frac{2}{3}}", r"\frac{2}{3}"),
        (r"cut off \boxed{\frac{2}{3}", None),
        ("so\n#### -1,234,567", "-1234567"),
        ("so\n#### (1,234)\nDone", "(1,234)"),
        (r"\boxed{} #### 5", "5"),
        ("nothing", None),
    ],
)
def test_answer_of_a_solution_is_its_last_box_or_what_follows_hashes(
    solution: str, answer: str | None
) -> None:
    assert answer_of_solution(solution) == answer


@pytest.mark.parametrize(
    ("source", "level"),
    [
        ("openai/gsm8k", Level.GSM),
        ("lighteval/MATH", Level.MATH),
        ("DigitalLearningGmbH/MATH-lighteval", Level.MATH),
        ("aime2024", Level.OLYMPIAD),
        ("aime_1983_2023", Level.OLYMPIAD),
        ("amc23", Level.OLYMPIAD),
        ("mathematics_notes", None),
        ("", None),
    ],
)
def test_level_of_a_source(source: str, level: Level | None) -> None:
    assert level_of_source(source) == level
