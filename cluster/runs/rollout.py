"""`rstar rollout`: one pass of search over one problem file with given models.

    problem file -> jobs -> trees -> RUN/trajectories/round=1/ -> solve rate

The same fleet, coordinator, store and audit as a round of self-evolution; run again, it goes on
from what was committed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.evaluation.shares import (
    COLUMNS,
    counts_text,
    percent,
    problems_by_level,
    shares_by_level,
)
from cluster.fleet.fleet import Fleet
from cluster.fleet.given_models import (
    form_note,
    serve_given,
    with_checkpoint_directories,
    with_policy_form,
    with_prompt_template,
)
from cluster.fleet.session import Session
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.folder.lineage import record_lineage
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import REPORT
from cluster.folder.staging import at_hand
from cluster.runs.config import EscalationConfig, RolloutConfig
from cluster.telemetry.progress import ProgressView
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.search import SearchConfig
from rollout.store import TrajectoryStore

ROUND = 1
"""The one round a rollout run has."""


class RolloutRun:
    """One rollout run, from its config to its report."""

    def __init__(self, config: RolloutConfig, view: ProgressView) -> None:
        self.config = with_policy_form(with_prompt_template(with_checkpoint_directories(config)))
        self.view = view
        self.session = Session(self.config, view)
        self.folder = self.session.folder

    async def run(self) -> dict[str, Any]:
        """Search what is left of the file and return the report.

        Raises:
            ConfigError, RunFolderError, ProblemFileError, ModelCheckError, StoreError,
            EngineError: what stopped it, named; everything committed stays.
        """
        problems, read = read_problems(
            at_hand(self.config.problems), default_level=self.config.default_level
        )
        problems = problems[: self.config.limit]
        for line in (form_note(self.config), *read.lines()):
            if line:
                self.view.note(line)
        trees = TrajectoryStore(self.session.store, ROUND)
        with self.session.held():
            self.folder.write_problems(problems)
            if trees.manifest() is None:
                await self.session.record_start(
                    [self.config.problems, self.config.policy, self.config.ppm]
                )
                async with self.session.fleet_shown() as fleet:
                    outcome = await self._search(fleet, problems)
                await asyncio.to_thread(self._record, outcome, trees)
            report = await asyncio.to_thread(self._report, problems, trees, read.skipped)
            self.folder.write(REPORT, report)
        return report

    def _record(self, outcome: RolloutOutcome, trees: TrajectoryStore) -> None:
        self.folder.write_suspects(ROUND, outcome.suspects)
        levels = problems_by_level(trees.commits(), self.folder.problem_levels())
        facts = outcome.facts() | levels
        if retries := self.session.fleet.attempts.reasons:
            facts["retries"] = retries
        self.folder.record_stage(ROUND, "rollout", outcome.seconds, **facts)
        record_lineage(self.folder, ROUND)
        trees.remove_orphans(older_than_s=self.config.cluster.lease_s, now_unix_s=time.time())

    async def _search(self, fleet: Fleet, problems: list[Problem]) -> RolloutOutcome:
        config = self.config
        self.view.plan = ["start", "rollout"]
        self.view.begin("start", "starting engines")
        await serve_given(fleet, config, preference=True)
        if config.endpoint is not None:
            await fleet.serve_endpoint(config.endpoint)
        self.view.end(fleet.describe())
        self.view.begin("rollout", f"rollout of {config.problems.name}", len(problems), round=ROUND)
        search = partial(
            fleet.rollout,
            ROUND,
            problems,
            search_stages(config.search, config.escalation),
            preference=config.ppm is not None,
            on_progress=self.view.update,
        )
        outcome = await fleet.attempts("rollout", search)
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


def search_stages(
    search: SearchConfig, escalation: Sequence[EscalationConfig], *, trees: int = 1
) -> list[RolloutStage]:
    """Every problem once with `search`, then what is unsolved with each stage of `escalation`."""
    return [
        RolloutStage(name="base", search=search, trees=trees),
        *(
            RolloutStage(
                name=f"escalation-{position}",
                search=stage.search(search),
                trees=stage.trees,
                unsolved_only=True,
            )
            for position, stage in enumerate(escalation, start=1)
        ),
    ]


def print_rollout_report(report: dict[str, Any], console: Console) -> None:
    """The solve rate by level and where the rest ended, as a table."""
    table = Table(title=report["name"])
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    shares = (report["solved"][column] for column in COLUMNS)
    table.add_row("solved, %", *(percent(share, 2) for share in shares))
    console.print(table)
    lines = [
        f"{report['searched']} of {report['problems']} problems searched, "
        f"{len(report['quarantined'])} quarantined, lost {report['lost']}, "
        f"doubled {report['doubled']}",
        f"{report['trees']:,} trees, {report['nodes']:,} nodes, "
        f"{report['generated_tokens']:,} generated tokens "
        f"({report['generated_tokens_per_s'] or 0:,.0f} tokens/s)",
        f"branches ended as: {counts_text(report['terminals'])}",
        f"candidates left out: {counts_text(report['discarded_candidates'])}",
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
