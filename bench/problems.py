"""What importing a whole training set costs, and what its duplicate and benchmark search finds.

    python -m bench.problems [--rows 747000] [--json FILE]
    python -m bench.problems --data DIR              real tables, each against all others
    python -m bench.problems --files DIR             other people's files, each by itself
    python -m bench.problems --compare [--rows N]    our MinHash beside datasketch's

A set of the paper's size (747,000 rows) is made in three files, a quarter NuminaMath-CoT JSONL, a
half MetaMath JSON (one list), a quarter Parquet, with solutions of usual length, and imported by
the real command in a process of its own against nine made benchmark files. Words are drawn from
20,000 made words by Zipf's law, numbers and formulas between them. Planted, row by row known:

    3 %    exact duplicates, with other white space, dollar signs or `\\dfrac`
    3 %    near-duplicates: one to three words replaced, left out or put in; numbers and answer stay
    3 %    twins: one number and the answer differ; these must stay
    0.5 %  benchmark problems: whole, or at least 20 words of one, between other words
    0.5 %  to be set aside: proofs, images, no answer
    0.1 %  bad rows: broken JSON, no text, wrong types

A near-duplicate whose true similarity is under the threshold cannot be found on purpose; recall is
printed for all, and for those at or over it. Memory is the sum over the processes of the command,
sampled every 50 ms. CPU seconds stand beside wall seconds, for busy machines. Prints a table for
people, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.folder.machine import hardware
from rollout.problems.duplicates import MIN_SIMILARITY
from rollout.problems.import_report import ImportSettings
from rollout.problems.importer import import_problems
from rollout.problems.rows import ProblemFileError, expand, stem_of
from rollout.problems.text import bands, shingle_sets, similarity, tokenise

PAPER_ROWS = 747_000
NUM_BENCHMARKS, BENCHMARK_PROBLEMS = 9, 1_700
VOCABULARY = 20_000
POOL = 4_096
"""Recent problems a planted one is made from; they may lie in another file."""
SHARES = {
    "exact": 0.03,
    "near": 0.03,
    "twin": 0.03,
    "contaminated": 0.005,
    "aside": 0.005,
    "bad": 0.001,
}
GOALS = {"wall_s": "< 600", "peak_mib": "< 2048"}
_SYLLABLES = (
    "an", "ber", "con", "da", "el", "fi", "gra", "ho", "in", "jo", "ka", "lo", "mi", "na", "or",
    "pe", "qua", "ri", "sta", "to", "un", "ve", "wi", "ze", "tri", "ple", "mar",
)  # fmt: skip
_NUMBER = re.compile(r"\d+")


class Writer:
    """Makes problem texts; one seed, one set."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words: set[str] = set()
        while len(words) < VOCABULARY:
            words.add("".join(self.random.choices(_SYLLABLES, k=self.random.randint(1, 4))))
        self.words = sorted(words)
        self.random.shuffle(self.words)
        self.weights = list(accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))

    def sentence(self, length: int) -> list[str]:
        words = self.random.choices(self.words, cum_weights=self.weights, k=length)
        for place in range(3, length, 7):
            words[place] = str(self.random.randint(2, 999))
        return words

    def problem(self) -> str:
        """18 to 90 words, seldom more, with a formula; about 220 characters as in MATH."""
        words = self.sentence(min(300, 18 + int(self.random.expovariate(1 / 22))))
        a, b, c = (self.random.randint(1, 99) for _ in range(3))
        words.insert(len(words) // 2, f"$\\frac{{{a}}}{{x+{b}}} = {c}$")
        return " ".join(words) + "?"

    def answer(self) -> str:
        return str(self.random.randint(2, 99_999))

    def solution(self, answer: str) -> str:
        return " ".join(self.sentence(150)) + f". So the answer is $\\boxed{{{answer}}}$."

    def reformatted(self, text: str) -> str:
        how = self.random.randrange(3)
        if how == 0:
            return text.replace(" ", "  ")
        if how == 1:
            return text.replace("\\frac", "\\dfrac").replace("$", "")
        return " " + text.replace(" = ", "\\, =\n")

    def edited(self, text: str) -> str:
        """One to three words replaced, left out or put in."""
        words = text.split(" ")
        for _ in range(self.random.randint(1, 3)):
            places = [place for place, word in enumerate(words) if word.isalpha()]
            place = self.random.choice(places)
            how = self.random.randrange(3)
            if how == 0:
                words[place] = self.random.choice(self.words)
            elif how == 1:
                del words[place]
            else:
                words.insert(place, self.random.choice(self.words))
        return " ".join(words)

    def twin(self, text: str) -> str:
        """One number changed."""
        found = self.random.choice(list(_NUMBER.finditer(text)))
        return text[: found.start()] + str(int(found[0]) + 1) + text[found.end() :]

    def contaminated(self, text: str) -> str:
        words = text.split(" ")
        if self.random.random() < 0.5:
            return text
        start = self.random.randrange(max(1, len(words) - 20))
        return " ".join([*self.sentence(10), *words[start : start + 20], *self.sentence(8)])


def made_rows(
    count: int, benchmark: Sequence[str], seed: int
) -> Iterator[tuple[str, str, str, str]]:
    """(kind, text, answer, text it was made from) of every row."""
    writer = Writer(seed)
    kinds, shares = [*SHARES, "own"], [*SHARES.values(), 1 - sum(SHARES.values())]
    pool: list[tuple[str, str]] = []
    for number in range(count):
        kind = writer.random.choices(kinds, shares)[0] if number > POOL else "own"
        text, answer = writer.problem(), writer.answer()
        basis = ""
        if kind in ("exact", "near", "twin"):
            basis, first_answer = writer.random.choice(pool)
            if kind == "exact":
                text, answer = writer.reformatted(basis), first_answer
            elif kind == "near":
                text, answer = writer.edited(basis), first_answer
            else:
                text = writer.twin(basis)
        elif kind == "contaminated":
            text = writer.contaminated(writer.random.choice(benchmark))
        elif kind == "own":
            if len(pool) < POOL:
                pool.append((text, answer))
            else:
                pool[writer.random.randrange(POOL)] = (text, answer)
        yield kind, text, answer, basis


def make_set(folder: Path, rows: int, seed: int) -> dict[str, Any]:
    """Write the files; returns inputs, benchmarks, and what every planted row is."""
    writer = Writer(seed + 1)
    benchmarks, texts = [], []
    for number in range(NUM_BENCHMARKS):
        problems = [writer.problem() for _ in range(BENCHMARK_PROBLEMS)]
        texts += problems
        path = folder / f"benchmark{number}.parquet"
        table = [
            {"id": f"b{number}-{place}", "level": "math", "problem": text, "answer": "1"}
            for place, text in enumerate(problems)
        ]
        pq.write_table(pa.Table.from_pylist(table), path)
        benchmarks.append(path)
    made = made_rows(rows, texts, seed)
    planted: dict[str, str] = {}
    near: dict[str, float] = {}
    paths = [folder / "numina.jsonl", folder / "metamath.json", folder / "own.parquet"]
    counts = [rows // 4, rows // 2, rows - rows // 4 - rows // 2]
    for path, count, write in zip(paths, counts, (_numina, _metamath, _own), strict=True):
        part = (next(made) for _ in range(count))
        write(path, _noted(part, path.name, planted, near), writer)
    return {"inputs": paths, "against": benchmarks, "planted": planted, "near": near}


def _noted(
    made: Iterator[tuple[str, str, str, str]],
    name: str,
    planted: dict[str, str],
    near: dict[str, float],
) -> Iterator[tuple[str, str, str]]:
    for number, (kind, text, answer, basis) in enumerate(made, start=1):
        if kind != "own":
            planted[f"{name}:{number}"] = kind
        if kind == "near":
            first, second = shingle_sets([basis, text])
            near[f"{name}:{number}"] = similarity(first, second)
        yield kind, text, answer


def _numina(path: Path, rows: Iterator[tuple[str, str, str]], writer: Writer) -> None:
    with path.open("w", encoding="utf-8") as file:
        for kind, text, answer in rows:
            text, solution = _aside(kind, text, writer.solution(answer), writer)
            subset = writer.random.choice(("olympiads", "amc_aime"))
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": solution}]
            row = {"source": subset, "problem": text, "solution": solution, "messages": turns}
            line = json.dumps(row)
            file.write((line[: len(line) // 2] if kind == "bad" else line) + "\n")


def _metamath(path: Path, rows: Iterator[tuple[str, str, str]], writer: Writer) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, (kind, text, answer) in enumerate(rows):
            text, solution = _aside(kind, text, writer.solution(answer), writer)
            row = {
                "query": 7 if kind == "bad" else text,
                "response": solution,
                "type": writer.random.choice(("GSM_AnsAug", "MATH_Rephrased")),
                "original_question": text,
            }
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")


def _own(path: Path, rows: Iterator[tuple[str, str, str]], writer: Writer) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "level", "problem", "answer")])
    with pq.ParquetWriter(path, schema) as file:
        batch = []
        for number, (kind, text, answer) in enumerate(rows):
            text, solution = _aside(kind, text, answer, writer)
            batch.append(
                {
                    "id": str(number),
                    "level": "olympiad",
                    "problem": None if kind == "bad" else text,
                    "answer": None if kind == "aside" and solution != answer else answer,
                }
            )
            if len(batch) == POOL:
                file.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch.clear()
        file.write_table(pa.Table.from_pylist(batch, schema=schema))


def _aside(kind: str, text: str, solution: str, writer: Writer) -> tuple[str, str]:
    if kind != "aside":
        return text, solution
    how = writer.random.randrange(3)
    if how == 0:
        return "Prove that " + text.rstrip("?") + ".", solution
    if how == 1:
        return text + " ![](figure.png)", solution
    return text, "It follows at once."


def run_import(folder: Path, made: dict[str, Any]) -> dict[str, float]:
    """The real command, measured."""
    command = [
        *(sys.executable, "-m", "cluster", "problems", "import"),
        *map(str, made["inputs"]),
        *("--out", str(folder / "out" / "problems.parquet")),
    ]
    for path in made["against"]:
        command += ["--against", str(path)]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        cpu_s = 0.0
        while process.poll() is None:
            try:
                family = [watched, *watched.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in family))
                times = [member.cpu_times() for member in family]
                cpu_s = max(cpu_s, sum(spent.user + spent.system for spent in times))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the import failed with status {process.returncode}")
    return {"wall_s": time.perf_counter() - start, "cpu_s": cpu_s, "peak_mib": peak / 2**20}


def found_of(folder: Path, made: dict[str, Any], rows: int) -> dict[str, float]:
    """What was found of each planted kind, and what was taken that should have stayed."""
    planted, near = made["planted"], made["near"]
    report = folder / "out" / "problems.report"

    def origins(name: str, column: str | None = None, value: str = "") -> set[str]:
        table = pq.read_table(report / f"{name}.parquet").to_pylist()
        return {row["origin"] for row in table if column is None or row[column] == value}

    bad = {
        f"{Path(row['file']).name}:{row['row']}"
        for row in pq.read_table(report / "bad_rows.parquet").to_pylist()
    }
    taken = {
        "exact": origins("duplicates", "kind", "exact"),
        "near": origins("duplicates", "kind", "near"),
        "contaminated": origins("contaminated"),
        "aside": origins("set_aside"),
        "bad": bad,
    }
    gone = set().union(*taken.values())
    wanted = {kind: {origin for origin, own in planted.items() if own == kind} for kind in SHARES}
    # A planted copy of a copy, or of a twin, may rightly go as another kind.
    repeats = taken["exact"] | taken["near"]
    figures: dict[str, float] = {}
    for kind in ("exact", "near", "contaminated", "aside", "bad"):
        met = repeats if kind in ("exact", "near") else taken[kind]
        figures[f"{kind}_planted"] = len(wanted[kind])
        figures[f"{kind}_recall"] = len(wanted[kind] & met) / max(1, len(wanted[kind]))
    over = {origin for origin, alike in near.items() if alike >= MIN_SIMILARITY}
    figures["near_planted_over_threshold"] = len(over)
    figures["near_recall_over_threshold"] = len(over & repeats) / max(1, len(over))
    figures["twins_planted"] = len(wanted["twin"])
    figures["twins_taken"] = len(wanted["twin"] & gone)
    figures["others_taken"] = len(gone - set(planted))
    kept = pq.read_table(folder / "out" / "problems.parquet", columns=["origin"])
    figures["rows"], figures["kept"] = rows, kept.num_rows
    assert kept.num_rows + len(gone) == rows, "a row was lost"
    return figures


def print_cross(data: Path) -> dict[str, Any]:
    """Import each table of a folder against all others; the table of docs/problems.md."""
    paths = sorted(str(path) for path in data.glob("*.parquet"))
    print("| table | rows | kept | exact | near | contaminated | set aside | bad | met most |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    found = {}
    for path in paths:
        others = tuple(other for other in paths if other != path)
        report = import_problems(ImportSettings(inputs=(path,), against=others), None)
        (file,) = report.files
        assert file.accounted == file.rows, path
        most = sorted(report.benchmarks, key=lambda item: -item.removed)[:3]
        met = ", ".join(f"{stem_of(item.file)} {item.removed}" for item in most if item.removed)
        counts = (file.rows, file.kept, file.exact_duplicates, file.near_duplicates)
        rest = (file.contaminated, file.set_aside.total(), file.bad)
        print(f"| {stem_of(path)} | " + " | ".join(map(str, (*counts, *rest))) + f" | {met} |")
        found[stem_of(path)] = dict(
            zip(
                ("rows", "kept", "exact", "near", "contaminated", "set_aside", "bad"),
                (*counts, *rest),
                strict=True,
            )
        )
    return found


def print_files(folder: Path) -> dict[str, Any]:
    """Import each file of a folder as it is; the table of formats in docs/problems.md."""
    print("| file | format | rows | kept | aside | bad | why |")
    print("|---|---|---:|---:|---:|---:|---|")
    found: dict[str, Any] = {}
    for path in expand([str(folder)]):
        try:
            (file,) = import_problems(ImportSettings(inputs=(path,)), None).files
        except ProblemFileError as error:
            print(f"| {stem_of(path)} | | | 0 | | | stops: {error} |")
            found[stem_of(path)] = str(error)
            continue
        why = ", ".join(f"{count} {reason}" for reason, count in file.set_aside.items())
        counts = {"rows": file.rows, "kept": file.kept, "aside": file.set_aside.total()}
        counts["bad"] = file.bad
        shown = " | ".join(map(str, counts.values()))
        print(f"| {stem_of(path)} | `{file.format}` | {shown} | {why} |")
        found[stem_of(path)] = counts
    return found


def compare(rows: int) -> dict[str, float]:
    """CPU microseconds of the MinHash of a text: ours, and datasketch's of as many functions."""
    writer = Writer(3)
    texts = [writer.problem() for _ in range(rows)]
    start = time.process_time()
    for first in range(0, rows, 2048):
        batch = tokenise(texts[first : first + 2048])
        bands(batch, np.zeros(batch.num_rows, np.uint64))
    figures = {"numpy_us_per_text": (time.process_time() - start) / rows * 1e6}
    try:
        from datasketch import MinHash
    except ImportError:
        print("datasketch is not installed; only ours is measured")
        return figures
    start = time.process_time()
    for text in texts:
        words = re.findall(r"\w+|[-+*/^=<>]", text.lower())
        runs = {" ".join(words[at : at + 3]).encode() for at in range(len(words) - 2)}
        sketch = MinHash(num_perm=64, seed=1)
        sketch.update_batch(runs)
    figures["datasketch_us_per_text"] = (time.process_time() - start) / rows * 1e6
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.problems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=PAPER_ROWS, help="rows of the made set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="instead: cross real tables of this folder")
    parser.add_argument("--files", type=Path, help="instead: import each file of this folder")
    parser.add_argument("--compare", action="store_true", help="instead: MinHash beside datasketch")
    parser.add_argument("--folder", type=Path, help="where the made set goes [a temporary one]")
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    if options.data is not None:
        figures: dict[str, Any] = print_cross(options.data)
    elif options.files is not None:
        figures = print_files(options.files)
    elif options.compare:
        figures = dict(compare(min(options.rows, 20_000)))
    else:
        figures = measure(options.rows, options.seed, options.folder)
    if options.data is None and options.files is None:
        for name, value in figures.items():
            shown = f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.4f}"
            print(f"{name:32} {shown:>12}   {GOALS.get(name, '')}")
        figures["hardware"] = hardware()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(json.dumps(figures))


def measure(rows: int, seed: int, folder: Path | None) -> dict[str, Any]:
    """Make the set, import it, count."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start = time.perf_counter()
        made = make_set(Path(place), rows, seed)
        size = sum(path.stat().st_size for path in made["inputs"])
        print(
            f"made {rows:,} rows, {size / 2**20:,.0f} MiB, in {time.perf_counter() - start:.0f} s"
        )
        figures: dict[str, Any] = run_import(Path(place), made)
        figures["input_mib"] = size / 2**20
        return figures | found_of(Path(place), made, rows)


if __name__ == "__main__":
    main()
