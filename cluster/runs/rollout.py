"""`rstar rollout`: one pass of search over one problem file with given models.

    problem file -> jobs -> trees -> RUN/trajectories/round=1/ -> solve rate

The same fleet, coordinator, store and audit as a round of self-evolution; run again, it goes on
from what was committed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.engines.model_check import check_policy_checkpoint
from cluster.evaluation.shares import COLUMNS, problems_by_level, shares_by_level
from cluster.fleet.fleet import Fleet
from cluster.fleet.given_models import (
    given_checkpoint,
    with_checkpoint_directories,
    with_prompt_template,
)
from cluster.fleet.stages import RolloutOutcome, RolloutStage, solved_problems
from cluster.folder.lineage import record_lineage, record_start
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import REPORT, RunFolder
from cluster.runs.config import RolloutConfig
from cluster.telemetry.live import LiveFile
from cluster.telemetry.progress import ProgressView
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.store import RunStore, TrajectoryStore

ROUND = 1
"""The one round a rollout run has."""


class RolloutRun:
    """One rollout run, from its config to its report."""

    def __init__(self, config: RolloutConfig, view: ProgressView) -> None:
        config = with_prompt_template(with_checkpoint_directories(config))
        self.config = config
        self.view = view
        self.folder = RunFolder(config.run_dir)
        self.fleet = Fleet(config, self.folder)
        self.fleet.note = view.note

    async def run(self) -> dict[str, Any]:
        """Search what is left of the file and return the report.

        Raises:
            ConfigError, RunFolderError, ProblemFileError, ModelCheckError, StoreError,
            EngineError: what stopped it, named; everything committed stays.
        """
        if self.config.policy is not None:
            check_policy_checkpoint(self.config.policy)
        problems, read = read_problems(
            self.config.problems, default_level=self.config.default_level
        )
        problems = problems[: self.config.limit]
        for line in read.lines():
            self.view.note(line)
        with self.folder.locked():
            self.folder.keep_config(self.config)
            trees = TrajectoryStore(RunStore(str(self.folder.root)), ROUND)
            trees.store.self_check()
            with LiveFile(self.folder.root, self.view.snapshot) as live:
                self.view.seconds_before = live.seconds_before
                self.view.usd_per_hour = self.config.cost.usd_per_hour
                self.folder.write_problems(problems)
                if trees.manifest() is None:
                    given = [self.config.problems, self.config.policy, self.config.ppm]
                    inputs = [path for path in given if path is not None]
                    await asyncio.to_thread(record_start, self.folder, inputs)
                    try:
                        with self.view:
                            outcome = await self._search(problems)
                    finally:
                        await self.fleet.stop(self.view.note)
                    await asyncio.to_thread(self._record, outcome, trees)
                report = await asyncio.to_thread(self._report, problems, trees, read.skipped)
                self.folder.write(REPORT, report)
        return report

    def _record(self, outcome: RolloutOutcome, trees: TrajectoryStore) -> None:
        self.folder.write_suspects(ROUND, outcome.suspects)
        levels = problems_by_level(trees.commits(), self.folder.problem_levels())
        self.folder.record_stage(ROUND, "rollout", outcome.seconds, **outcome.facts(), **levels)
        record_lineage(self.folder, ROUND)
        trees.remove_orphans(older_than_s=self.config.cluster.lease_s, now_unix_s=time.time())

    async def _search(self, problems: list[Problem]) -> RolloutOutcome:
        config = self.config
        self.view.plan = ["start", "rollout"]
        self.view.begin("start", "starting engines")
        if config.policy is not None:
            version = given_checkpoint("policy", config.policy).version
            await self.fleet.start(config.policy, version=version, learner=False)
        else:
            assert config.endpoint is not None
            await self.fleet.start(None, learner=False)
            await self.fleet.serve_endpoint(config.endpoint)
        if config.ppm is not None:
            await self.fleet.serve_preference(given_checkpoint("ppm", config.ppm))
        self.view.end(self.fleet.describe())
        self.view.begin("rollout", f"rollout of {config.problems.name}", len(problems), round=ROUND)
        stages = [
            RolloutStage(name="base", search=config.search),
            *(
                RolloutStage(
                    name=f"escalation-{position}",
                    search=stage.search(config.search),
                    trees=stage.trees,
                    unsolved_only=True,
                )
                for position, stage in enumerate(config.escalation, start=1)
            ),
        ]
        outcome = await self.fleet.rollout(
            ROUND,
            problems,
            stages,
            preference=config.ppm is not None,
            on_progress=self.view.update,
        )
        self.view.end(f"{outcome.solved} of {len(problems)} problems solved")
        for line in outcome.loss_lines():
            self.view.note(line)
        return outcome

    def _report(
        self, problems: list[Problem], trees: TrajectoryStore, skipped: Counter[str]
    ) -> dict[str, Any]:
        manifest = trees.manifest()
        assert manifest is not None
        stage = self.folder.stage(ROUND, "rollout")
        solved = solved_problems(trees)
        dead_ends: Counter[str] = Counter()
        discarded: Counter[str] = Counter()
        for table in trees.tables(["terminal", "discard", "multiplicity"]):
            dead_ends.update(t for t in table["terminal"].to_pylist() if t)
            rows = zip(table["discard"].to_pylist(), table["multiplicity"].to_pylist(), strict=True)
            for reason, count in rows:
                if reason:
                    discarded[reason] += count
        totals = manifest.totals
        return {
            "name": f"rollout of {self.config.problems.name}",
            "problems": len(problems),
            "skipped_rows": dict(skipped),
            "searched": len({k.problem_id for c in trees.commits().values() for k in c.trees}),
            "quarantined": dict(manifest.failed),
            "solved": shares_by_level((p.level.value, p.id in solved) for p in problems),
            "trees": totals.trees,
            "nodes": totals.nodes,
            "terminals": dict(dead_ends),
            "discarded_candidates": dict(discarded),
            "generated_tokens": totals.generated_tokens,
            "lost": stage.get("lost"),
            "doubled": stage.get("doubled"),
            "deaths": stage.get("deaths", {}),
            "resumed_trees": stage.get("resumed_trees", 0),
            "seconds": stage.get("seconds"),
            "generated_tokens_per_s": stage.get("generated_tokens_per_s"),
            "sandbox_steps_per_s": stage.get("sandbox_steps_per_s"),
            "prefix_hit_rate": stage.get("prefix_hit_rate"),
            "endpoint": stage.get("endpoint"),
            "config": self.config.effective(),
            "versions": versions(),
            "hardware": hardware(),
        }


def print_rollout_report(report: dict[str, Any], console: Console) -> None:
    """The solve rate by level and where the rest ended, as a table."""
    table = Table(title=report["name"])
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    shares = (report["solved"][column] for column in COLUMNS)
    table.add_row("solved, %", *("-" if s is None else f"{100 * s:.2f}" for s in shares))
    console.print(table)
    lines = [
        f"{report['searched']} of {report['problems']} problems searched, "
        f"{len(report['quarantined'])} quarantined, lost {report['lost']}, "
        f"doubled {report['doubled']}",
        f"{report['trees']:,} trees, {report['nodes']:,} nodes, "
        f"{report['generated_tokens']:,} generated tokens "
        f"({report['generated_tokens_per_s'] or 0:,.0f} tokens/s)",
        f"branches ended as: {_counts(report['terminals'])}",
        f"candidates left out: {_counts(report['discarded_candidates'])}",
    ]
    endpoint = report["endpoint"]
    if endpoint is not None:
        lines.append(
            f"{endpoint['version']}: {endpoint['requests']:,} HTTP requests "
            f"({endpoint['retries']:,} sent again, {endpoint['failed']:,} given up), "
            f"{endpoint['prompt_tokens']:,} tokens in ({endpoint['cached_tokens']:,} cached), "
            f"{endpoint['generated_tokens']:,} out"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"
