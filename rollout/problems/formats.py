r"""What the columns of known data sets mean: a raw row -> a `Draft` of a problem.

    numina-cot     source, problem, solution, messages         subset in `source`, answer boxed
    numina-1.5     + answer, problem_type, question_type, problem_is_valid, solution_is_valid
    metamath       query, response, type, original_question    boxed, `#### 5`, "The answer is: 5";
                                                               says which problem it varies
    gsm8k          question, answer                            answer after `####`
    math           problem, level ("Level 3"), type, solution  answer boxed
    dapo           prompt or messages, reward_model.ground_truth (or ground_truth)
    orz            [{from, value}, {ground_truth: {value}}]
    olympiadbench  question, context, final_answer, is_multiple_answer, unit, error
    agieval        passage, question, options, label, answer   Gaokao and SAT of AGIEval
    choices        problem or question; options or choices; answer, correct or label
    story          body, question, answer                      ASDiv, SVAMP
    mawps          input, target
    carp           content, answer
    rstar          index, question, answer
    table          problem or question, answer; ours: id, source, level, subject, difficulty, ...
    columns        any other, by a column map; `prompt.0.content` goes into structures and JSON
                   texts, `body+question` joins columns

The format is told from the first row, by all columns that it needs; names are compared without
regard to case. A column that looks like a part of the problem (`CONTENT`) and that the format would
leave out stops the import, in whichever row it is first filled: a problem without its story is
worse than none. The level comes from, in this order: what the user says; a column holding one of
ours; the data set's own mark (MetaMath's type, MATH's "Level 3"); the source (`LEVELS`). Where none
says anything the level is "math", and the row is marked as assumed.

NuminaMath is kept as in rStar-Math (arXiv 2501.04519, section 3.4.1): only competition subsets,
"because grade-school problems do not help". The paper names AIME/AMC and Olympiads: `amc_aime` and
`olympiads`, in NuminaMath-1.5 also `olympiads_ref`, the part of the olympiads taken from official
papers. `subsets` widens that.

Not covered: a data set mixing formats in one file; two answers in one ground truth text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from rollout.problem import Level
from rollout.problems.choices import chosen, list_options, read_options
from rollout.problems.golds import (
    NO_GOLD,
    Gold,
    after_hashes,
    all_of,
    alternatives,
    answer_of_solution,
    any_of,
    given,
    is_blank,
    without_thousands,
)
from rollout.problems.rows import ProblemFileError, RowError, WholeFileError, kind_of_value
from rollout.problems.text import canonical, problem_id, problem_key

PAPER_SUBSETS = ("amc_aime", "olympiads", "olympiads_ref")
"""Subsets of NuminaMath that are kept unless told otherwise."""

LEVELS: Mapping[str, Level] = {
    name: level
    for level, names in (
        (Level.GSM, "gsm8k orca_math asdiv svamp mawps cmath"),
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


CONTENT = re.compile(
    r"(?:\w+_)?(?:body|context|passage|paragraph|premise|background|choice|option|image|figure|diagram"
    r"|picture)s?(?:_\d+)?|instruction",
    re.IGNORECASE,
)
"""Names of columns that hold a part of the problem, or what it cannot be understood without."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """A problem as a row gives it, before it is judged."""

    problem: str
    gold: Gold
    source: str
    level: Level | None
    """None: nothing says."""
    solution: str | None = None
    subject: str | None = None
    difficulty: int | None = None
    origin_id: str | None = None
    """What the row itself calls it."""
    rewording_of: str | None = None
    """Id of the problem that it varies."""
    exclusion: str | None = None
    """Why the data set's own marks set it aside; None: they do not."""

    @property
    def answer(self) -> str | None:
        return self.gold.answer

    @property
    def answers_alt(self) -> tuple[str, ...]:
        return self.gold.also


Convert = Callable[[Any, str], Draft]
"""(row, stem of the file) -> draft; raises RowError."""


