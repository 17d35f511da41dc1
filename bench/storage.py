"""What the record of a run costs on disk and in time: bytes per node, against JSON, and read and
write speed, all on one core.

    python -m bench.storage [--data DIR] [--run RUN] [--trees N] [--json FILE]

Trees come from the real search (8 candidates x 16 rollouts) with a made-up policy, PPM and sandbox:
tree shapes, visit counts, Q-values, merged and discarded candidates are those of a search. Problem
texts are real ones where `--data` names a folder of problem tables, else the miniature's. A step is
a thought and a few lines of code. Thoughts are sentences of other problem texts; code lines come
from a list of forms with drawn names and numbers. Values, log-probabilities and Q-values are full
doubles, which no encoding shrinks. Two sorts of siblings are made, because compression lives on
what they share:

    related     a problem has three plans, each an idea per step, which all branches of its tree
                follow: a candidate takes its plan's idea and words it anew (every tenth word and
                every fifth number differ, a line may be lost), and one in five is a new idea. That
                is how samples of one policy on one problem look.
    unrelated   every candidate of every node is drawn by itself: a lower bound

`--run` adds the sizes of the trees of a stored run, as they are.

JSON is one line per tree with all its fields (`asdict`, and the code of each step, which Parquet
holds too), without white space. Speeds are per CPU second of one thread, so that a busy machine
does not change them; the time to read Q is wall time, CPU time beside it. Prints a table for
people, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.folder.machine import hardware
from rollout.engine import (
    Completion,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
)
from rollout.problem import Level, Problem
from rollout.problems.miniature import generate
from rollout.problems.reader import read_problems
from rollout.prompt import (
    ANSWER,
    ASSISTANT,
    CODE,
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_OUTPUT,
    END_OF_STEP,
    USER,
)
from rollout.search import SearchConfig, run_search
from rollout.store import RunStore, TrajectoryStore, stored_rounds
from rollout.table import SCHEMA_VERSION, table_to_bytes, table_to_trees, trees_to_table
from rollout.tree import Tree
from verifier import Verdict
from verifier.equivalence import Reason
from verifier.sandbox import StepResult, StepStatus

T = TypeVar("T")

SHARD_TREES = 16
"""Trees per file, as a rollout worker writes them."""
ZSTD_LEVEL = 3
"""Of the compressed JSON; what the `zstd` command does unless told otherwise."""
NUM_Q_NODES = 1_000_000
MAX_STORED = 1_000
"""Trees of a stored run that are measured."""
MAX_DEPTH = 16
NUM_PLANS = 3
_WORD = re.compile(r"\w+|\W+")
_NUMBER = re.compile(r"\d+")
_CODE_FORMS = (
    "{a} = {n} * {m}",
    "{a} = {b} + {n}",
    "{a} = {n} / {m}",
    "{a} = {b} ** 2 - {n}",
    "{a} = symbols('{v}')",
    "from sympy import symbols, solve, Eq",
    "from sympy import *",
    "import math",
    "equation = Eq({n} * {v} + {m}, {k})",
    "solutions = solve(equation, {v})",
    "{a} = solve({n} * {v}**2 - {m} * {v} + {k}, {v})[0]",
    "{a} = math.gcd({n}, {m})",
    "{a} = math.comb({n}, {k}) * math.factorial({k})",
    "{a} = sum({v} for {v} in range({n}, {m}) if {v} % {k} == 0)",
    "for {v} in range(1, {n} + 1):\n    if {m} % {v} == 0:\n        {a} += {v}",
    "{a} = simplify(({v} + {n}) * ({v} - {m}))",
    "{a} = Rational({n}, {m}) * {b}",
    "{a} = sqrt({n}**2 + {m}**2)",
    "assert {a} >= 0",
    "{a} = [{v} for {v} in range({n}) if isprime({v})]",
    "print({a})",
    "if {a} > {n}:\n    {b} = {a} - {n}\nelse:\n    {b} = {n} - {a}",
)
_NAMES = (
    "total", "area", "side", "count", "root", "ratio", "speed", "price", "first", "second", "value",
    "length", "num_ways", "result", "base", "height", "remainder", "angle", "diff", "probability",
)  # fmt: skip
_ERRORS = (
    ("NameError", "name '{a}' is not defined"),
    ("TypeError", "unsupported operand type(s) for +: 'int' and 'list'"),
    ("ZeroDivisionError", "division by zero"),
    ("IndexError", "list index out of range"),
    ("SyntaxError", "invalid syntax (<step>, line {k})"),
)


@dataclass(frozen=True, slots=True)
class Idea:
    """A thought and its lines of code."""

    thought: str
    lines: tuple[str, ...]


class Writer:
    """A policy, a PPM and a sandbox that make plausible text, from the seed of each request."""

    def __init__(self, problems: Sequence[Problem], *, related: bool) -> None:
        self.related = related
        self.answers = {problem.text.strip(): problem.answer for problem in problems}
        sentences = (s.strip() for p in problems for s in re.split(r"(?<=[.?!])\s", p.text))
        self.sentences = [s.replace("\n", " ") for s in sentences if 15 <= len(s) <= 160]
        self.words = [w for s in self.sentences for w in re.findall(r"[a-z]{3,}", s)]
        self.plans: dict[str, list[list[Idea]]] = {}
        """Question -> its plans, each an idea per depth."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        rng = random.Random(request.seed)
        depth = request.prompt.count(END_OF_STEP)
        answering = request.prompt.rstrip().endswith(END_OF_OUTPUT)
        question = request.prompt.split(f"{USER}:\n", 1)[-1].split(f"\n{ASSISTANT}", 1)[0]
        texts: list[str] = []
        for _ in range(request.num_candidates):
            if answering:
                texts.append(self._answer(question, rng))
            elif texts and rng.random() < 0.1:
                texts.append(rng.choice(texts))
            else:
                texts.append(self._step(question, depth, rng))
        completions = []
        for text in texts:
            num_tokens = max(1, round(len(text) / 3.1))
            logprob = -sum(float32(rng.expovariate(4.0)) for _ in range(num_tokens))
            completions.append(
                Completion(
                    text=text, finish=FinishReason.STOP, num_tokens=num_tokens, logprob=logprob
                )
            )
        return GenerationReply(
            completions=tuple(completions),
            prompt_tokens=len(request.prompt) // 3,
            cached_tokens=len(request.prompt) // 4,
            policy_version="policy-r3-1cffd2f7",
        )

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        values = [math.tanh(random.Random(text).gauss(0.2, 0.8)) for text in request.texts]
        return EvaluationReply(
            values=tuple(values),
            num_tokens=sum(len(text) // 3 for text in request.texts),
            preference_version="ppm-r3-c16653e7",
        )

    async def open(self, tree_id: str) -> str:
        return tree_id

    async def close(self, tree_id: str) -> None:
        return None

    async def run(self, state: str, codes: Sequence[str]) -> list[StepResult]:
        return [self._result(state, code) for code in codes]

    def _result(self, state: str, code: str) -> StepResult:
        rng = random.Random(code)
        if rng.random() < 0.12:
            kind, message = rng.choice(_ERRORS)
            return StepResult(
                status=StepStatus.ERROR,
                state=None,
                error_type=kind,
                error_message=message.format(a=rng.choice(_NAMES), k=rng.randint(1, 9)),
            )
        stdout = "".join(f"{self._printed(rng)}\n" for _ in range(code.count("print(")))
        return StepResult(status=StepStatus.OK, state=f"{state}/{rng.random()}", stdout=stdout)

    def _printed(self, rng: random.Random) -> str:
        number = rng.randint(0, 5000)
        forms = (str(number), f"{number / 7}", f"{number}/{rng.randint(2, 99)}", f"sqrt({number})")
        return rng.choice(forms)

    def _step(self, question: str, depth: int, rng: random.Random) -> str:
        if not self.related or rng.random() < 0.2:
            idea = self._idea(rng)
        else:
            idea = self._reworded(rng.choice(self._plans_of(question))[depth], rng)
        opening = CODE if depth == 0 else ""
        code = "\n".join(idea.lines)
        text = f"{opening}\n# Step {depth + 1}: {idea.thought}\n{code}\n"
        if rng.random() < 0.02:
            return text
        if depth >= 2 and rng.random() < 0.25:
            return f"{text}print({rng.choice(_NAMES)})\n{END_OF_CODE}"
        return text + END_OF_STEP

    def _plans_of(self, question: str) -> list[list[Idea]]:
        if question not in self.plans:
            rng = random.Random(question)
            self.plans[question] = [
                [self._idea(rng) for _ in range(MAX_DEPTH)] for _ in range(NUM_PLANS)
            ]
        return self.plans[question]

    def _idea(self, rng: random.Random) -> Idea:
        lines = [
            rng.choice(_CODE_FORMS).format(
                a=rng.choice(_NAMES),
                b=rng.choice(_NAMES),
                v=rng.choice("xyznk"),
                n=rng.randint(2, 400),
                m=rng.randint(2, 99),
                k=rng.randint(2, 12),
            )
            for _ in range(rng.randint(1, 5))
        ]
        return Idea(rng.choice(self.sentences), tuple(lines))

    def _reworded(self, idea: Idea, rng: random.Random) -> Idea:
        thought = "".join(
            rng.choice(self.words) if word.isalpha() and rng.random() < 0.1 else word
            for word in _WORD.findall(idea.thought)
        )
        lines = [line for line in idea.lines if rng.random() > 0.1] or idea.lines
        numbers = [
            _NUMBER.sub(lambda n: str(rng.randint(2, 400)) if rng.random() < 0.2 else n[0], line)
            for line in lines
        ]
        return Idea(thought, tuple(numbers))

    def _answer(self, question: str, rng: random.Random) -> str:
        gold = self.answers[question]
        said = gold if rng.random() < 0.4 else str(rng.randint(1, 300))
        opening = rng.choice(("The answer is", "From the result, the final answer is", "So we get"))
        return f"{ANSWER}{opening} \\boxed{{{said}}}.{END_OF_ANSWER}"


def stored_trees(run: Path) -> list[Tree]:
    """All trees of the finished rounds of a run, at most `MAX_STORED`."""
    store = RunStore(run)
    rounds = (TrajectoryStore(store, round_) for round_ in stored_rounds(store))
    finished = (trees for trees in rounds if trees.manifest() is not None)
    found = list(islice(chain.from_iterable(t.trees() for t in finished), MAX_STORED))
    if not found:
        sys.exit(f"{run}: no finished round of trees")
    return found


def float32(number: float) -> float:
    """A number as an engine gives it."""
    return struct.unpack("f", struct.pack("f", number))[0]


def grade(gold: str, answer: str) -> Verdict:
    """Equality of text: what the grader costs is measured elsewhere."""
    equal = gold == answer
    return Verdict(equal=equal, reason=Reason.EXACT if equal else Reason.DIFFERENT, path="text")


def load_problems(data: Path | None, count: int) -> tuple[list[Problem], str]:
    """Problems of the tables in a folder, or the miniature's; and where they came from.

    Raises:
        SystemExit: the folder holds no problem table.
    """
    if data is None:
        made = generate(seed=1, num_demonstrations=0, num_train=max(count, 900), num_test=0).train
        problems = [
            Problem(id=p.id, source="miniature", level=p.level, text=p.text, answer=p.answer)
            for p in made
        ]
        return problems, "texts of the miniature"
    problems = []
    tables = sorted(data.glob("*.parquet"))
    for path in tables:
        if {"id", "problem", "answer"} <= set(pq.read_schema(path).names):
            problems += read_problems(path, default_level=Level.MATH)[0]
    problems = list({problem.id: problem for problem in problems}.values())
    if not problems:
        sys.exit(f"{data}: no Parquet file with the columns id, problem, answer")
    random.Random(1).shuffle(problems)
    return problems, f"{len(problems)} texts of {len(tables)} tables in {data.name}"


async def make_trees(problems: Sequence[Problem], count: int, *, related: bool) -> list[Tree]:
    """Search the first `count` problems (again with new seeds when there are fewer)."""
    writer = Writer(problems, related=related)
    config = SearchConfig(num_candidates=8, num_rollouts=16, max_depth=MAX_DEPTH)
    trees = []
    for number in range(count):
        tree = await run_search(
            problems[number % len(problems)],
            config=config,
            policy=writer,
            preference=writer,
            sandbox=writer,
            round=3,
            index=number // len(problems),
            seed=number,
            grade=grade,
        )
        trees.append(tree)
    return trees


def trees_to_json(trees: Sequence[Tree]) -> bytes:
    """JSON lines with every field of every tree; children follow from the parents."""
    lines = []
    for tree in trees:
        record = asdict(tree) | {"outcome": tree.outcome}
        for node, own in zip(record["nodes"], tree.nodes, strict=True):
            if own.step is not None:
                node["step"]["code"] = own.step.code
        lines.append(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
    return "\n".join(lines).encode()


def shards(trees: Sequence[Tree]) -> list[Sequence[Tree]]:
    return [trees[at : at + SHARD_TREES] for at in range(0, len(trees), SHARD_TREES)]


def sizes(trees: Sequence[Tree]) -> dict[str, float]:
    """Bytes of the same trees in each form."""
    num_nodes = sum(len(tree.nodes) for tree in trees)
    parquet = sum(len(table_to_bytes(trees_to_table(shard))) for shard in shards(trees))
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    texts = [trees_to_json(shard) for shard in shards(trees)]
    plain = sum(len(text) for text in texts)
    packed = sum(len(codec.compress(text, asbytes=True)) for text in texts)
    return {
        "json_over_parquet": plain / parquet,
        "zstd_json_over_parquet": packed / parquet,
        "bytes_per_node": parquet / num_nodes,
        "json_bytes_per_node": plain / num_nodes,
        "zstd_json_bytes_per_node": packed / num_nodes,
        "step_chars_per_node": sum(len(n.step.text) for t in trees for n in t.nodes if n.step)
        / num_nodes,
    }


def best_s(
    work: Callable[[], T], repeats: int, clock: Callable[[], float] = time.process_time
) -> tuple[float, T]:
    """Least seconds of several goes, and the last result."""
    best = math.inf
    for _ in range(repeats):
        start = clock()
        result = work()
        best = min(best, clock() - start)
    return best, result


def speeds(trees: Sequence[Tree], repeats: int) -> dict[str, float]:
    """Nodes per CPU second, each step by itself, one thread."""
    num_nodes = sum(len(tree.nodes) for tree in trees)
    parts = shards(trees)
    table_s, tables = best_s(lambda: [trees_to_table(part) for part in parts], repeats)
    bytes_s, files = best_s(lambda: [table_to_bytes(table) for table in tables], repeats)

    def read() -> list[pa.Table]:
        return [pq.read_table(pa.BufferReader(file), use_threads=False) for file in files]

    read_s, tables = best_s(read, repeats)
    trees_s, back = best_s(lambda: [table_to_trees(table) for table in tables], repeats)
    assert [tree for part in back for tree in part] == list(trees)
    return {
        "trees_to_table_nodes_per_cpu_s": num_nodes / table_s,
        "table_to_bytes_nodes_per_cpu_s": num_nodes / bytes_s,
        "write_nodes_per_cpu_s": num_nodes / (table_s + bytes_s),
        "read_table_nodes_per_cpu_s": num_nodes / read_s,
        "table_to_trees_nodes_per_cpu_s": num_nodes / trees_s,
        "read_nodes_per_cpu_s": num_nodes / (read_s + trees_s),
    }


def read_q(trees: Sequence[Tree], num_nodes: int, repeats: int) -> dict[str, float]:
    """Wall seconds to read Q of `num_nodes` nodes from the files of a run, one thread.

    Plain pyarrow over the folder, and the store, which checks every file's SHA-256 first. The files
    are in the page cache: they were written just before.
    """
    tables = [trees_to_table(part) for part in shards(trees)]
    with tempfile.TemporaryDirectory() as folder:
        store = TrajectoryStore(RunStore(folder), 3)
        written = number = 0
        while written < num_nodes:
            part = shards(trees)[number % len(tables)]
            renamed = [_again(tree, number) for tree in part]
            store.commit(f"{number:05d}", renamed)
            written += sum(len(tree.nodes) for tree in renamed)
            number += 1
        store.seal()
        files = sorted(Path(folder).glob("trajectories/*/data/*.parquet"))
        columns = ["value_sum", "visit_count"]

        def q_plain() -> int:
            return sum(
                len(_q(pq.read_table(path, columns=columns, use_threads=False))) for path in files
            )

        def q_store() -> int:
            return sum(len(_q(table)) for table in store.tables(columns))

        cpu_s, _ = best_s(q_plain, repeats)
        plain_s, count = best_s(q_plain, repeats, time.perf_counter)
        store_s, _ = best_s(q_store, repeats, time.perf_counter)
        size = sum(path.stat().st_size for path in files)
    scale = 1_000_000 / count
    return {
        "read_q_1m_s": plain_s * scale,
        "read_q_1m_cpu_s": cpu_s * scale,
        "read_q_1m_through_store_s": store_s * scale,
        "read_q_files": len(files),
        "read_q_nodes": count,
        "read_q_mib": size / 2**20,
    }


def _again(tree: Tree, number: int) -> Tree:
    problem = tree.problem
    renamed = Problem(
        id=f"{problem.id}-{number}",
        source=problem.source,
        level=problem.level,
        text=problem.text,
        answer=problem.answer,
        answers_alt=problem.answers_alt,
    )
    return Tree(
        problem=renamed, round=tree.round, index=tree.index, seed=tree.seed, nodes=tree.nodes
    )


def _q(table: pa.Table) -> Any:
    visits = table["visit_count"].to_numpy()
    return table["value_sum"].to_numpy() / visits.clip(1)


GOALS = {"json_over_parquet": ">= 10", "read_q_1m_s": "<= 0.5"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.storage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of problem tables [the miniature]")
    parser.add_argument("--run", type=Path, help="also measure the trees of this run")
    parser.add_argument("--trees", type=int, default=128, help="trees of each sort")
    parser.add_argument(
        "--repeats", type=int, default=3, help="goes of each timing; the best is kept"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    if options.trees < 1 or options.repeats < 1:
        parser.error("--trees and --repeats must be at least 1")
    pa.set_cpu_count(1)
    problems, origin = load_problems(options.data, options.trees)
    related = asyncio.run(make_trees(problems, options.trees, related=True))
    unrelated = asyncio.run(make_trees(problems, options.trees, related=False))
    figures: dict[str, Any] = {**sizes(related)}
    figures |= {f"unrelated_{name}": value for name, value in sizes(unrelated).items()}
    if options.run is not None:
        stored = stored_trees(options.run)
        figures["run_trees"] = len(stored)
        figures |= {f"run_{name}": value for name, value in sizes(stored).items()}
    figures |= speeds(related, options.repeats)
    figures |= read_q(related, NUM_Q_NODES, options.repeats)
    print(
        f"{len(related)} trees of {sum(len(t.nodes) for t in related):,} nodes per sort "
        f"(8 candidates x 16 rollouts), {origin}; steps are made up, see --help"
    )
    for name, value in figures.items():
        shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"
        print(f"{name:36} {shown:>14}   {GOALS.get(name, '')}")
    figures |= {
        "problems": origin,
        "num_trees": len(related),
        "num_nodes": sum(len(tree.nodes) for tree in related),
        "schema_version": SCHEMA_VERSION,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("pyarrow", "numpy")},
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
