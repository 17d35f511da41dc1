from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.problem import DecontaminationRule, Level
from rollout.problems.golds import SEVERAL_BOXES
from rollout.problems.import_report import ImportReport, ImportSettings, report_folder
from rollout.problems.importer import PROBLEM_SCHEMA, import_problems
from rollout.problems.reader import read_problems
from rollout.problems.rows import ProblemFileError
from rollout.problems.summary import check_problems, problem_stats
from rollout.problems.text import problem_id, problem_key

DATA = Path(__file__).parents[4] / "shared" / "data"
LONG = (
    "Aya walks from the harbour to the lighthouse at four kilometres per hour and back at six; "
    "how long is the way if she needs fifty minutes in all?"
)
COWS = (
    "A farmer has 17 cows and buys 5 more at the market on Monday; how many cows does the farmer "
    "own on Tuesday when none of them ran away in the night?"
)


def row(problem: str | None, answer: Any = "2", **more: Any) -> dict[str, Any]:
    return {"level": "math", "problem": problem, "answer": answer, **more}


def jsonl(path: Path, rows: list[Any]) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def table(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[ImportReport, Path]]:
    def import_(*inputs: str, **settings: Any) -> tuple[ImportReport, Path]:
        out = tmp_path / "out" / "problems.parquet"
        return import_problems(ImportSettings(inputs=inputs, **settings), out), out

    return import_


def test_every_row_of_every_file_is_kept_or_named_with_its_reason(tmp_path, run):
    bench = jsonl(tmp_path / "bench.jsonl", [row(LONG, "2", id="b1"), row(COWS + " Say why.", "1")])
    first = jsonl(
        tmp_path / "a.jsonl",
        [
            row("What is 1+1?", "2", id="x1", answers_alt=["two"], subject="Sums", difficulty=2),
            "{broken",
            row(None),
            row("Prove that 1+1 = 2."),
            row(LONG.replace("fifty", "forty"), "3"),
            row(COWS, "22"),
            row("What  is $1 + 1$?", "2"),
        ],
    )
    second = tmp_path / "b.csv"
    second.write_text(
        "question,answer\nWhat is 1+1?,11\nWhat is 2+2?,4\n"
        f'"{COWS.replace("on M", "this M")}",22\n',
        encoding="utf-8",
    )
    report, out = run(first, str(second), against=(bench,))

    assert [file.format for file in report.files] == ["table", "rstar"]
    counts = [
        (f.rows, f.kept, f.exact_duplicates, f.near_duplicates, f.contaminated, f.bad)
        for f in report.files
    ]
    assert counts == [(7, 1, 1, 0, 2, 2), (3, 1, 1, 0, 1, 0)]
    assert report.files[0].set_aside == {"proof": 1}
    assert report.total("assumed_levels") == 3
    assert report.other_answers == 1

    kept = table(out)
    assert [(r["problem"], r["answer"], r["origin"]) for r in kept] == [
        ("What is 1+1?", "2", "a.jsonl:1"),
        ("What is 2+2?", "4", "b.csv:3"),
    ]
    assert kept[0]["id"] == problem_id(problem_key("What is 1+1?"))
    assert (kept[0]["origin_id"], kept[0]["subject"], kept[0]["difficulty"]) == ("x1", "Sums", 2)

    folder = report_folder(out)
    assert [(Path(r["file"]).name, r["row"]) for r in table(folder / "bad_rows.parquet")] == [
        ("a.jsonl", 2),
        ("a.jsonl", 3),
    ]
    assert report.bad_examples[1] == f"{first}, line 3: problem is nothing, not text"
    aside = table(folder / "set_aside.parquet")
    assert [(r["origin"], r["reason"]) for r in aside] == [("a.jsonl:4", "proof")]
    duplicates = table(folder / "duplicates.parquet")
    assert [(r["origin"], r["kept_origin"], r["kind"], r["same_answer"]) for r in duplicates] == [
        ("a.jsonl:7", "a.jsonl:1", "exact", True),
        ("b.csv:2", "a.jsonl:1", "exact", False),
    ]
    hits = table(folder / "contaminated.parquet")
    assert [(r["origin"], r["benchmark_id"], r["kind"], r["same_answer"]) for r in hits] == [
        ("a.jsonl:5", "b1", "13-gram", False),
        ("a.jsonl:6", "bench:2", "13-gram", False),
        ("b.csv:4", "bench:2", "13-gram", False),
    ]
    assert "aya walks from the harbour" in hits[0]["matched"]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "| a.jsonl:5 | b1 | 13-gram |" in page
    totals = json.loads((folder / "report.json").read_text(encoding="utf-8"))["totals"]
    assert totals["rows"] == 10
    assert sum(count for name, count in totals.items() if name != "rows") == 10


