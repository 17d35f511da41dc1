"""`rstar rollout`: one pass of search over one problem file with given models.

    problem file -> jobs -> trees -> RUN/trajectories/round=1/ -> solve rate

The same fleet, coordinator, store and audit as a round of self-evolution; run again, it goes on
from what was committed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError, GivenModelsConfig, RolloutConfig
from cluster.fleet import Fleet, RolloutOutcome, RolloutStage
from cluster.lineage import record_lineage, record_start
from cluster.live import LiveFile
from cluster.model_check import check_policy_checkpoint
from cluster.progress import ProgressView
from cluster.report import COLUMNS, hardware, shares_by_level, versions, write_report
from cluster.run_folder import RunFolder
from cluster.status import problems_by_level
from learner.checkpoint import (
    Checkpoint,
    Kind,
    checkpoint_directory,
    directory_digest,
    read_prompt_template,
)
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.prompt import TEMPLATES
from rollout.store import RunStore, TrajectoryStore

ROUND = 1
"""The one round a rollout run has."""

G = TypeVar("G", bound=GivenModelsConfig)


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
                write_report(self.folder.root, report)
        return report

    def _record(self, outcome: RolloutOutcome, trees: TrajectoryStore) -> None:
        self.folder.write_suspects(ROUND, outcome.suspects)
        levels = problems_by_level(trees, self.folder.problem_levels())
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
        solved = trees.solved()
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


def with_checkpoint_directories(config: G) -> G:
    """The config with `.../round=R/policy` folders replaced by the checkpoint published there."""
    found = {
        name: checkpoint_directory(path)
        for name in ("policy", "ppm")
        if (path := getattr(config, name)) is not None
    }
    return config.model_copy(update=found)


def with_prompt_template(config: G) -> G:
    """The config with the template the policy was trained with, unless one was asked for.

    Raises:
        ConfigError: the checkpoint names a template this version does not know.
    """
    if config.policy is None or "template" in config.search.model_fields_set:
        return config
    name = read_prompt_template(config.policy)
    if name is None:
        return config
    if name not in TEMPLATES:
        raise ConfigError(
            f"{config.policy}: trained with prompt template {name!r}, expected one of "
            f"{', '.join(TEMPLATES)}; choose with --set search.template=..."
        )
    search = config.search.model_copy(update={"template": name})
    return config.model_copy(update={"search": search})


def given_checkpoint(kind: Kind, path: Path) -> Checkpoint:
    """A checkpoint named on the command line; its version is its digest."""
    return Checkpoint(kind=kind, round=0, path=str(path.absolute()), digest=directory_digest(path))


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