def detect(row: Any, place: str, drop: Collection[str] = ()) -> str:
    """The format of a file, from its first readable row.

    Args:
        drop: columns that are taken as not there.
    Raises:
        ProblemFileError: it is none that is known; the message names the columns.
    """
    if isinstance(row, list):
        return "orz"
    if not isinstance(row, Mapping):
        raise ProblemFileError(f"{place}: expected rows of named columns, got {kind_of_value(row)}")
    row = _in_lower_case(without(row, drop))
    names = set(row)
    asked = bool(names & {"problem", "question"})
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
    if {"question", "final_answer", "is_multiple_answer"} <= names:
        return "olympiadbench"
    if {"passage", "question", "options", "label"} <= names:
        return "agieval"
    if asked and names & {"options", "choices"} and names & {"answer", "correct", "label"}:
        return "choices"
    if {"body", "question", "answer"} <= names:
        return "story"
    if {"question", "answer"} <= names and "problem" not in names:
        if "####" in str(row["answer"]):
            return "gsm8k"
        return "table" if names & {"id", "level", "source"} else "rstar"
    if asked and names & {"answer", "solution"}:
        return "table"
    if not asked and {"content", "answer"} <= names:
        return "carp"
    if not asked and {"input", "target"} <= names:
        return "mawps"
    raise ProblemFileError(
        f"{place}: no known format has the columns {', '.join(sorted(map(str, names)))}; name them "
        f"with {_columns_of(row)}"
    )


def _columns_of(row: Mapping[str, Any]) -> str:
    """What to say for a row of no known format: the columns inside one of its columns, if any."""
    for name, value in row.items():
        inner = _structure(value)
        names = {key.lower(): key for key in inner} if isinstance(inner, Mapping) else {}
        problem = next((names[key] for key in ("problem", "question") if key in names), None)
        answer = next((key for key in ("answer", "solution") if key in names), None)
        if problem and answer:
            return f"--columns problem={name}.{problem},{answer}={name}.{names[answer]}"
    return "--columns problem=...,answer=... (or solution=...)"


def converter(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    subsets: Sequence[str] | None = PAPER_SUBSETS,
    drop: Collection[str] = (),
) -> Convert:
    """How rows of a format become drafts.

    A row raises RowError, and WholeFileError where it shows that the file would be read wrongly.

    Args:
        columns: what is where, for the format "columns".
        subsets: subsets of NuminaMath to keep; None: all.
        drop: columns that are taken as not there.
    Raises:
        ProblemFileError: unknown format, or a column map that names no problem or no answer.
    """
    if name == "columns":
        return _by_columns(columns or {}, drop)
    if name not in _FORMATS:
        raise ProblemFileError(f"unknown format {name!r}; known: {', '.join(_FORMATS)}, columns")
    convert, used = _FORMATS[name]
    if convert is _orz:
        return convert
    if convert is _numina:
        convert = partial(_numina, subsets=subsets)

    def checked(row: Any, stem: str) -> Draft:
        row = _in_lower_case(without(_mapping(row), drop))
        refuse_losses(row, used, name)
        return convert(row, stem)

    return checked


def refuse_losses(row: Mapping[str, Any], used: Collection[str], format: str) -> None:
    """Raise where a row holds content that would not be used.

    Args:
        used: names of the columns that are used, in lower case.
    Raises:
        WholeFileError: which column, and what to say about it.
    """
    for name, value in row.items():
        name = str(name)
        if not _looks_like_content(name) or name.lower() in used:
            continue
        if is_blank(value) or isinstance(value, bool | int | float) or value in ([], {}, "[]"):
            continue
        asked = next((key for key in ("problem", "question") if key in row), "question")
        joined = f"{asked}+{name}" if _OFFERED.search(name) else f"{name}+{asked}"
        use = f"use it with --columns problem={joined},answer=... or "
        use = "" if _PICTURE.search(name) else use
        raise WholeFileError(
            f"column {name} ({str(value)[:40]!r}) looks like a part of the problem, and format "
            f"{format} would leave it out; {use}allow that with --drop {name}"
        )