def test_a_problem_and_its_variations_have_one_original(tmp_path, run):
    gsm8k = [{"question": COWS, "answer": "So many.\n#### 22"}]
    metamath = [
        {
            "query": f"{beginning} how many cows are there when both herds are at the river?",
            "response": "The answer is: 22",
            "type": "GSM_Rephrased",
            "original_question": COWS,
        }
        for beginning in ("Two herds drink in turn;", "If the farmer counts them twice a day,")
    ]
    _, out = run(jsonl(tmp_path / "gsm8k.jsonl", gsm8k), jsonl(tmp_path / "m.jsonl", metamath))
    problems, _ = read_problems(out)
    assert len({p.id for p in problems}) == 3
    assert {p.original for p in problems} == {problem_id(problem_key(COWS))}
    # also when the table is imported once more
    again, _ = read_problems(run(str(out))[1])
    assert [p.original for p in again] == [p.original for p in problems]


def test_the_table_is_what_runs_read(tmp_path, run):
    rows = [row("What is 1+1?", 2, answers_alt=["two"]), row("What is 2+2?", 4, level="gsm")]
    _, out = run(jsonl(tmp_path / "a.jsonl", rows))
    problems, _ = read_problems(out)
    assert [(p.text, p.golds, p.level) for p in problems] == [
        ("What is 1+1?", ("2", "two"), Level.MATH),
        ("What is 2+2?", ("4",), Level.GSM),
    ]
    assert pq.read_schema(out).equals(PROBLEM_SCHEMA)


def test_reworded_benchmark_problems_under_the_13_gram_are_found_by_nearness(tmp_path, run):
    bench = jsonl(tmp_path / "bench.jsonl", [row("What is the sum of 17 and 25 and 31?", "73")])
    own = [row("Now what is the sum of 17 and 25 and 31?", "73"), row("What is 5?", "5")]
    report, out = run(jsonl(tmp_path / "a.jsonl", own), against=(bench,))
    assert report.files[0].contaminated == 1
    (hit,) = table(report_folder(out) / "contaminated.parquet")
    assert (hit["kind"], hit["origin"], hit["removed"]) == ("near", "a.jsonl:1", True)


def test_hits_with_another_answer_stay_where_the_rule_says_so_and_are_still_named(tmp_path, run):
    bench = jsonl(tmp_path / "bench.jsonl", [row(LONG, "2")])
    own = jsonl(tmp_path / "a.jsonl", [row(LONG.replace("fifty", "forty"), "3")])
    report, out = run(own, against=(bench,), rule=DecontaminationRule.SAME_ANSWER)
    assert (report.files[0].kept, report.files[0].contaminated) == (1, 0)
    (hit,) = table(report_folder(out) / "contaminated.parquet")
    assert (hit["same_answer"], hit["removed"]) == (False, False)


def test_near_duplicates_go_and_may_be_kept_on_wish(tmp_path, run):
    own = jsonl(tmp_path / "a.jsonl", [row(COWS), row(COWS.replace("on M", "this M"))])
    assert run(own)[0].files[0].near_duplicates == 1
    assert run(own, near_duplicates=False)[0].files[0].kept == 2


