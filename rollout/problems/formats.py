r"""What the columns of known data sets mean: a raw row -> a `Draft` of a problem.

    numina-cot     source, problem, solution, messages         subset in `source`, answer boxed
    numina-1.5     + answer, problem_type, question_type, problem_is_valid, solution_is_valid
    metamath       query, response, type, original_question    boxed, `#### 5`, "The answer is: 5";
                                                               says which problem it varies
    gsm8k          question, answer                            answer after `####`
    math           problem, level ("Level 3"), type, solution  answer boxed
    dapo           prompt or messages, reward_model.ground_truth (or ground_truth)
    orz            [{from, value}, {ground_truth: {value}}]
    rstar          index, question, answer
    table          problem or question, answer; ours: id, source, level, subject, difficulty, ...
    columns        any other, by a column map; `prompt.0.content` goes into structures

The format is told from the first row. The level comes from, in this order: what the user says; a
column holding one of ours; the data set's own mark (MetaMath's type, MATH's "Level 3"); the source
(`LEVELS`). Where none says anything the level is "math", and the row is marked as assumed.

NuminaMath is kept as in rStar-Math (arXiv 2501.04519, section 3.4.1): only competition subsets,
"because grade-school problems do not help". The paper names AIME/AMC and Olympiads: `amc_aime` and
`olympiads`, in NuminaMath-1.5 also `olympiads_ref`, the part of the olympiads taken from official
papers. `subsets` widens that.

Not covered: a data set mixing formats in one file; two answers in one ground truth text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rollout.problem import Level
from rollout.problems.rows import ProblemFileError
from rollout.problems.text import problem_id, problem_key
from verifier.answer import extract_answer

PAPER_SUBSETS = ("amc_aime", "olympiads", "olympiads_ref")
"""Subsets of NuminaMath that are kept unless told otherwise."""

LEVELS: Mapping[str, Level] = {
    name: level
    for level, names in (
        (Level.GSM, "gsm8k orca_math"),
        (Level.MATH, "math synthetic_math cn_k12 metamath hendrycks competition_math"),
        (Level.OLYMPIAD, "amc_aime synthetic_amc aops_forum olympiads olympiads_ref cn_contest"),
        (Level.OLYMPIAD, "inequalities number_theory math_dapo aime amc omni olympiadbench"),
    )
    for name in names.split()
}
"""Level by source; a name counts also as the last part of a path (`openai/gsm8k`), or followed by a
separator or a year (`aime_1983`, `math-lighteval`)."""

COLUMN_NAMES = (
    "problem",
    "answer",
    "solution",
    "source",
    "level",
    "id",
    "subject",
    "difficulty",
    "answers_alt",
)
"""What a column map may name."""


class RowError(ValueError):
    """A row is not what its format says; the message says how."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """A problem as a row gives it, before it is judged."""

    problem: str
    answer: str | None
    source: str
    level: Level | None
    """None: nothing says."""
    solution: str | None = None
    subject: str | None = None
    difficulty: int | None = None
    answers_alt: tuple[str, ...] = ()
    origin_id: str | None = None
    """What the row itself calls it."""
    rewording_of: str | None = None
    """Id of the problem that it varies."""
    exclusion: str | None = None
    """Why the data set's own marks set it aside; None: they do not."""


Convert = Callable[[Any, str], Draft]
"""(row, stem of the file) -> draft; raises RowError."""


def detect(row: Any, place: str) -> str:
    """The format of a file, from its first readable row.

    Raises:
        ProblemFileError: it is none that is known; the message names the columns.
    """
    if isinstance(row, list):
        return "orz"
    if not isinstance(row, Mapping):
        raise ProblemFileError(f"{place}: expected rows of named columns, got {_kind(row)}")
    names = set(row)
    if {"problem", "question_type", "problem_is_valid"} <= names:
        return "numina-1.5"
    if {"source", "problem", "solution", "messages"} <= names:
        return "numina-cot"
    if {"query", "response"} <= names:
        return "metamath"
    if _truth_of(row) is not None and names & {"prompt", "messages", "conversations", "problem"}:
        return "dapo"
    if {"problem", "level", "type", "solution"} <= names and "answer" not in names:
        return "math"
    if {"question", "answer"} <= names and "problem" not in names:
        if "####" in str(row["answer"]):
            return "gsm8k"
        return "table" if names & {"id", "level", "source"} else "rstar"
    if names & {"problem", "question"} and names & {"answer", "solution"}:
        return "table"
    raise ProblemFileError(
        f"{place}: no known format has the columns {', '.join(sorted(map(str, names)))}; name them "
        "with --columns problem=...,answer=... (or solution=...)"
    )