def without(row: Mapping[str, Any], drop: Collection[str]) -> Mapping[str, Any]:
    """The row without some columns; case does not count."""
    if not drop:
        return row
    gone = set(map(str.lower, drop))
    return {name: value for name, value in row.items() if str(name).lower() not in gone}


@lru_cache(maxsize=1024)
def _looks_like_content(name: str) -> bool:
    return bool(CONTENT.fullmatch(name))


_PICTURE = re.compile(r"image|figure|diagram|picture", re.IGNORECASE)
_OFFERED = re.compile(r"choice|option", re.IGNORECASE)


def _in_lower_case(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with names in lower case; a name already so goes before another."""
    if all(isinstance(name, str) and not name.isupper() and name == name.lower() for name in row):
        return row
    return {str(name).lower(): value for name, value in row.items()} | {
        name: value for name, value in row.items() if name == str(name).lower()
    }


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
    gold = given(row.get("answer"))
    solution = _optional(row, "solution")
    if "answer" not in row and solution is not None:
        gold = answer_of_solution(solution)
    return _read(row, stem, _asked(row), gold)


def _asked(row: Mapping[str, Any]) -> str:
    """The text in `problem` or `question`; where both hold one it must be the same."""
    names = [name for name in ("problem", "question") if _optional(row, name)]
    if len({canonical(row[name]) for name in names}) > 1:
        raise WholeFileError(
            "columns problem and question hold different texts; say which with --columns "
            "problem=...,answer=..., or problem=problem+question"
        )
    return _problem(row, names[0] if names else "problem" if "problem" in row else "question")


def _read(row: Mapping[str, Any], stem: str, problem: str, gold: Gold) -> Draft:
    """A draft, with what the usual columns say beside problem and answer."""
    source = _optional(row, "source") or stem
    level, difficulty = _level(row.get("level"))
    if row.get("difficulty") is not None and difficulty is None:
        difficulty = _difficulty(row["difficulty"])
    identifier = row.get("origin_id") or row.get("id", row.get("index"))
    return Draft(
        problem=problem,
        gold=replace(gold, also=(*gold.also, *alternatives(row.get("answers_alt")))),
        source=source,
        level=level or level_of_source(source),
        solution=_optional(row, "solution"),
        subject=_optional(row, "subject"),
        difficulty=difficulty,
        origin_id=None if identifier is None else str(identifier),
        rewording_of=_optional(row, "rewording_of"),
    )


def _with_options(problem: str, options: Any, answer: Any) -> tuple[str, Gold]:
    """A multiple-choice problem as text, and its letter; without options as it is."""
    offered = read_options(options)
    if not offered:
        return problem, given(answer)
    text = f"{problem.rstrip()}\n{list_options(offered)}"
    return text, NO_GOLD if is_blank(answer) else Gold(*chosen(answer, offered))


def _choices(row: Mapping[str, Any], stem: str) -> Draft:
    answer = next((row[name] for name in ("answer", "correct", "label") if name in row), None)
    options = row.get("options") or row.get("choices")
    return _read(row, stem, *_with_options(_asked(row), options, answer))


def _agieval(row: Mapping[str, Any], stem: str) -> Draft:
    answer = row["label"] if row.get("options") and row.get("label") else row.get("answer")
    problem = _joined(row, "passage", "question")
    return _read(row, stem, *_with_options(problem, row.get("options"), answer))


def _story(row: Mapping[str, Any], stem: str) -> Draft:
    return _read(row, stem, _joined(row, "body", "question"), given(row.get("answer")))


def _mawps(row: Mapping[str, Any], stem: str) -> Draft:
    return _read(row, stem, _problem(row, "input"), given(row.get("target")))


def _carp(row: Mapping[str, Any], stem: str) -> Draft:
    return _read(row, stem, _problem(row, "content"), given(row.get("answer")))


def _olympiadbench(row: Mapping[str, Any], stem: str) -> Draft:
    several = str(row.get("is_multiple_answer")).lower() == "true"
    gold = all_of(row.get("final_answer")) if several else given(row.get("final_answer"))
    if gold.answer and (unit := _optional(row, "unit")):
        gold = replace(gold, also=(f"{gold.answer} {unit}",))
    solutions = row.get("solution")
    solution = "\n\n".join(map(str, solutions)) if isinstance(solutions, list) else solutions
    identifier, exclusion = row.get("id"), None
    if not is_blank(row.get("error")):
        exclusion = "answer counts within a tolerance, which the check does not know"
    elif str(row.get("answer_type")).startswith("Need_human"):
        exclusion = "answer needs a person to judge it"
    return Draft(
        problem=_joined(row, "context", "question"),
        gold=gold,
        source="olympiadbench",
        level=Level.OLYMPIAD,
        solution=solution,
        subject=_optional(row, "subfield"),
        origin_id=None if identifier is None else str(identifier),
        exclusion=exclusion,
    )


def _gsm8k(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "answer")
    return Draft(
        problem=_problem(row, "question"),
        gold=Gold(after_hashes(solution)),
        source="gsm8k",
        level=Level.GSM,
        solution=solution,
    )


def _math(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "solution")
    level, difficulty = _level(row.get("level"))
    return Draft(
        problem=_problem(row, "problem"),
        gold=answer_of_solution(solution),
        source="math",
        level=level or Level.MATH,
        solution=solution,
        subject=_optional(row, "type"),
        difficulty=difficulty,
    )


def _metamath(row: Mapping[str, Any], stem: str) -> Draft:
    solution = _text(row, "response")
    kind = _optional(row, "type") or ""
    gold = answer_of_solution(solution)
    if gold == NO_GOLD and (said := list(_THE_ANSWER_IS.finditer(solution))):
        gold = Gold(said[-1][1])
    problem = _problem(row, "query")
    original = _optional(row, "original_question")
    varied = original is not None and problem_key(original) != problem_key(problem)
    return Draft(
        problem=problem,
        gold=replace(gold, answer=gold.answer and without_thousands(gold.answer)),
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
    gold = given(row.get("answer"))
    if gold.answer is not None and gold.answer.lower() in ("proof", "notfound"):
        proof = gold.answer.lower() == "proof"
        exclusion = exclusion or (
            "marked as a proof" if proof else "no answer was found by its makers"
        )
        gold = NO_GOLD
    if "answer" not in row and solution is not None:
        gold = answer_of_solution(solution)
    return Draft(
        problem=_problem(row, "problem"),
        gold=gold,
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
    source = _optional(row, "data_source") or _optional(row, "dataset") or stem
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    return Draft(
        problem=problem,
        gold=any_of(truth),
        source=source,
        level=level_of_source(source),
        origin_id=None if index is None else str(index),
    )


_ASKED = ("problem", "prompt", "messages", "conversations")


def _orz(row: Any, stem: str) -> Draft:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) < 2:
        raise RowError(f"expected a list of two turns, got {kind_of_value(row)}")
    problem = _user_turn(row)
    truths = [
        turn["ground_truth"] for turn in row if isinstance(turn, Mapping) and "ground_truth" in turn
    ]
    if not truths:
        raise RowError("no turn has a ground_truth")
    truth = truths[-1]
    if not problem.strip():
        raise RowError("no problem text")
    return Draft(
        problem=problem,
        gold=any_of(truth.get("value") if isinstance(truth, Mapping) else truth),
        source=stem,
        level=level_of_source(stem),
    )


_FORMATS: dict[str, tuple[Convert, frozenset[str]]] = {
    "table": (_table, frozenset()),
    "rstar": (_table, frozenset()),
    "gsm8k": (_gsm8k, frozenset()),
    "math": (_math, frozenset()),
    "metamath": (_metamath, frozenset()),
    "numina-cot": (_numina, frozenset()),
    "numina-1.5": (_numina, frozenset()),
    "dapo": (_dapo, frozenset()),
    "orz": (_orz, frozenset()),
    "olympiadbench": (_olympiadbench, frozenset({"context"})),
    "agieval": (_agieval, frozenset({"passage", "options"})),
    "choices": (_choices, frozenset({"options", "choices"})),
    "story": (_story, frozenset({"body"})),
    "mawps": (_mawps, frozenset()),
    "carp": (_carp, frozenset()),
}
"""How rows are read, and which columns that look like content are used."""


def _by_columns(columns: Mapping[str, str], drop: Collection[str]) -> Convert:
    if "problem" not in columns or not {"answer", "solution"} & set(columns):
        raise ProblemFileError("--columns: name at least problem and one of answer and solution")
    others = {name: column for name, column in columns.items() if name not in ("problem", "answer")}
    used = {path.lower() for column in columns.values() for path in (column, *column.split("+"))}

    def convert(row: Any, stem: str) -> Draft:
        row = without(row, drop) if isinstance(row, Mapping) else row
        problem, options = _parts_of(row, columns["problem"])
        values = {name: _at(row, column) for name, column in others.items()}
        answer = _at(row, columns["answer"]) if "answer" in columns else None
        for holder, path in _holders(row, [*columns.values()]):
            inside = {name.removeprefix(path) for name in used if name.startswith(path)}
            refuse_losses(without(holder, drop), {name.split(".")[0] for name in inside}, "columns")
        if options is not None:
            return _read(values, stem, *_with_options(problem, options, answer))
        given_answer = {"answer": answer} if "answer" in columns else {}
        return _table({**values, "problem": problem, **given_answer}, stem)

    return convert


def _holders(row: Any, columns: Sequence[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The structures that named columns stand in, each with its path ("" or "row.")."""
    paths = {path.rpartition(".")[0] for column in columns for path in column.split("+")}
    for path in sorted(paths):
        holder = _at(row, path) if path else row
        if isinstance(holder := _structure(holder), Mapping):
            yield holder, f"{path.lower()}." if path else ""


def _parts_of(row: Any, column: str) -> tuple[Any, Any]:
    """The problem that `body+question` names, and options among its parts, None without."""
    whole = isinstance(row, Mapping) and column in row
    values = [_at(row, path.strip()) for path in ([column] if whole else column.split("+"))]
    if len(values) == 1:
        return values[0], None
    options = [value for value in values if isinstance(value, list | Mapping)]
    texts = [value for value in values if value is not None and value not in options]
    if len(options) > 1 or not all(isinstance(text, str) for text in texts):
        kinds = ", ".join(map(kind_of_value, values))
        raise RowError(f"{column} is {kinds}; expected texts, and options at most once")
    text = "\n".join(text.strip() for text in texts if text.strip())
    return text, options[0] if options else None


def _at(row: Any, column: str) -> Any:
    if isinstance(row, Mapping) and column in row:
        return row[column]
    for key in column.split("."):
        row = _structure(row)
        if isinstance(row, Mapping) and (name := _name_in(row, key)) is not None:
            row = row[name]
        elif isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            raise RowError(f"no column {column!r}")
    return row


def _name_in(row: Mapping[str, Any], key: str) -> str | None:
    """A column by its name, or else by its name in another case; None: there is none."""
    if key in row:
        return key
    return next((name for name in row if str(name).lower() == key.lower()), None)


def _structure(value: Any) -> Any:
    """A value, or what it says where it is a JSON object or list as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise RowError(f"expected named columns, got {kind_of_value(row)}")
    return row


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(
            f"no column {name!r}"
            if name not in row
            else f"{name} is {kind_of_value(value)}, not text"
        )
    return value


def _problem(row: Mapping[str, Any], name: str) -> str:
    text = _text(row, name)
    if not text.strip():
        raise RowError("no problem text")
    return text


def _joined(row: Mapping[str, Any], first: str, name: str) -> str:
    """A text and, on lines before it, what it needs from another column, if anything."""
    before = _optional(row, first)
    text = _problem(row, name)
    return f"{before.strip()}\n{text.strip()}" if before else text


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


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


def _truth_of(row: Mapping[str, Any]) -> Any:
    model = row.get("reward_model")
    if isinstance(model, Mapping) and model.get("ground_truth") is not None:
        return model["ground_truth"]
    return row.get("ground_truth")


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