def test_what_the_user_says_of_source_level_and_solutions_goes_before_the_rows(tmp_path, run):
    rows = [{"problem": "What is 1+1?", "solution": "so \\boxed{2}", "source": "gsm8k"}]
    own = jsonl(tmp_path / "a.jsonl", rows)
    (kept,) = table(run(own, source="mine", level=Level.OLYMPIAD, keep_solutions=True)[1])
    assert (kept["source"], kept["level"], kept["answer"]) == ("mine", "olympiad", "2")
    assert kept["solution"] == "so \\boxed{2}"
    (kept,) = table(run(own)[1])
    assert (kept["source"], kept["level"], kept["solution"]) == ("gsm8k", "gsm", None)


def test_text_that_is_no_unicode_is_a_bad_row(tmp_path, run):
    own = jsonl(tmp_path / "a.jsonl", ['{"problem": "What \\ud800?", "answer": "1"}', row("Why?")])
    assert run(own)[0].files[0].bad == 1


def test_golds_of_several_boxes_are_joined_or_set_aside_and_both_are_counted(tmp_path, run):
    def numina(problem: str, solution: str) -> dict[str, Any]:
        return {"source": "olympiads", "problem": problem, "solution": solution, "messages": []}

    rows = [
        numina("What is x?", r"We get $\boxed{x=1}$ and $\boxed{x=3}$."),
        numina("What is y?", r"If y>0, \boxed{y=1}. Else \boxed{y=-2}."),
        numina("What is z?", r"So \boxed{7}. Wait, redo: \boxed{"),
        numina("What is t?", r"So \boxed{7}."),
    ]
    report, out = run(jsonl(tmp_path / "a.jsonl", rows))
    assert [(r["problem"], r["answer"]) for r in table(out)] == [
        ("What is x?", "x=1, x=3"),
        ("What is t?", "7"),
    ]
    assert report.files[0].joined_answers == 1
    assert report.set_aside() == {SEVERAL_BOXES: 1, "no answer": 1}
    aside = table(report_folder(out) / "set_aside.parquet")
    assert [(r["reason"], r["detail"]) for r in aside] == [
        ("answer is not clear", SEVERAL_BOXES),
        ("no answer", None),
    ]
    page = (report_folder(out) / "report.md").read_text(encoding="utf-8")
    assert "1 rows have as answer several boxes of their solution, joined." in page
    assert f"| {SEVERAL_BOXES} | 1 |" in page
    assert json.loads((report_folder(out) / "report.json").read_text())["joined_answers"] == 1


def test_content_that_would_be_lost_stops_the_import_in_whichever_row_it_is(tmp_path, run):
    plain = {"question": "What is 1+1?", "answer": "2", "context": None}
    lost = {"question": "How many are left?", "answer": "3", "context": "Of seven four go."}
    own = jsonl(tmp_path / "a.jsonl", [plain, lost])
    message = r"a.jsonl, line 2: column context .*problem=context\+question,answer=.*--drop context"
    with pytest.raises(ProblemFileError, match=message):
        run(own)
    assert not (tmp_path / "out" / "problems.parquet").exists()
    assert [r["problem"] for r in table(run(own, drop=("context",))[1])] == [
        "What is 1+1?",
        "How many are left?",
    ]
    columns = {"problem": "context+question", "answer": "answer"}
    assert table(run(own, columns=columns)[1])[1]["problem"] == (
        "Of seven four go.\nHow many are left?"
    )
    other = jsonl(tmp_path / "b.jsonl", [row("What is 2+2?")])
    with pytest.raises(ProblemFileError, match=message):
        run(other, against=(own,))
    assert run(other, against=(own,), drop=("context",))[0].benchmarks[0].problems == 2
    with pytest.raises(ProblemFileError, match=message):
        problem_stats(own)