def converter(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    subsets: Sequence[str] | None = PAPER_SUBSETS,
) -> Convert:
    """How rows of a format become drafts.

    Args:
        columns: what is where, for the format "columns".
        subsets: subsets of NuminaMath to keep; None: all.
    Raises:
        ProblemFileError: unknown format, or a column map that names no problem or no answer.
    """
    if name == "columns":
        return _by_columns(columns or {})
    if name not in _FORMATS:
        raise ProblemFileError(f"unknown format {name!r}; known: {', '.join(_FORMATS)}, columns")
    convert = _FORMATS[name]
    if name == "orz":
        return convert
    if convert is _numina:
        convert = partial(_numina, subsets=subsets)
    return lambda row, stem: convert(_mapping(row), stem)


def parse_columns(text: str) -> dict[str, str]:
    """`problem=text,answer=label` -> a column map.

    Raises:
        ProblemFileError: not of this form, or a name that is not one of `COLUMN_NAMES`.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or name not in COLUMN_NAMES:
            raise ProblemFileError(
                f"--columns: expected NAME=COLUMN with NAME one of {', '.join(COLUMN_NAMES)}, "
                f"got {part.strip()!r}"
            )
        columns[name] = column
    return columns


def level_of_source(source: str) -> Level | None:
    """The level a source stands for; None where `LEVELS` does not know it."""
    name = source.strip().lower().rsplit("/", 1)[-1].replace("-", "_").replace(" ", "_")
    while name:
        if name in LEVELS:
            return LEVELS[name]
        shorter = re.sub(r"(?:_[^_]*|\d+)$", "", name)
        if shorter == name:
            break
        name = shorter
    return None


def answer_of_solution(solution: str) -> str | None:
    r"""The last `\boxed{}` of a solution, else what is behind its last `####`; None: neither."""
    return extract_answer(solution) or _after_hashes(solution)


def _after_hashes(solution: str) -> str | None:
    _, mark, rest = solution.rpartition("####")
    if not mark:
        return None
    line = rest.strip().split("\n", 1)[0].strip().lstrip("$").strip()
    return _without_thousands(line) or None


def _without_thousands(answer: str) -> str:
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


_THOUSANDS = re.compile(r"-?\$?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LEVEL_MARK = re.compile(r"level\s*([1-5?])", re.IGNORECASE)
_THE_ANSWER_IS = re.compile(r"The answer is:?\s*(.+?)\s*$", re.DOTALL)
_ASKED_FORM = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be "
    r"of the form Answer: .*? is the answer to the problem\.\s*"
    r"|\s*Remember to put your answer on its own line after \"Answer:\"\.\s*$"
    r"|\s*(?:Please reason|Let's think) step by step,? and (?:put|output) (?:your|the) final "
    r"answer within \\boxed\{\}\.\s*$",
    re.DOTALL,
)


def _table(row: Mapping[str, Any], stem: str) -> Draft:
    problem = _problem(row, "problem" if "problem" in row else "question")
    source = _optional(row, "source") or stem
    level, difficulty = _level(row.get("level"))
    if row.get("difficulty") is not None and difficulty is None:
        difficulty = _difficulty(row["difficulty"])
    solution = _optional(row, "solution")
    answer = _answer(row.get("answer"))
    if answer is not None and "####" in answer:
        answer = _after_hashes(answer)
    if answer is None and "answer" not in row and solution is not None:
        answer = answer_of_solution(solution)
    identifier = row.get("origin_id") or row.get("id", row.get("index"))
    return Draft(
        problem=problem,
        answer=answer,
        source=source,
        level=level or level_of_source(source),
        solution=solution,
        subject=_optional(row, "subject"),
        difficulty=difficulty,
        answers_alt=alternatives(row.get("answers_alt")),
        origin_id=None if identifier is None else str(identifier),
        rewording_of=_optional(row, "rewording_of"),
    )


def _rstar(row: Mapping[str, Any], stem: str) -> Draft:
    index = row.get("index")
    return Draft(
        problem=_problem(row, "question"),
        answer=_answer(row.get("answer")),
        source=stem,
        level=level_of_source(stem),
        origin_id=None if index is None else str(index),
    )


def _gsm8k(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "answer")
    return Draft(
        problem=_problem(row, "question"),
        answer=_after_hashes(solution),
        source="gsm8k",
        level=Level.GSM,
        solution=solution,
    )


def _math(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "solution")
    level, difficulty = _level(row.get("level"))
    return Draft(
        problem=_problem(row, "problem"),
        answer=answer_of_solution(solution),
        source="math",
        level=level or Level.MATH,
        solution=solution,
        subject=_optional(row, "type"),
        difficulty=difficulty,
    )


def _metamath(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "response")
    kind = _optional(row, "type") or ""
    answer = answer_of_solution(solution)
    if answer is None:
        said = list(_THE_ANSWER_IS.finditer(solution))
        answer = said[-1][1] if said else None
    problem = _problem(row, "query")
    original = _optional(row, "original_question")
    varied = original is not None and problem_key(original) != problem_key(problem)
    return Draft(
        problem=problem,
        answer=None if answer is None else _without_thousands(answer),
        source="metamath",
        level=Level.GSM if kind.startswith("GSM") else Level.MATH,
        solution=solution,
        subject=kind or None,
        rewording_of=problem_id(problem_key(original)) if original and varied else None,
    )


def _numina(row: Mapping[str, Any], stem: str, subsets: Sequence[str] | None = None) -> Draft:
    subset = _text(row, "source").strip()
    solution = _optional(row, "solution")
    exclusion = None
    if subsets is not None and subset not in subsets:
        exclusion = f"subset {subset} is not among those kept"
    elif (row.get("question_type") or "") == "proof":
        exclusion = "marked as a proof"
    elif (mark := row.get("problem_is_valid")) not in (None, "", "Yes"):
        exclusion = f"problem marked as not valid ({mark})"
    elif (mark := row.get("solution_is_valid")) not in (None, "", "Yes"):
        exclusion = f"solution marked as not valid ({mark})"
    answer = _answer(row.get("answer"))
    if answer is not None and answer.lower() in ("proof", "notfound"):
        proof = answer.lower() == "proof"
        exclusion = exclusion or (
            "marked as a proof" if proof else "no answer was found by its makers"
        )
        answer = None
    if answer is None and "answer" not in row and solution is not None:
        answer = answer_of_solution(solution)
    return Draft(
        problem=_problem(row, "problem"),
        answer=answer,
        source=f"numina/{subset}",
        level=LEVELS.get(subset),
        solution=solution,
        subject=_optional(row, "problem_type"),
        exclusion=exclusion,
    )


def _dapo(row: Mapping[str, Any], stem: str) -> Draft:
    truth = _truth_of(row)
    if truth is None:
        raise RowError("no reward_model.ground_truth")
    asked = next((row[key] for key in _ASKED if row.get(key)), None)
    problem = _ASKED_FORM.sub("", _user_turn(asked)).strip()
    if not problem:
        raise RowError("no problem text")
    answers = _ground_truths(truth)
    source = _optional(row, "data_source") or _optional(row, "dataset") or stem
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    return Draft(
        problem=problem,
        answer=answers[0] if answers else None,
        answers_alt=tuple(answers[1:]),
        source=source,
        level=level_of_source(source),
        origin_id=None if index is None else str(index),
    )


_ASKED = ("problem", "prompt", "messages", "conversations")


def _orz(row: Any, stem: str) -> Draft:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) < 2:
        raise RowError(f"expected a list of two turns, got {_kind(row)}")
    problem = _user_turn(row)
    truths = [
        turn["ground_truth"] for turn in row if isinstance(turn, Mapping) and "ground_truth" in turn
    ]
    if not truths:
        raise RowError("no turn has a ground_truth")
    truth = truths[-1]
    answers = _ground_truths(truth.get("value") if isinstance(truth, Mapping) else truth)
    if not problem.strip():
        raise RowError("no problem text")
    return Draft(
        problem=problem,
        answer=answers[0] if answers else None,
        answers_alt=tuple(answers[1:]),
        source=stem,
        level=level_of_source(stem),
    )


_FORMATS: dict[str, Convert] = {
    "table": _table,
    "rstar": _rstar,
    "gsm8k": _gsm8k,
    "math": _math,
    "metamath": _metamath,
    "numina-cot": _numina,
    "numina-1.5": _numina,
    "dapo": _dapo,
    "orz": _orz,
}


def _by_columns(columns: Mapping[str, str]) -> Convert:
    if "problem" not in columns or not {"answer", "solution"} & set(columns):
        raise ProblemFileError("--columns: name at least problem and one of answer and solution")
    return lambda row, stem: _table(
        {name: _at(row, column) for name, column in columns.items()}, stem
    )


def _at(row: Any, column: str) -> Any:
    if isinstance(row, Mapping) and column in row:
        return row[column]
    for key in column.split("."):
        if isinstance(row, Mapping) and key in row:
            row = row[key]
        elif isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            raise RowError(f"no column {column!r}")
    return row


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise RowError(f"expected named columns, got {_kind(row)}")
    return row


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(
            f"no column {name!r}" if name not in row else f"{name} is {_kind(value)}, not text"
        )
    return value


def _problem(row: Mapping[str, Any], name: str) -> str:
    text = _text(row, name)
    if not text.strip():
        raise RowError("no problem text")
    return text


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


def _answer(value: Any) -> str | None:
    """Answers may be numbers; true and false, lists and objects are no final answers."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"answer is {_kind(value)}, not text or a number")
    text = str(value).strip()
    if text.startswith("\\boxed"):
        text = extract_answer(text) or text
    return text or None


