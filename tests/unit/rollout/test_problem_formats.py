from __future__ import annotations

import json
from typing import Any

import pytest

from rollout.problem import Level
from rollout.problems.formats import (
    converter,
    detect,
    level_of_source,
    parse_columns,
    refuse_losses,
)
from rollout.problems.golds import SEVERAL_ANSWERS
from rollout.problems.rows import ProblemFileError, RowError, WholeFileError
from rollout.problems.text import problem_id, problem_key

NUMINA_COT = {
    "source": "amc_aime",
    "problem": "How many?",
    "solution": r"There are \boxed{3}. So the answer is \boxed{\frac{1}{2}}.",
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


OLYMPIADBENCH = {
    "id": 7,
    "subfield": "Algebra",
    "context": None,
    "question": "How many?",
    "solution": ["One way.", "Another."],
    "final_answer": ["$12$"],
    "is_multiple_answer": False,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}
GAOKAO = {
    "passage": None,
    "question": "Which?",
    "options": {"A": "$-1$", "B": "$x$", "C": "$2$", "D": "$3$"},
    "label": "C",
    "answer": None,
    "other": {"source": "a paper"},
}
MMLU = {"question": "Which?", "type": "algebra", "choices": ["red", "2", "4", "8"], "answer": 2}
AQUA = {
    "question": "Which?",
    "options": ["A)$6", "B)$7", "C)None"],
    "rationale": "",
    "correct": "B",
}
SAT = {"id": "0", "question": "Which?", "options": "A) $f(B)=0$ B) -10 and 10", "Answer": "B"}
ASDIV = {"body": "Two reds.", "question": "How many?", "answer": "2 (balls)", "formula": "1+1=2"}
SVAMP = {"Body": "Two reds", "Question": "How many?", "Answer": 145.0, "Type": "Sum", "ID": "c-1"}
MAWPS = {"input": "How many?", "target": 43.0, "type": "singleeq", "idx": 0}
CARP = {"content": "How many?", "answer": "x < - 2", "steps": "...", "exprs": ["x < - 2"]}


@pytest.mark.parametrize(
    ("row", "format", "problem", "answer", "also"),
    [
        (OLYMPIADBENCH, "olympiadbench", "How many?", "$12$", ()),
        (
            {**OLYMPIADBENCH, "context": "Let x=1.", "unit": "km"},
            "olympiadbench",
            "Let x=1.\nHow many?",
            "$12$",
            ("$12$ km",),
        ),
        (
            {**OLYMPIADBENCH, "is_multiple_answer": True, "final_answer": ["$1$", "$-2$"]},
            "olympiadbench",
            "How many?",
            "$1$, $-2$",
            (),
        ),
        (GAOKAO, "agieval", "Which?\n(A) $-1$\n(B) $x$\n(C) $2$\n(D) $3$", "C", ("$2$",)),
        (
            {**GAOKAO, "options": None, "label": None, "answer": "$5$;$10$", "passage": "Read."},
            "agieval",
            "Read.\nWhich?",
            "$5$;$10$",
            (),
        ),
        (MMLU, "choices", "Which?\n(A) red\n(B) 2\n(C) 4\n(D) 8", "C", ("4",)),
        (AQUA, "choices", "Which?\n(A) $6\n(B) $7\n(C) None", "B", ("$7",)),
        (SAT, "choices", "Which?\n(A) $f(B)=0$\n(B) -10 and 10", "B", ("-10 and 10",)),
        (ASDIV, "story", "Two reds.\nHow many?", "2", ()),
        (SVAMP, "story", "Two reds\nHow many?", "145", ()),
        (MAWPS, "mawps", "How many?", "43", ()),
        (CARP, "carp", "How many?", "x < - 2", ()),
        ({"Question": "How many?", "Answer": 3}, "rstar", "How many?", "3", ()),
        ({"problem": 1, "question": "How many?", "answer": "7"}, "table", "How many?", "7", ()),
    ],
)
def test_files_as_people_have_them(
    row: Any, format: str, problem: str, answer: str, also: tuple[str, ...]
) -> None:
    assert detect(row, "file, row 1") == format
    draft = converter(format)(row, "file")
    assert (draft.problem, draft.answer, draft.answers_alt) == (problem, answer, also)
    assert (draft.exclusion, draft.gold.doubt) == (None, None)


@pytest.mark.parametrize(
    ("change", "exclusion", "doubt"),
    [
        (
            {"error": "0.01"},
            "answer counts within a tolerance, which the check does not know",
            None,
        ),
        ({"answer_type": "Need_human_evaluate"}, "answer needs a person to judge it", None),
        ({"final_answer": ["1", "2"]}, None, SEVERAL_ANSWERS),
    ],
)
def test_olympiadbench_rows_that_cannot_be_graded_say_so(
    change: dict[str, Any], exclusion: str | None, doubt: str | None
) -> None:
    draft = converter("olympiadbench")({**OLYMPIADBENCH, **change}, "file")
    assert (draft.exclusion, draft.gold.doubt) == (exclusion, doubt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**ASDIV, "context": "At noon."},
            r"column context \('At noon.'\) looks like a part of the problem, and format story "
            r"would leave it out; use it with --columns problem=context\+question,answer=... or "
            "allow that with --drop context",
        ),
        ({**RSTAR, "Passage": "Read."}, r"column passage .*problem=passage\+question"),
        ({**RSTAR, "images": ["a.png"]}, "leave it out; allow that with --drop images"),
        ({**TABLE, "image_2": {"bytes": b"1"}}, "column image_2"),
        ({**CARP, "choices": ["1", "2"]}, r"problem=question\+choices"),
        ({**MAWPS, "instruction": "How many?"}, "column instruction"),
        ({**METAMATH, "options": "A) 1 B) 2"}, "column options"),
        ({**TABLE, "question": "Another?"}, "columns problem and question hold different texts"),
    ],
)
def test_content_that_a_format_would_leave_out_stops_the_import(row: Any, message: str) -> None:
    with pytest.raises(WholeFileError, match=message):
        converter(detect(row, "file"))(row, "file")