def test_an_interrupted_import_leaves_nothing_and_the_old_output_untouched(tmp_path, run):
    own = jsonl(tmp_path / "a.jsonl", [row(f"What is {n}+{n}?", 2 * n) for n in range(5000)])
    _, out = run(jsonl(tmp_path / "old.jsonl", [row("What is 1+1?")]))
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    for moment in ("reading a.jsonl", "comparing", "writing"):

        def interrupt(stage: str, done: int, total: int, moment: str = moment) -> None:
            if stage == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_problems(ImportSettings(inputs=(own,)), out, progress=interrupt)
        assert {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (["{", row(None)], {}, "no problem to keep of 2 rows: 2 bad"),
        ([row("What is it?", "")], {}, "no problem to keep of 1 rows: 1 no answer"),
        ([row("What is it?")], {"against": ("a.jsonl",)}, "both imported and a benchmark"),
        ([row("What is it?")], {"against": ("no.parquet",)}, "no.parquet: no such problem file"),
        ([row("What is it?")], {"format": "numia"}, "unknown format 'numia'; known: table, rstar"),
        ([{"text": "What?"}], {}, r"a.jsonl, row 1: no known format has the columns text"),
    ],
)
def test_an_import_that_makes_no_sense_is_refused_and_writes_nothing(
    tmp_path, monkeypatch, rows, settings, message
):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ProblemFileError, match=message):
        import_problems(ImportSettings(inputs=("a.jsonl",), **settings), Path("out/p.parquet"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.jsonl"]


def test_rows_of_another_shape_later_in_a_file_do_not_stop_the_import(tmp_path, run):
    rows = [row("What is 1+1?"), [1, 2], {"text": "?"}, 7, row("What is 2+2?", {"a": 1})]
    report, _ = run(jsonl(tmp_path / "a.jsonl", rows))
    assert (report.files[0].kept, report.files[0].bad) == (1, 4)


def test_check_is_content_with_what_import_made_and_names_what_is_wrong(tmp_path, run):
    bench = jsonl(tmp_path / "bench.jsonl", [row(LONG, "2")])
    rows = [row("What is 1+1?"), row("What is 2+2?", "4")]
    _, out = run(jsonl(tmp_path / "a.jsonl", rows), against=(bench,))
    assert check_problems(str(out), (bench,))[0] == []

    foreign = jsonl(
        tmp_path / "b.jsonl", [*rows, rows[0] | {"answer": "3"}, row("How?", ""), "{", row(LONG)]
    )
    assert check_problems(foreign, (bench,))[0] == [
        "1 rows: no answer",
        "1 rows cannot be used",
        "1 rows repeat the text of another",
        "1 repeated rows have another answer than the first",
        f"1 rows share a text or 13 words with {bench}",
    ]

    kept = pq.read_table(out)
    changed = kept.set_column(3, "problem", pa.array(["What is 1+2?", "What is 2+2?"]))
    pq.write_table(changed, out)
    assert check_problems(str(out))[0] == ["1 ids do not fit their text"]


def test_stats_count_sources_levels_and_kinds_of_answers(tmp_path):
    answers = ["5", "1,000", "0.5", r"\frac{1}{2}", "(B)", "blue whale", r"x^2 + 1", None]
    rows = [row(f"What is {n}?", answer, source="s") for n, answer in enumerate(answers)]
    stats = problem_stats(jsonl(tmp_path / "a.jsonl", [*rows, "{"]))
    assert (stats.rows, stats.unreadable, stats.format) == (9, 1, "table")
    assert stats.by_source == {("s", "math"): 8}
    kinds = ("decimal", "fraction", "choice", "words", "expression", "none")
    assert stats.answers == {"integer": 2} | dict.fromkeys(kinds, 1)
    assert stats.characters == (10, 10, 10, 10)


@pytest.mark.skipif(not DATA.exists(), reason="no benchmark tables beside the checkout")
def test_of_the_real_tables_math500_lies_in_math_test_and_repeats_are_found(tmp_path):
    math500, math_test = str(DATA / "math500.parquet"), str(DATA / "math_test.parquet")
    settings = ImportSettings(inputs=(math500,), against=(math_test,), near_duplicates=False)
    (file,) = import_problems(settings, None).files
    assert (file.rows, file.contaminated, file.kept) == (500, 500, 0)
    for name, repeated in (("collegemath", 36), ("omni", 22)):
        texts = pq.read_table(DATA / f"{name}.parquet", columns=["problem"])["problem"].to_pylist()
        assert len(texts) - len({problem_key(text) for text in texts}) >= repeated
