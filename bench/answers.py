r"""The answer check against labelled pairs, side by side with math-verify in the same run, no
cache.

    python -m bench.answers [--pairs FILE] [--public FILE] [--data DIR] [--made N] [--json FILE]

Pairs come from four places: a labelled JSON-lines file (`gold`, `candidate`, `equal`, `category`);
another such file of pairs out of public bug reports; the test cases of math-verify that
`tests/data` keeps (gold, prediction, expected; a text with a box counts as what the box holds); and
pairs made here from the answers of the benchmark tables: for each sampled gold a few true variants
of notation and a few near misses. Public pairs and math-verify's cases are judged by this grader
alone: some of the pairs are memory bombs, and math-verify passes its own tests.

Adversarial pairs (category `adversarial`) are run off the main thread in an empty folder, which
must stay empty; math-verify is not run on them, because its own limit needs the main thread and
five seconds each.

Prints tables for people, then one JSON object on the last line. Times are wall milliseconds of one
check with both caches cleared before it, and CPU milliseconds of the calling thread beside them for
a machine that is shared; the symbolic process and math-verify's parser are warmed first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from verifier import GRADER_VERSION, extract_answer, verify_answer
from verifier.verify import clear_caches, start_symbolic_worker, stop_symbolic_worker

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PEER_CASES = Path(__file__).resolve().parents[1] / "tests" / "data" / "math_verify_cases.jsonl"
TABLES = ("gsm8k_test", "math_test", "aime2024", "amc23", "olympiadbench", "omni", "collegemath")
HANG_S = 2.0
_INTEGER = re.compile(r"-?\d{1,12}")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d{1,9})\}\{(\d{1,9})\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers and whether they are equal."""

    gold: str
    candidate: str | None
    equal: bool
    category: str


