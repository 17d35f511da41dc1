"""The loop of rounds: rollout -> select -> train policy -> train PPM -> ruler -> evaluate, then the
next.

    cold start (round 0): demonstrations --SFT--> policy 0 --> held-out greedy
    round r:  problems --search with policy r-1 (and PPM r-1)--> trees --seal--> manifest
              manifests --select--> dataset --train--> policy r, PPM r --> held-out, all methods
                              pair problems --search with policy r--> ruler of PPM r

A PPM whose ruler is too short steers no search: the next round then stays terminal-guided, and its
lineage says so (`cluster.evaluation.ruler`).

Every stage asks first whether its product exists and is skipped if so; a stage that was cut off
begins again, except that the rollout goes on from the shards that were committed. A stage that
loses actors or machines is done again, too (`cluster.jobs.attempts`). One set of engine processes
serves the whole run: new weights are loaded in place. On a cluster the learner is there from the
beginning of `select` to the round's last fit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from cluster.engines.model_check import ModelCheckError, check_policy_checkpoint
from cluster.evaluation.held_out import evaluate
from cluster.evaluation.ruler import Steering, at_chance, measure, steering_of
from cluster.evaluation.shares import problems_by_level, set_aside_lines
from cluster.fleet.given_models import check_own_examples, marked, with_chat_turns
from cluster.fleet.session import Session
from cluster.folder.config_file import ConfigError
from cluster.folder.lineage import lineage_name, record_lineage
from cluster.folder.run_folder import BASE, ESTIMATE, MARKED_TRUNK, REPORT, dataset_name
from cluster.folder.staging import at_hand
from cluster.runs.config import RunConfig
from cluster.runs.evolve_report import evolution_report
from cluster.runs.rollout import search_stages
from cluster.runs.select import RoundSelection
from cluster.telemetry.progress import ROUND_STAGES, ProgressView
from learner.checkpoint import Checkpoint, CheckpointStore, Kind, checkpoint_directory
from learner.dataset import MANIFEST, read_demonstrations
from learner.fit import FitProgress, FitRequest, PolicyTrainConfig, PreferenceTrainConfig
from learner.ruler import is_pair_problem
from learner.select import recipe_of, select_dataset
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.problems.text import problem_key
from rollout.run_store import absolute
from rollout.seeds import derive_seed
from rollout.store import TrajectoryStore, evaluation_of, folder_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Evolution:
    """One run of self-evolution, from its config to its report."""

    def __init__(
        self,
        config: RunConfig,
        view: ProgressView,
        *,
        force: bool = False,
        estimate: Callable[[RunConfig, int], dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            force: promote checkpoints that the gate holds back, or held back before.
            estimate: what a run of so many problems is thought to cost, kept with it before the
                first stage; None: no estimate is made.
        """
        self.config = config
        self.force = force
        self.estimate = estimate
        self.view = view
        self.session = Session(config, view)
        self.folder, self.store = self.session.folder, self.session.store
        self.fleet = self.session.fleet
        self.checkpoints = CheckpointStore(self.folder.checkpoints)
        self.train: list[Problem] = []
        self.test: list[Problem] = []
        self.pair_problems: list[Problem] = []
        self.demonstrations: Path | None = None
        self.base_model = Path()
        """Its tokenizer holds the step markers; what every fit starts from."""
        self.untrained = Path()
        """The base model as it was given."""
        self.given_trunk: Path | None = None
        """What every PPM starts from; None: a policy of the run."""
        self.inputs: list[Path | None] = []
        """Files and model directories the run starts from."""

    async def run(self) -> dict[str, Any]:
        """Do what is left of the run and return its report.

        Raises:
            ConfigError, RunFolderError, ProblemFileError, StoreError, CheckpointError,
            LearnerError, EngineError: what stopped it, named; everything committed stays.
        """
        with self.session.held() as live:
            self.view.num_rounds = len(self.config.rounds)
            self._prepare()
            self.folder.write_problems(self.train)
            self._plan()
            self._keep_estimate()
            async with self.session.fleet_shown():
                await self._rounds()
            report = evolution_report(
                self.config,
                self.folder,
                self.store,
                levels={p.id: p.level for p in self.train},
                num_test=len(self.test),
                seconds_total=live.seconds_total,
            )
            self.folder.write(REPORT, report)
        return report

    # ---------------------------------------------------------------- before the first round

    def _prepare(self) -> None:
        """Have problem files and base weights, and read the problems."""
        problems = self.config.problems
        if problems.miniature is not None:
            train_files, test_file, pair_file = self._make_miniature()
        else:
            train_files, test_file, pair_file = problems.train, problems.test, problems.pairs
            self.demonstrations = problems.demonstrations
            assert self.config.models.base_model is not None
            self.base_model = self.config.models.base_model
        self.inputs = [*train_files, test_file, pair_file, self.demonstrations, self.base_model]
        check_policy_checkpoint(at_hand(self.base_model), markers=())
        self.untrained = self.base_model
        self.base_model = marked(self.base_model, self.folder)
        self.given_trunk = self._given_trunk()
        self._check_templates()
        seen: dict[str, Path] = {}
        for path in train_files:
            found, report = read_problems(at_hand(path), default_level=problems.default_level)
            self._tell(report.lines())
            self.train += _new_problems(found, path, seen)
        if test_file is not None:
            self.test, report = read_problems(
                at_hand(test_file), default_level=problems.default_level
            )
            self._tell(report.lines())
        self._hold_out_pairs(pair_file)

    def _hold_out_pairs(self, path: Path | None) -> None:
        """Have the problems held out for pairs, from their file or out of the training files.

        Raises:
            ConfigError: one of the file is searched, measured or demonstrated too; names both.
        """
        problems = self.config.problems
        elsewhere = {problem_key(p.text): f"test problem {p.id!r}" for p in self.test}
        if self.demonstrations is not None and (path is not None or problems.pair_share):
            for shown in read_demonstrations(at_hand(self.demonstrations)):
                elsewhere[problem_key(shown.problem)] = f"demonstration {shown.id!r}"
        if path is None:
            kept = {p.original for p in self.train if problem_key(p.text) in elsewhere}
            self.pair_problems = [
                p
                for p in self.train
                if p.original not in kept
                and is_pair_problem(
                    p.original,
                    share=problems.pair_share,
                    split_seed=self.config.dataset.split_seed,
                )
            ]
            held = {p.id for p in self.pair_problems}
            self.train = [p for p in self.train if p.id not in held]
            return
        self.pair_problems, report = read_problems(
            at_hand(path), default_level=problems.default_level
        )
        self._tell(report.lines())
        elsewhere |= {problem_key(p.text): f"training problem {p.id!r}" for p in self.train}
        originals = {p.original: f"training problem {p.id!r}" for p in self.train}
        for problem in self.pair_problems:
            key = problem_key(problem.text)
            same = elsewhere.get(key) or originals.get(problem.original)
            if same is not None:
                raise ConfigError(
                    f"problems.pairs: problem {problem.id!r} of {path} is {same} too, or a "
                    "variation of it; what the PPM is measured on may be used for nothing else"
                )

    def _given_trunk(self) -> Path | None:
        """The trunk of every PPM that no fit of the run makes, markers included.

        Raises:
            ConfigError: its directory holds no causal language model.
        """
        trunk = self.config.models.ppm_trunk
        if trunk == "base":
            return self.base_model
        if not isinstance(trunk, Path):
            return None
        trunk = Path(absolute(checkpoint_directory(trunk)))
        self.inputs.append(trunk)
        try:
            check_policy_checkpoint(at_hand(trunk), markers=())
        except ModelCheckError as error:
            raise ConfigError(
                f"models.ppm_trunk: {error}; expected policy, previous, cold_start, base "
                "or such a directory"
            ) from error
        return marked(trunk, self.folder, MARKED_TRUNK)

    def _trunk(self, policy: Checkpoint, before: Checkpoint | None) -> Path:
        """What the PPM of a round starts from, given the round's policy and the PPM before it."""
        if self.given_trunk is not None:
            return self.given_trunk
        if self.config.models.ppm_trunk == "cold_start":
            cold = self.checkpoints.current("policy", 0)
            assert cold is not None
            policy = cold
        if self.config.models.ppm_trunk == "previous" and before is not None:
            if not at_chance(self.folder.read(self.folder.ruler_name(before.round))):
                return Path(before.path)
            self.view.note(
                f"round {policy.round}: the PPM starts from the policy: the one before ranks no "
                "better than chance"
            )
        return Path(policy.path)

    def _check_templates(self) -> None:
        """Each round's template must be one that its policy knows.

        Raises:
            ConfigError: it is not; names the round, and what would be right.
        """
        check_own_examples(self.config)
        endpoint = self.config.endpoint
        if endpoint is not None or self._is_untrained:
            tokenizer = self.untrained if endpoint is None else endpoint.tokenizer
            search = with_chat_turns(self.config.search, tokenizer and at_hand(tokenizer))
            self.config = self.config.model_copy(update={"search": search})
        for number, settings in enumerate(self.config.rounds, start=1):
            untrained = number == 1 and self.config.cold_start is None
            shown = settings.search(self.config.search).prompt_template.repairs
            key = f"rounds.{number - 1}.template"
            if shown and not untrained:
                raise ConfigError(
                    f"{key}: bootstrap is for a model that was never fine-tuned; round {number} "
                    "searches with a fine-tuned policy: choose rstar or short (search.template)"
                )
            if shown and self.config.endpoint is None and not self._is_untrained:
                raise ConfigError(
                    f"{key}: bootstrap, but the tokenizer of {self.untrained} holds the step "
                    "markers as tokens of their own, which an untrained model cannot read; give a "
                    "base model without them, or choose rstar or short (search.template)"
                )
            if not shown and untrained and self._is_untrained:
                raise ConfigError(
                    f"{key}: {self.untrained} was never fine-tuned on the step markers; ask it "
                    "with worked examples (template: bootstrap), or give it a cold_start on "
                    "written demonstrations (problems.demonstrations)"
                )

    @property
    def _is_untrained(self) -> bool:
        """Whether round 1 without a cold start asks the base model as it was given."""
        return self.config.endpoint is None and self.untrained != self.base_model

    def _make_miniature(self) -> tuple[list[Path], Path | None, Path | None]:
        from learner.miniature import write_base_model
        from rollout.problems.miniature import generate, write_miniature

        world = self.config.problems.miniature
        assert world is not None
        seed = self.config.seed if world.seed is None else world.seed
        try:
            miniature = generate(
                seed=seed,
                num_demonstrations=world.num_demonstrations,
                num_train=world.num_train,
                num_test=world.num_test,
                num_pairs=world.num_pair_problems,
                families=world.families,
            )
        except ValueError as error:
            raise ConfigError(f"problems.miniature: {error}") from None
        with self.folder.filling("problems", last="test.parquet") as directory:
            files = write_miniature(directory, miniature)
            table = pq.read_table(files.demonstrations, columns=["problem", "solution"])
            texts = [*table["problem"].to_pylist(), *table["solution"].to_pylist()]
            texts += pq.read_table(files.train, columns=["problem"])["problem"].to_pylist()
        self.demonstrations = self.folder.problems / files.demonstrations.name
        self.base_model = self.config.models.base_model or self.folder.base_model
        made = self.folder.store.exists(f"{BASE}/config.json")
        if self.config.models.base_model is None and not made:
            with self.folder.filling(BASE, last="config.json", whole=True) as directory:
                seed = derive_seed(self.config.seed, "base")
                write_base_model(directory, seed=seed, texts=texts)
        train, test, pairs = (
            self.folder.problems / file.name if file is not None else None
            for file in (files.train, files.test, files.pairs)
        )
        assert train is not None
        return [train], test, pairs

    def _tell(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.view.note(line)

    def _plan(self) -> None:
        """What kinds of stages are ahead, for the time left."""
        plan = ["start"]
        if self.config.cold_start is not None:
            plan += ["cold start", "evaluate"]
        self.view.plan = plan + [*ROUND_STAGES] * len(self.config.rounds)

    def _keep_estimate(self) -> None:
        """Have what the run was thought to cost before it began, if its config tells enough."""
        if self.estimate is None or self.config.cost.expected is None:
            return
        if self.folder.read(ESTIMATE) is None:
            record = self.estimate(self.config, len(self.train))
            self.folder.write(ESTIMATE, record)
            self.view.note(
                f"estimated: ${record['usd']:,.2f} in {record['hours']:,.1f} hours of machines"
            )

    # ---------------------------------------------------------------- the rounds

    async def _rounds(self) -> None:
        policy = self.checkpoints.current("policy", 0)
        ppm: Checkpoint | None = None
        if self._finished():
            return
        self.view.begin("start", "starting engines and learner")
        # Reading a large base model takes about as long as starting an engine with it.
        recording = asyncio.create_task(self.session.record_start(self.inputs))
        # With an endpoint for round 1, replicas start when a checkpoint is to be served.
        asked_first = None if self.config.endpoint is not None else self.base_model
        sealed = TrajectoryStore(self.store, 1).manifest() is not None
        bootstraps = self.config.cold_start is None and self._is_untrained and not sealed
        if bootstraps:
            asked_first = self.untrained
        await self.fleet.start(asked_first, marked=not bootstraps)
        await recording
        again = {"retries": reasons} if (reasons := self.fleet.attempts.reasons) else {}
        self.folder.record_stage(0, "start", self.view.end(self.fleet.describe()), **again)
        if self.config.cold_start is not None:
            cold_start = partial(self._cold_start, self.config.cold_start)
            policy = await self._attempted(0, "train_policy", cold_start)
            await self.fleet.leave_learner()
            await self._record_lineage(0)
            await self._attempted(0, "evaluate", partial(self._evaluate, 0, policy, None))
        for number in range(1, len(self.config.rounds) + 1):
            steering = self._steering(number)
            await self._record_lineage(number, steering)
            rollout = partial(self._rollout, number, policy, ppm, steering)
            await self._attempted(number, "rollout", rollout)
            await self._record_lineage(number)
            if self.checkpoints.current("ppm", number) is None:
                self.fleet.want_learner()
            await self._select(number)
            start = self.base_model
            if self.config.models.policy_init == "previous" and policy is not None:
                start = Path(policy.path)
            fit = partial(self._train, number, "policy", start, self.config.train_policy, policy)
            policy = await self._attempted(number, "train_policy", fit)
            await self._record_lineage(number)
            trunk = self._trunk(policy, ppm)
            fit = partial(self._train, number, "ppm", trunk, self.config.train_ppm, ppm)
            ppm = await self._attempted(number, "train_ppm", fit)
            await self.fleet.leave_learner()
            await self._record_lineage(number)
            await self._attempted(number, "ruler", partial(self._ruler, number, policy, ppm))
            await self._attempted(number, "evaluate", partial(self._evaluate, number, policy, ppm))

    async def _attempted(self, number: int, stage: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do a stage, again if it must be; its record says why."""
        name = f"round {number}: {stage.replace('_', ' ')}"
        result = await self.fleet.attempts(name, work)
        if self.fleet.attempts.reasons:
            record = {**self.folder.stage(number, stage), "retries": self.fleet.attempts.reasons}
            self.folder.record_stage(number, stage, record.pop("seconds"), **record)
        return result

    async def _record_lineage(self, number: int, steering: Steering | None = None) -> None:
        decided = asdict(steering) if steering is not None else None
        await asyncio.to_thread(record_lineage, self.folder, number, decided)

    def _steering(self, number: int) -> Steering | None:
        """Whether the PPM before a round takes part in it; None: the config does not ask for that.

        What an earlier start has decided stands, so that no round is searched in two ways.
        """
        if not self.config.rounds[number - 1].preference:
            return None
        decided = (self.folder.read(lineage_name(number)) or {}).get("steering")
        if decided is not None:
            return Steering(**decided)
        record = self.folder.read(self.folder.ruler_name(number - 1))
        if record is None:
            return None
        if TrajectoryStore(self.store, number).plans():
            # A version without rulers began it, with the PPM.
            return Steering(ppm=record["ppm"], steers=True, why="")
        return steering_of(record)

    def _skip(self, number: int, stage: str, record: str) -> None:
        """A stage an earlier start has done; what it took helps to tell the time left."""
        self.view.skip(stage, self.folder.stage(number, record).get("seconds"))

    def _finished(self) -> bool:
        """True if every product of the last round is there."""
        last = len(self.config.rounds)
        name = self.folder.evaluation_name if self.test else self.folder.ruler_name
        return bool(self.checkpoints.current("ppm", last) and self.folder.read(name(last)))

    async def _cold_start(self, config: PolicyTrainConfig) -> Checkpoint:
        """Round 0: SFT of the base model on the demonstrations alone."""
        existing = self.checkpoints.current("policy", 0)
        if existing is not None:
            self._skip(0, "cold start", "train_policy")
            return existing
        assert self.demonstrations is not None
        self.view.begin("cold start", "cold start: SFT on demonstrations")
        if self.folder.dataset_manifest(0) is None:
            with self.folder.filling(dataset_name(0), last=MANIFEST) as directory:
                select_dataset(
                    (),
                    directory,
                    template=self.config.search.training_template,
                    config=self.config.dataset,
                    demonstrations=read_demonstrations(at_hand(self.demonstrations)),
                )
        return await self._fit(0, "policy", self.base_model, config)

    async def _rollout(
        self,
        number: int,
        policy: Checkpoint | None,
        ppm: Checkpoint | None,
        steering: Steering | None,
    ) -> None:
        """Search every problem with the models of the round before, escalate, seal."""
        trees = TrajectoryStore(self.store, number)
        if trees.manifest() is not None:
            self._skip(number, "rollout", "rollout")
            return
        settings = self.config.rounds[number - 1]
        self.view.begin("rollout", f"round {number}: rollout", len(self.train), round=number)
        began_s = time.monotonic()
        if number == 1 and self.config.endpoint is not None:
            await self.fleet.serve_endpoint(self.config.endpoint)
        else:
            bootstraps = policy is None and self._is_untrained
            await self.fleet.serve_policy(
                self.untrained if bootstraps else self.base_model, policy, marked=not bootstraps
            )
        preference = steering is not None and steering.steers
        if preference:
            assert ppm is not None
            await self.fleet.serve_preference(ppm)
        elif steering is not None:
            self.view.note(f"round {number} stays terminal-guided: {steering.ppm}: {steering.why}")
        serving_s = time.monotonic() - began_s
        search = settings.search(self.config.search)
        outcome = await self.fleet.rollout(
            number,
            self.train,
            search_stages(search, settings.escalation, trees=settings.trees),
            preference=preference,
            on_progress=self.view.update,
            recipe=recipe_of(
                self.config.dataset,
                self.config.search.training_template,
                valued_steps=self._valued_steps,
            ),
        )
        totals = outcome.manifest.totals
        seconds = self.view.end(
            f"{totals.trees} trees, {totals.generated_tokens:,} tokens, "
            f"{outcome.solved} of {len(self.train)} problems solved"
        )
        self._tell(outcome.loss_lines())
        self.folder.write_suspects(number, outcome.suspects)
        levels = await asyncio.to_thread(
            lambda: problems_by_level(trees.commits(), self.folder.problem_levels())
        )
        serving = {"serving_s": serving_s, "weights_stage_s": dict(self.fleet.weights_stage_s)}
        facts = outcome.facts() | levels | serving
        self.folder.record_stage(number, "rollout", seconds, **facts)
        await self._remove_orphans(number)

    async def _remove_orphans(self, number: int) -> None:
        """Remove what killed workers left of a round that is sealed."""
        removed = await asyncio.to_thread(
            TrajectoryStore(self.store, number).remove_orphans,
            older_than_s=self.config.cluster.lease_s,
            now_unix_s=time.time(),
        )
        if removed:
            self.view.note(
                f"{folder_of(number)}: {len(removed)} files removed that workers left unfinished"
            )

    @property
    def _valued_steps(self) -> bool:
        """Whether the PPM learns the Q-value of every step."""
        return self.config.train_ppm.objective == "q_regression"

    async def _select(self, number: int) -> None:
        """Trees of the rounds so far -> SFT examples; trees with outcomes -> pairs."""
        if self.folder.dataset_manifest(number) is not None:
            self._skip(number, "select", "select")
            return
        self.view.begin("select", f"round {number}: select", round=number)
        selection = RoundSelection(self.store, number, keep=True)
        demonstrations = (
            read_demonstrations(at_hand(self.demonstrations)) if self.demonstrations else []
        )

        began_s = time.monotonic()

        def select() -> dict[str, Any]:
            with self.folder.filling(dataset_name(number), last=MANIFEST) as directory:
                manifest = selection.select(
                    directory,
                    template=self.config.search.training_template,
                    config=self.config.dataset,
                    demonstrations=demonstrations,
                    valued_steps=self._valued_steps,
                )
                # Before the dataset is there: who finds it counts nothing again.
                self.folder.record_stage(
                    number,
                    "select",
                    time.monotonic() - began_s,
                    trajectories=selection.trajectories,
                    correct_trajectories=selection.correct,
                )
                return manifest

        try:
            manifest = await asyncio.to_thread(select)
        finally:
            selection.stop()
        self._tell(selection.notes())
        counts = manifest["counts"]["all"]
        self.view.end(
            f"{counts.get('sft_train', 0)} SFT examples, {counts.get('pairs_train', 0)} pairs"
        )

    async def _train(
        self,
        number: int,
        kind: Kind,
        base: Path,
        config: PolicyTrainConfig | PreferenceTrainConfig,
        previous: Checkpoint | None,
    ) -> Checkpoint:
        """The checkpoint of a round, trained if it is not there."""
        existing = self._existing(kind, number)
        if existing is not None:
            self._skip(number, f"train {kind}", f"train_{kind}")
            return existing
        what = "PPM" if kind == "ppm" else kind
        self.view.begin(f"train {kind}", f"round {number}: train {what}", round=number)
        return await self._fit(number, kind, base, config, previous)

    def _existing(self, kind: Kind, number: int) -> Checkpoint | None:
        """What serves a round already; with `force` a checkpoint held back is promoted first."""
        if self.force and self.checkpoints.held(kind, number):
            return self.checkpoints.release(kind, number)
        return self.checkpoints.current(kind, number)

    async def _fit(
        self,
        number: int,
        kind: Kind,
        base: Path,
        config: PolicyTrainConfig | PreferenceTrainConfig,
        previous: Checkpoint | None = None,
    ) -> Checkpoint:
        """Train, and end and record the stage that was begun for it."""
        request = FitRequest(
            fit_id=f"round={number}/{kind}",
            kind=kind,
            round=number,
            base=str(base),
            data=str(self.folder.dataset(number)),
            checkpoints=str(self.folder.checkpoints),
            config=config,
            seed=derive_seed(self.config.seed, "fit", number, kind),
            previous=previous.path if previous is not None else None,
            force=self.force,
        )
        loop = asyncio.get_running_loop()

        def show(progress: FitProgress) -> None:
            loop.call_soon_threadsafe(
                self.view.update, progress.step, progress.num_steps, progress.facts()
            )

        result = await self.fleet.fit(request, show)
        for warning in result.warnings:
            self.view.note(f"round {number}, {kind}: {warning}")
        if result.held is not None:
            self.view.note(
                f"round {number}, {kind}: held back, the checkpoint before stays in service: "
                f"{result.held}; --force promotes it"
            )
        accuracy = result.metrics.get("pair_accuracy")
        shown = "" if accuracy is None else f", pair accuracy {100 * accuracy:.1f} %"
        seconds = self.view.end(
            f"{result.examples} examples, {result.steps} steps, loss {result.final_loss:.3f}, "
            f"{result.tokens_per_s:,.0f} tokens/s{shown}"
        )
        self.folder.record_stage(
            number,
            f"train_{kind}",
            seconds,
            **result.as_record(),
            padded_tokens=result.computed_tokens,
            tokens_per_s=result.tokens_per_s,
        )
        return result.checkpoint

    async def _ruler(self, number: int, policy: Checkpoint, ppm: Checkpoint) -> None:
        """What the round's PPM ranks right of problems held out for pairs."""
        name = self.folder.ruler_name(number)
        record = self.folder.read(name)
        decided = TrajectoryStore(self.store, number + 1).manifest() is not None
        if decided or (record is not None and record["ppm"] == ppm.version):
            self._skip(number, "ruler", "ruler")
            return
        self.view.begin("ruler", f"round {number}: ruler", round=number)
        began_s = time.monotonic()
        await self.fleet.serve_policy(self.base_model, policy)
        await self.fleet.serve_preference(ppm)
        serving_s = time.monotonic() - began_s
        record, outcome = await measure(
            self.fleet,
            self.pair_problems,
            self.folder.dataset(number),
            config=self.config.evaluation,
            search=self.config.search.trained(),
            recipe=recipe_of(self.config.dataset, self.config.search.training_template),
            round=number,
            policy=policy,
            ppm=ppm,
            on_progress=self.view.update,
        )
        self.fleet.meter.tell_ruler(record)
        self.folder.write(name, record)
        own = record["rankings"].get("ppm")
        told = "no pairs" if own is None else f"pair accuracy {100 * own['mean']:.1f} %"
        seconds = self.view.end(
            f"{told}, {record['num_pairs']} pairs of {record['num_problems']} of "
            f"{record['num_searched']} {record['source'].replace('pairs', 'problems')}"
        )
        if record["why"]:
            self.view.note(f"round {number}: the PPM steers no search: {record['why']}")
        if outcome is not None:
            self._tell(outcome.loss_lines())
        facts = outcome.facts() if outcome is not None else {}
        self.folder.record_stage(number, "ruler", seconds, **facts, serving_s=serving_s)

    async def _evaluate(
        self, number: int, policy: Checkpoint | None, ppm: Checkpoint | None
    ) -> None:
        """Held-out accuracy of the round's models."""
        name = self.folder.evaluation_name(number)
        if not self.test or self.folder.read(name) is not None:
            self._skip(number, "evaluate", "evaluate")
            return
        self.view.begin(
            "evaluate",
            f"round {number}: evaluate" if number else "evaluate",
            round=number or None,
        )
        began_s = time.monotonic()
        await self.fleet.serve_policy(self.base_model, policy)
        if ppm is not None:
            await self.fleet.serve_preference(ppm)
        serving_s = time.monotonic() - began_s
        evaluation, outcome = await evaluate(
            self.fleet,
            self.test,
            config=self.config.evaluation,
            search=self.config.search.trained(),
            round=number,
            seed=self.config.seed,
            preference=ppm is not None,
            on_progress=self.view.update,
        )
        self._tell(outcome.loss_lines())
        self._tell(set_aside_lines({number: evaluation.failures}))
        self.folder.write(name, evaluation.as_record())
        greedy = evaluation.shares("greedy")
        assert greedy is not None
        seconds = self.view.end(f"greedy pass@1 {100 * (greedy['all'] or 0.0):.1f} %")
        self.folder.record_stage(
            number, "evaluate", seconds, **outcome.facts(), serving_s=serving_s
        )
        await self._remove_orphans(evaluation_of(number))


def _new_problems(found: list[Problem], path: Path, seen: dict[str, Path]) -> list[Problem]:
    for problem in found:
        if problem.id in seen:
            raise ValueError(
                f"{path}: id {problem.id!r} already stands in {seen[problem.id]}; "
                "ids must be unique over all files"
            )
        seen[problem.id] = path
    return found