def test_empty_columns_and_those_dropped_stop_nothing() -> None:
    row = {**RSTAR, "context": None, "image": "", "choices": [], "has_image": True, "options": {}}
    assert converter("rstar")(row, "file").answer == "5"
    story = {**RSTAR, "body": "Two reds."}
    assert detect(story, "file", ["Body"]) == "rstar"
    assert converter("rstar", drop=["Body"])(story, "file").problem == "How many?"
    same = converter("table")({**TABLE, "question": "How  many?"}, "file")
    assert same.problem == "How many?"
    refuse_losses({"num_choices": 4, "context_length": 9, "answer": "body"}, (), "x")


def test_a_column_map_joins_columns_and_reads_options() -> None:
    convert = converter("columns", columns=parse_columns("problem=body+question,answer=answer"))
    assert convert(ASDIV, "file").problem == "Two reds.\nHow many?"
    assert convert({**ASDIV, "body": None}, "file").problem == "How many?"
    assert convert(SVAMP, "file").problem == "Two reds\nHow many?"
    columns = parse_columns("problem=question+choices,answer=answer")
    draft = converter("columns", columns=columns)(MMLU, "file")
    assert (draft.answer, draft.problem[-5:]) == ("C", "(D) 8")
    whole = converter("columns", columns=parse_columns("problem=a+b,answer=answer"))
    assert whole({"a+b": "How many?", "answer": "1"}, "file").problem == "How many?"
    with pytest.raises(WholeFileError, match=r"column body .*format columns would leave it out"):
        converter("columns", columns=parse_columns("problem=question,answer=answer"))(ASDIV, "f")
    with pytest.raises(RowError, match="question\\+idx is text, a number; expected texts"):
        converter("columns", columns=parse_columns("problem=question+idx,answer=a"))(
            {"question": "q", "idx": 3, "a": 1}, "f"
        )


def test_rows_inside_rows_are_read_by_a_column_map_that_the_message_says() -> None:
    inner = {"problem": "How many?", "answer": "7", "options": None}
    for nested in (inner, json.dumps(inner)):
        row = {"row_idx": 0, "row": nested}
        with pytest.raises(ProblemFileError, match=r"--columns problem=row.problem,answer=row.ans"):
            detect(row, "file, row 1")
        convert = converter(
            "columns", columns=parse_columns("problem=row.problem,answer=row.answer")
        )
        assert (convert(row, "f").problem, convert(row, "f").answer) == ("How many?", "7")
    with pytest.raises(WholeFileError, match="column options"):
        convert({"row": {**inner, "options": ["1", "2"]}}, "f")


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