@dataclass(slots=True)
class Result:
    """What one grader said about a list of pairs."""

    said: list[bool]
    times_s: list[float]
    cpu_s: list[float]

    def summary(self, pairs: list[Pair]) -> dict[str, Any]:
        wrong = [said != pair.equal for said, pair in zip(self.said, pairs, strict=True)]
        equal = sum(pair.equal for pair in pairs)
        false_positives = sum(w and not pair.equal for w, pair in zip(wrong, pairs, strict=True))
        ordered = sorted(self.times_s)
        return {
            "pairs": len(pairs),
            "accuracy": 1 - sum(wrong) / len(pairs),
            "false_positive_rate": false_positives / max(1, len(pairs) - equal),
            "false_negative_rate": (sum(wrong) - false_positives) / max(1, equal),
            "p50_ms": 1e3 * ordered[len(ordered) // 2],
            "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
            "max_ms": 1e3 * ordered[-1],
            "p99_cpu_ms": 1e3 * sorted(self.cpu_s)[min(len(ordered) - 1, int(len(ordered) * 0.99))],
            "checks_per_cpu_s": len(pairs) / max(1e-9, sum(self.cpu_s)),
            "checks_per_s": len(pairs) / sum(ordered),
        }


def read_pairs(path: Path, category: str | None = None, option: str = "--pairs") -> list[Pair]:
    """Labelled pairs of a JSON-lines file.

    Args:
        category: of every pair, for files that name none; None reads it from the file.

    Raises:
        SystemExit: the file is absent, empty or a line lacks a field.
    """
    if not path.is_file():
        sys.exit(f"no labelled pairs at {path}; give a JSON-lines file with {option} FILE")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pairs.append(
                Pair(
                    gold=row["gold"],
                    candidate=row["candidate"],
                    equal=bool(row["equal"]),
                    category=row["category"] if category is None else category,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path} line {number}: expected gold, candidate, equal, category ({error!r})")
    if not pairs:
        sys.exit(f"{path} holds no pairs")
    return pairs


def make_pairs(data: Path, count: int, seed: int = 0) -> list[Pair]:
    """Pairs made from `count` sampled golds of the tables in `data`; empty when there are none."""
    golds: list[str] = []
    for table in TABLES:
        path = data / f"{table}.parquet"
        if path.is_file():
            golds += parquet.read_table(path, columns=["answer"])["answer"].to_pylist()
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for gold in rng.sample(golds, min(count, len(golds))):
        for candidate, equal in variants(gold.strip()):
            category = "made equal" if equal else "made near miss"
            pairs.append(Pair(gold=gold, candidate=candidate, equal=equal, category=category))
    return pairs


def variants(gold: str) -> Iterable[tuple[str, bool]]:
    """Other ways of writing a gold answer, and answers just beside it."""
    if _INTEGER.fullmatch(gold):
        value = int(gold)
        yield f"\\boxed{{{gold}}}", True
        yield f"{value}.0", True
        yield f"{value:,}", True
        yield f"x = {value}", True
        yield f"{2 * value}/2", True
        yield str(value + 1), False
        yield f"{value}.01", False
        if value:
            yield str(-value), False
            yield str(value * 100), False
    elif match := _FRACTION.fullmatch(gold):
        sign, top, bottom = match[1], int(match[2]), int(match[3])
        if not top or not bottom:
            return
        exact = Fraction(top, bottom) * (-1 if sign else 1)
        yield f"{sign}{top}/{bottom}", True
        yield f"Fraction({sign}{top}, {bottom})", True
        yield f"{sign}\\frac{{{3 * top}}}{{{3 * bottom}}}", True
        yield repr(float(exact)), True
        if top != bottom:
            yield f"{sign}\\frac{{{bottom}}}{{{top}}}", False
        yield f"{sign}\\frac{{{top + 1}}}{{{bottom}}}", False
        rounded = f"{float(exact):.3f}"
        yield rounded, Fraction(rounded) == exact
    elif len(gold) < 60 and re.search(r"\d", gold) and "text" not in gold:
        yield f"${gold}$", True
        yield f"\\boxed{{{gold}}}", True
        yield gold.replace("\\frac", "\\dfrac"), True
        digit = max(match.start() for match in re.finditer(r"\d", gold))
        changed = gold[:digit] + str((int(gold[digit]) + 1) % 10) + gold[digit + 1 :]
        yield changed, False


def run_ours(pairs: list[Pair]) -> Result:
    result = Result([], [], [])
    for pair in pairs:
        clear_caches()
        start, cpu = time.perf_counter(), time.thread_time()
        said = verify_answer(pair.gold, pair.candidate).equal
        result.times_s.append(time.perf_counter() - start)
        result.cpu_s.append(time.thread_time() - cpu)
        result.said.append(said)
    return result


def run_math_verify(pairs: list[Pair]) -> Result:
    logging.disable(logging.ERROR)
    from math_verify import parse, verify

    result = Result([], [], [])
    for pair in [pairs[0], *pairs]:
        start, cpu = time.perf_counter(), time.thread_time()
        said = False
        with contextlib.suppress(Exception):
            candidate = parse(f"\\boxed{{{pair.candidate}}}")
            said = bool(verify(parse(f"\\boxed{{{pair.gold}}}"), candidate))
        result.times_s.append(time.perf_counter() - start)
        result.cpu_s.append(time.thread_time() - cpu)
        result.said.append(said)
    logging.disable(logging.NOTSET)
    return Result(result.said[1:], result.times_s[1:], result.cpu_s[1:])


def run_adversarial(pairs: list[Pair]) -> dict[str, Any]:
    """Run hostile pairs off the main thread in an empty folder and look at what they left there."""
    before = Path.cwd()
    result = Result([], [], [])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            thread = threading.Thread(target=lambda: _fill(result, run_ours(pairs)))
            thread.start()
            thread.join()
            executed = len(list(Path(folder).iterdir()))
        finally:
            os.chdir(before)
    return {
        "adversarial_pairs": len(pairs),
        "adversarial_accepted": sum(
            said and not pair.equal for said, pair in zip(result.said, pairs, strict=True)
        ),
        "adversarial_executed": executed,
        "adversarial_over_2s": sum(seconds > HANG_S for seconds in result.times_s),
        "adversarial_max_ms": 1e3 * max(result.times_s, default=0.0),
    }


def _fill(result: Result, found: Result) -> None:
    result.said, result.times_s, result.cpu_s = found.said, found.times_s, found.cpu_s


def compare(name: str, pairs: list[Pair]) -> dict[str, Any]:
    """Both graders on the same pairs, ours first; prints the table."""
    ours, peer = run_ours(pairs), run_math_verify(pairs)
    one, two = ours.summary(pairs), peer.summary(pairs)
    print(f"\n{name}: {len(pairs)} pairs, {sum(pair.equal for pair in pairs)} equal")
    row = "{:<14}{:>11}{:>14}{:>14}{:>10}{:>10}{:>12}{:>10}{:>12}"
    print(
        row.format(
            "grader",
            "accuracy",
            "false pos.",
            "false neg.",
            "p50 ms",
            "p99 ms",
            "p99 CPU ms",
            "max ms",
            "checks/s",
        )
    )
    for label, summary in (("this one", one), ("math-verify", two)):
        print(
            row.format(
                label,
                *(
                    f"{100 * summary[key]:.2f} %"
                    for key in ("accuracy", "false_positive_rate", "false_negative_rate")
                ),
                *(f"{summary[key]:.3f}" for key in ("p50_ms", "p99_ms", "p99_cpu_ms", "max_ms")),
                f"{summary['checks_per_s']:.0f}",
            )
        )
    for said, pair in zip(ours.said, pairs, strict=True):
        if said != pair.equal:
            word = "missed" if pair.equal else "wrongly accepted"
            print(f"  {word}: {pair.gold!r} / {pair.candidate!r} ({pair.category})")
    by_category: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for said, other, pair in zip(ours.said, peer.said, pairs, strict=True):
        counts = by_category[pair.category]
        counts[0] += 1
        counts[1] += said == pair.equal
        counts[2] += other == pair.equal
    print("  right by category (this one, math-verify, of):")
    for category, (total, right, peer_right) in sorted(by_category.items()):
        print(f"    {category:<22}{right:>6}{peer_right:>6}{total:>6}")
    swapped = sum(
        verify_answer(pair.candidate, pair.gold).equal == said
        for pair, said in zip(pairs, ours.said, strict=True)
    )
    return {
        **one,
        "checks_vs_math_verify": one["checks_per_s"] / two["checks_per_s"],
        "checks_vs_math_verify_cpu": one["checks_per_cpu_s"] / two["checks_per_cpu_s"],
        "same_when_swapped": swapped / len(pairs),
        "paths": dict(Counter(verify_answer(pair.gold, pair.candidate).path for pair in pairs)),
        "math_verify": two,
    }


def judge_public(pairs: list[Pair]) -> dict[str, Any]:
    """This grader on pairs out of bug reports; prints what it gets wrong, on either side."""
    result = run_ours(pairs)
    summary = result.summary(pairs)
    wrong = [pair for said, pair in zip(result.said, pairs, strict=True) if said != pair.equal]
    print(f"\npublic: {len(pairs)} pairs, {len(wrong)} wrong, slowest {summary['max_ms']:.1f} ms")
    for pair in wrong:
        word = "missed" if pair.equal else "wrongly accepted"
        print(f"  {word}: {pair.gold!r} / {pair.candidate!r}")
    return {
        "public_pairs": len(pairs),
        "public_accuracy": summary["accuracy"],
        "public_false_positives": sum(not pair.equal for pair in wrong),
        "public_max_ms": summary["max_ms"],
    }


def judge_peer_cases(path: Path) -> dict[str, Any]:
    """How far this grader agrees with math-verify's own test cases; counts the reasons noted."""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    agreed, reasons = 0, Counter[str]()
    for case in cases:
        gold, said = (extract_answer(case[side]) or case[side] for side in ("gold", "prediction"))
        if verify_answer(gold, said).equal == case["expected"]:
            agreed += 1
        else:
            reasons[case.get("differs", "no reason noted")] += 1
    print(f"\nmath-verify's own {len(cases)} test cases: {agreed} agree; the others by reason:")
    for reason, count in reasons.most_common():
        print(f"    {reason:<22}{count:>6}")
    return {"peer_cases": len(cases), "peer_cases_agreed": agreed, "peer_cases_differ": reasons}


def cached_rate(pairs: list[Pair], check: Callable[..., Any] = verify_answer) -> float:
    """Checks per second when every pair has been seen before."""
    for pair in pairs:
        check(pair.gold, pair.candidate)
    start = time.perf_counter()
    for _ in range(20):
        for pair in pairs:
            check(pair.gold, pair.candidate)
    return 20 * len(pairs) / (time.perf_counter() - start)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=Path, default=DEFAULT_DATA / "answers_dev.jsonl")
    parser.add_argument("--public", type=Path, default=DEFAULT_DATA / "answers_public.jsonl")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of problem tables")
    parser.add_argument(
        "--made", type=int, default=150, help="golds to make pairs from; 0 for none"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)
    ordinary = [pair for pair in pairs if pair.category != "adversarial"]
    hostile = [pair for pair in pairs if pair.category == "adversarial"]
    public = read_pairs(options.public, category="public", option="--public")
    start_symbolic_worker()
    run_ours(ordinary[:5])
    report = compare(options.pairs.name, ordinary)
    made = make_pairs(options.data, options.made) if options.made else []
    if made:
        report["made"] = compare("made from the benchmark tables", made)
    elif options.made:
        print(f"\nno problem tables in {options.data}; no pairs made from them")
    report |= judge_public(public) | judge_peer_cases(PEER_CASES)
    report |= run_adversarial(hostile)
    report["cached_checks_per_s"] = cached_rate(ordinary)
    stop_symbolic_worker()
    report |= {
        "grader_version": GRADER_VERSION,
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sympy", "mpmath", "math-verify")},
        },
    }
    print(
        "\nadversarial, off the main thread: {adversarial_pairs} pairs,"
        " {adversarial_accepted} accepted, {adversarial_executed} executed,"
        " {adversarial_over_2s} over 2 s,"
        " slowest {adversarial_max_ms:.1f} ms".format(**report)
    )
    text = json.dumps(report)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
