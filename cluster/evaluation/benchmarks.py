"""`rstar evaluate`: methods and budgets on benchmarks, on the same cluster as a rollout.

    problem files --> jobs --> workers: Solver --> trees --> OUT/trajectories/round=ARM/
                      (one arm after the other: greedy, samples, beam, mcts)
    trees --> answers.parquet --> results.parquet --> evaluation.json, .md, report.html, plots

An arm is a round of an ordinary run: jobs are leased, trees committed exactly once, and what
is committed stays when the run is stopped; run again, it goes on. Solutions are made once, for the
largest budget, and shared by every method and budget that chooses among them. A trajectory of beam
search or MCTS is a job of its own, so that no problem waits for another one's trajectories.

Not covered: completions endpoints as the policy; several seeds of one evaluation (run it again with
another --set seed= and --out).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from cluster.engines.model_check import check_policy_checkpoint, check_preference_checkpoint
from cluster.evaluation.asked import (
    Benchmark,
    Prompting,
    choose_prompting,
    overlaps,
    read_benchmark,
)
from cluster.evaluation.config import EvaluateConfig
from cluster.evaluation.results import ARM_OF, Arm, summarise
from cluster.evaluation.tables import REPORT, arm_record, score_arms
from cluster.fleet.fleet import Fleet
from cluster.fleet.given_models import (
    form_note,
    given_checkpoint,
    serve_given,
    with_policy_form,
    with_prompt_template,
)
from cluster.fleet.session import Session
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.folder.config_file import ConfigError
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder
from cluster.folder.staging import at_hand
from cluster.telemetry.progress import ProgressView
from rollout.methods import Method, MethodConfig
from rollout.problem import Problem
from rollout.solution_tree import answer_tree, of_trajectory, search_of
from rollout.store import RunStore, TrajectoryStore
from verifier.verify import start_symbolic_worker


class EvaluationRun:
    """One evaluation, from its config to its report."""

    def __init__(self, config: EvaluateConfig, view: ProgressView) -> None:
        self.config = config
        self.view = view
        self.folder = RunFolder(config.run_dir, storage=config.storage.client)
        self.problems: list[Problem] = []
        self.benchmarks: list[Benchmark] = []
        self.warnings: list[str] = []
        self.prompting = Prompting(kind="steps", text=None)

    @property
    def arms(self) -> list[Arm]:
        return sorted({ARM_OF[m] for m in self.config.methods}, key=lambda arm: arm.round)

    async def run(self) -> dict[str, Any]:
        """Do what is left of the evaluation and return its report.

        Raises:
            ConfigError, RunFolderError, ProblemFileError, ModelCheckError, StoreError,
            EngineError: what stopped it, named; everything committed stays.
        """
        self._prepare()
        session = Session(self.config, self.view)
        with session.held() as live:
            self.folder.write_problems(self.problems)
            store = session.store
            left = [a for a in self.arms if TrajectoryStore(store, a.round).manifest() is None]
            if left:
                await session.record_start(
                    [*self.config.benchmarks, self.config.policy, self.config.ppm]
                )
                async with session.fleet_shown() as fleet:
                    await self._answer(fleet, left)
            report = await self._report(store, live.seconds_total)
        return report

    def _prepare(self) -> None:
        """Check the models and read the problems, before anything is started."""
        from transformers import AutoTokenizer

        policy = at_hand(self.config.policy)
        check_policy_checkpoint(policy, markers=())
        tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
        self.prompting = choose_prompting(self.config, tokenizer)
        config = self.config
        if self.prompting.kind == "steps":
            config = with_policy_form(with_prompt_template(config))
            if note := form_note(config):
                self.view.note(note)
        else:
            wrong = [m for m in config.methods if m.uses_preference]
            if wrong:
                raise ConfigError(
                    f"method {wrong[0]} needs a policy that writes code steps; with a "
                    f"{self.prompting.kind} prompt there are greedy and majority"
                )
            engine = config.policy_engine.model_copy(update={"step_markers": False})
            config = config.model_copy(update={"policy_engine": engine, "ppm": None})
        uses_ppm = any(m.uses_preference for m in config.methods)
        config = config.model_copy(update={"ppm": config.ppm if uses_ppm else None})
        if config.ppm is not None:
            check_preference_checkpoint(at_hand(config.ppm))
        self.config = config
        by_name: dict[str, list[Problem]] = {}
        for path in config.benchmarks:
            problems, about, lines = read_benchmark(path, config)
            for line in lines:
                self.view.note(line)
            by_name[about.name] = problems
            self.benchmarks.append(about)
            self.problems += problems
        self.warnings = overlaps(by_name)
        if Arm.BEAM in self.arms:
            missed = [k for k in config.trajectories if k % config.width]
            if missed:
                self.warnings.append(
                    f"beam has no budget of {', '.join(map(str, missed))}: a beam of "
                    f"{config.width} finishes {config.width} solutions"
                )
        for warning in self.warnings:
            self.view.note(f"warning: {warning}")

    async def _answer(self, fleet: Fleet, arms: Sequence[Arm]) -> None:
        """Have the cluster answer, one arm after the other."""
        self.view.plan = ["start", *("rollout" for _ in arms)]
        self.view.begin("start", "starting engines")
        guided = any(arm is not Arm.GREEDY for arm in arms)
        await serve_given(fleet, self.config, preference=guided)
        self.view.end(fleet.describe())
        for arm in arms:
            await self._answer_arm(fleet, arm)

    async def _answer_arm(self, fleet: Fleet, arm: Arm) -> None:
        jobs = self.jobs(arm)
        guided = self.config.ppm is not None and arm is not Arm.GREEDY
        method = self.method(arm)
        trained = self.config.search.trained() if self.prompting.text is None else None
        stage = RolloutStage(
            name=arm.value,
            search=search_of(method, trained or self.config.search, guided=guided),
            answers=partial(answer_tree, method=method, prompt=self.prompting.text),
        )
        self.view.begin("rollout", f"{arm}: {len(self.problems):,} problems", len(jobs))
        began_s = time.monotonic()
        name = arm_record(arm)
        before = (self.folder.read(name) or {}).get("seconds", 0.0)
        outcome: RolloutOutcome | None = None
        solve = partial(
            fleet.rollout,
            *(arm.round, jobs, [stage]),
            preference=guided,
            on_progress=self.view.update,
        )
        try:
            outcome = await fleet.attempts(str(arm), solve)
        finally:
            seconds = before + time.monotonic() - began_s
            facts = outcome.facts() if outcome is not None else {}
            if fleet.attempts.reasons:
                facts["retries"] = fleet.attempts.reasons
            self.folder.write(name, {**facts, "seconds": seconds, "gpus": self._gpus(guided)})
        totals = outcome.manifest.totals
        self.view.end(
            f"{totals.solved:,} of {totals.trees:,} solved, "
            f"{totals.generated_tokens:,} tokens, lost {outcome.lost}, doubled {outcome.doubled}"
        )
        for line in outcome.loss_lines():
            self.view.note(line)

    def jobs(self, arm: Arm) -> list[Problem]:
        """A problem per job: as it is, or once for each trajectory of a search."""
        largest = max(self.config.trajectories)
        if not arm.job_is_trajectory:
            return self.problems
        count = largest // self.config.width if arm is Arm.BEAM else largest
        return [of_trajectory(p, number) for number in range(count) for p in self.problems]

    def method(self, arm: Arm) -> MethodConfig:
        """What one job of an arm does."""
        config = self.config
        name = {Arm.GREEDY: Method.GREEDY, Arm.BEAM: Method.BEAM, Arm.MCTS: Method.MCTS}.get(arm)
        if name is None:  # valued samples serve majority as well
            name = Method.BEST_OF_N if config.ppm is not None else Method.MAJORITY
        count = {Arm.SAMPLES: max(config.trajectories), Arm.BEAM: config.width}.get(arm, 1)
        return MethodConfig(
            name=name,
            num_trajectories=count,
            top_k=config.vote_top_k,
            max_solution_tokens=config.max_solution_tokens,
            beam_width=config.width,
            beam_candidates=config.beam_candidates,
            rollouts_per_tree=config.rollouts_per_tree,
        )

    def _gpus(self, guided: bool) -> float:
        cluster = self.config.cluster
        pools = [cluster.policy, cluster.ppm] if guided else [cluster.policy]
        return sum(pool.replicas * pool.num_gpus for pool in pools)

    # ---------------------------------------------------------------- the report

    async def _report(self, store: RunStore, seconds_total: float) -> dict[str, Any]:
        # A symbolic question that has to wait for its process would end undecided.
        await asyncio.to_thread(start_symbolic_worker)
        self.view.begin("report", "counting answers", len(self.arms) * len(self.problems))
        loop = asyncio.get_running_loop()

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self.view.update, done, total)

        results, facts = await asyncio.to_thread(
            score_arms, self.config, self.arms, self.problems, self.folder, store, tell
        )
        report = {
            "kind": "evaluation",
            "name": self.folder.name,
            "models": {
                kind: {"path": str(path), "version": (await given_checkpoint(kind, path)).version}
                for kind in ("policy", "ppm")
                if (path := getattr(self.config, kind)) is not None
            },
            "prompt": self.prompting.kind,
            "vote_top_k": self.config.vote_top_k,
            "benchmarks": [asdict(benchmark) for benchmark in self.benchmarks],
            "warnings": self.warnings,
            "arms": facts,
            "summaries": [asdict(s) for s in summarise(results, seed=self.config.seed)],
            "seconds_total": round(seconds_total, 1),
            "config": self.config.effective(),
            "versions": versions(),
            "hardware": hardware(),
        }
        self.folder.write(REPORT, report)
        self.view.end(f"{len(results):,} results")
        return report