def _level(value: Any) -> tuple[Level | None, int | None]:
    """(level, difficulty 1-5) of a column `level`: one of ours, or MATH's "Level 3"."""
    if value is None or value == "":
        return None, None
    text = str(value).strip().lower()
    if text in set(Level):
        return Level(text), None
    if mark := _LEVEL_MARK.fullmatch(text):
        return Level.MATH, int(mark[1]) if mark[1] != "?" else None
    raise RowError(f"unknown level {value!r}; expected one of {', '.join(Level)} or Level 1-5")


def _difficulty(value: Any) -> int | None:
    try:
        number = round(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number <= 127 else None


def alternatives(value: Any) -> tuple[str, ...]:
    """Further accepted answers of a column: a list, or a JSON list as text."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"answers_alt is not a JSON list: {error}") from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"answers_alt is {_kind(value)}, not a list")
    return tuple(str(item) for item in value)


def _truth_of(row: Mapping[str, Any]) -> Any:
    model = row.get("reward_model")
    if isinstance(model, Mapping) and model.get("ground_truth") is not None:
        return model["ground_truth"]
    return row.get("ground_truth")


def _ground_truths(truth: Any) -> list[str]:
    """A ground truth is text, a number, a list, or a JSON list as text."""
    if isinstance(truth, str) and truth.lstrip().startswith("["):
        try:
            parsed = json.loads(truth)
        except ValueError:
            parsed = None
        # [1, 2] is an interval or a pair; ["34"] is a list of accepted answers.
        if isinstance(parsed, list) and parsed and all(isinstance(item, str) for item in parsed):
            truth = parsed
    items = truth if isinstance(truth, list) else [truth]
    return [answer for item in items if (answer := _answer(item)) is not None]


def _user_turn(asked: Any) -> str:
    """The problem in a prompt: text, or the first turn of the user."""
    if isinstance(asked, str):
        return asked
    if isinstance(asked, Sequence):
        for turn in asked:
            speaker = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
            if speaker in ("user", "human"):
                content = turn.get("content", turn.get("value"))
                if isinstance(content, str):
                    return content
    raise RowError("no turn of the user in the prompt")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
