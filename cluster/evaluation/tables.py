"""What an evaluation leaves of its finished arms: answers.parquet, results.parquet, their facts.

committed trees --read_attempts--> answers.parquet     a row for every solution
                --score_problem--> results.parquet     a row for every problem, method, budget
                               --> evaluation.json     facts of each arm, and the summaries
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.evaluation.config import EvaluateConfig
from cluster.evaluation.reliability import reliability_bins
from cluster.evaluation.results import (
    ARM_OF,
    COLUMNS,
    NOT_SEARCHED,
    Arm,
    Attempt,
    ProblemAttempts,
    Result,
    Scoring,
    read_attempts,
    score_problem,
)
from cluster.folder.run_folder import RunFolder, RunFolderError
from rollout.problem import Problem
from rollout.store import Manifest, RunStore, TrajectoryStore

ANSWERS, RESULTS, REPORT = "answers.parquet", "results.parquet", "evaluation.json"

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("level", pa.string(), nullable=False),
        pa.field("gold", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("trajectory", pa.int32(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("failure", pa.string()),
        pa.field("generated_tokens", pa.int64(), nullable=False),
    ]
)
"""answers.parquet: a row for every solution of every arm."""


RESULT_SCHEMA = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("level", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("budget", pa.int32(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("generated_tokens", pa.float64(), nullable=False),
        pa.field("scored_tokens", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("gpu_seconds", pa.float64()),
    ]
)
"""results.parquet: a row for every problem, method and budget; what `--compare` reads."""


def score_arms(
    config: EvaluateConfig,
    arms: Sequence[Arm],
    problems: Sequence[Problem],
    folder: RunFolder,
    store: RunStore,
    on_done: Callable[[int, int], None],
) -> tuple[list[Result], dict[str, Any]]:
    """Results of finished arms, and facts of each by its name; writes both tables.

    Args:
        on_done: told (scored, all) problems of all arms now and then.
    """
    results: list[Result] = []
    facts: dict[str, Any] = {}
    total = len(arms) * len(problems)
    done = 0
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, ANSWER_SCHEMA, compression="zstd") as writer:
        for arm in arms:
            trees = TrajectoryStore(store, arm.round)
            found = read_attempts(trees.tables(COLUMNS), arm, width=config.width)
            rows = list(answer_rows(problems, arm, found))
            writer.write_table(pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA))
            record = folder.read(arm_record(arm)) or {}
            manifest = trees.manifest()
            assert manifest is not None
            facts[arm.value] = {
                "problems": len(problems),
                **_facts(found.values(), record, manifest),
            }
            scoring = _scoring(config, arm, record, manifest.totals.generated_tokens)
            for problem in problems:
                results += score_problem(problem, found.get(problem.id), scoring)
                done += 1
                if done % 200 == 0:
                    on_done(done, total)
    folder.write_bytes(ANSWERS, sink.getvalue())
    folder.write_table(RESULTS, pa.Table.from_pylist(result_rows(results), schema=RESULT_SCHEMA))
    return results, facts


def _scoring(config: EvaluateConfig, arm: Arm, record: Mapping[str, Any], tokens: int) -> Scoring:
    gpu_seconds = record.get("seconds", 0.0) * record.get("gpus", 0.0)
    largest = max(config.trajectories)
    num_made = {Arm.GREEDY: 1, Arm.BEAM: largest // config.width * config.width}
    return Scoring(
        arm=arm,
        methods=tuple(m for m in config.methods if ARM_OF[m] is arm),
        budgets=tuple(config.trajectories),
        top_k=config.vote_top_k,
        logprob_weight=config.logprob_weight,
        width=config.width if arm is Arm.BEAM else 1,
        num_made=num_made.get(arm, largest),
        gpu_seconds_per_token=gpu_seconds / tokens if gpu_seconds and tokens else None,
        seed=config.seed,
    )


def _facts(
    found: Collection[ProblemAttempts], record: Mapping[str, Any], manifest: Manifest
) -> dict[str, Any]:
    attempts = [a for of_problem in found for a in of_problem.attempts]
    failures = Counter(a.failure.value for a in attempts if a.failure is not None)
    return {
        "answered_problems": sum(any(a.answer is not None for a in f.attempts) for f in found),
        "solutions": len(attempts),
        "failures": dict(failures.most_common()),
        "undecided": sum(a.undecided for a in attempts),
        "quarantined": dict(manifest.failed),
        "lost": record.get("lost"),
        "doubled": record.get("doubled"),
        "deaths": record.get("deaths", {}),
        "seconds": round(record.get("seconds", 0.0), 2),
        "gpus": record.get("gpus", 0.0),
        "reliability": reliability_bins(found),
        "generated_tokens": manifest.totals.generated_tokens,
        "scored_tokens": manifest.totals.scored_tokens,
    }


def arm_record(arm: Arm) -> str:
    """Of seconds, GPUs and losses of an arm, under the evaluation's folder."""
    return f"stages/{arm.value}.json"


def answer_rows(
    problems: Sequence[Problem], arm: Arm, found: Mapping[str, ProblemAttempts]
) -> Iterator[dict[str, Any]]:
    """Rows of answers.parquet of one arm; a failed search has one row that says so."""
    for problem in problems:
        of_problem = found.get(problem.id)
        attempts = of_problem.attempts if of_problem is not None else []
        for attempt in attempts or [NOT_SEARCHED]:
            yield {
                "benchmark": problem.source,
                "problem_id": problem.id,
                "level": problem.level.value,
                "gold": problem.answer,
                "arm": arm.value,
                **_row(attempt, ANSWER_SCHEMA.names[5:]),
            }


def result_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows of results.parquet."""
    return [_row(result, RESULT_SCHEMA.names) for result in results]


def _row(record: Attempt | Result, names: Iterable[str]) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in names}
    if row["answer"] is not None:  # Arrow cannot hold lone surrogates
        row["answer"] = row["answer"].encode("utf-8", "backslashreplace").decode("utf-8")
    return row


def read_evaluation(folder: RunFolder) -> dict[str, Any]:
    """The report of a finished evaluation.

    Raises:
        RunFolderError: there is none, or it cannot be read.
    """
    report = folder.read(REPORT)
    if report is None:
        raise RunFolderError(
            f"{folder.at(REPORT)}: no such file; expected the folder of a finished `rstar evaluate`"
        )
    return report
