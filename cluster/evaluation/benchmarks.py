"""`rstar evaluate`: methods and budgets on benchmarks, on the same cluster as a rollout.

    problem files --> jobs --> workers: Solver --> trees --> OUT/trajectories/round=ARM/
                      (one arm after the other: greedy, samples, beam, mcts)
    trees --> answers.parquet --> results.parquet --> evaluation.json, .md, report.html, plots

An arm is a round of an ordinary run: jobs are leased, trees committed exactly once, and what
is committed stays when the run is stopped; run again, it goes on. Solutions are made once, for the
largest budget, and shared by every method and budget that chooses among them. A trajectory of beam
search or MCTS is a job of its own, so that no problem waits for another one's trajectories.

What is asked:
    steps   our prompt: programs in steps, executed, then the answer (all methods)
    chat    the chat template of the model's tokenizer: a plain chain of thought (greedy, majority)
    plain   question and answer, for a base model without either

Not covered: completions endpoints as the policy; several seeds of one evaluation (run it again with
another --set seed= and --out).
"""

from __future__ import annotations

import asyncio
import difflib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.engines.model_check import check_policy_checkpoint, check_preference_checkpoint
from cluster.evaluation.config import EvaluateConfig
from cluster.evaluation.results import (
    ANSWER_SCHEMA,
    ARM_OF,
    COLUMNS,
    RESULT_SCHEMA,
    Arm,
    ProblemAttempts,
    Result,
    Scoring,
    answer_rows,
    read_attempts,
    reliability_bins,
    result_rows,
    score_problem,
    summarise,
)
from cluster.fleet.fleet import Fleet, RolloutOutcome, RolloutStage
from cluster.fleet.given_models import (
    given_checkpoint,
    serve_given,
    with_checkpoint_directories,
    with_prompt_template,
)
from cluster.fleet.session import Session
from cluster.folder.config_file import ConfigError, make_config, read_yaml
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.telemetry.progress import ProgressView
from learner.checkpoint import CheckpointStore
from rollout.methods import Method, MethodConfig
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.problems.rows import SUFFIXES
from rollout.prompt import MARKERS
from rollout.solution_tree import of_trajectory, search_of
from rollout.store import RunStore, TrajectoryStore
from verifier.comparable import is_comparable
from verifier.verify import start_symbolic_worker

RUN_SECTIONS = ("seed", "cluster", "policy_engine", "ppm_engine", "sandbox", "search", "cost")
"""What a run's config tells about serving its models."""

ANSWERS, RESULTS, REPORT = "answers.parquet", "results.parquet", "evaluation.json"

SUBSET_SHARE = 0.5
"""From this share of common statements on, the smaller of two benchmarks is called a part of the
other."""

# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line of `rstar evaluate`."""

    what: Path | None = None
    """A run, or a policy's directory."""
    policy: Path | None = None
    ppm: Path | None = None
    round: int | None = None
    """Of a run; None: its last with both models."""
    benchmarks: Sequence[str] = ()
    """Names of files in `data`, or paths."""
    data: Path | None = None
    methods: Sequence[str] = ()
    trajectories: Sequence[int] = ()
    limit: int | None = None
    out: Path | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()


def ask(*, benchmarks: str, methods: str, trajectories: str, **given: Any) -> Asked:
    """The command line with its lists taken apart.

    Raises:
        ConfigError: a budget is no whole number.
    """
    budgets = []
    for word in _listed(trajectories):
        if not word.isdigit() or not int(word):
            raise ConfigError(f"--trajectories {word!r}: expected whole numbers, as 1,2,4,8")
        budgets.append(int(word))
    return Asked(
        benchmarks=_listed(benchmarks),
        methods=_listed(methods),
        trajectories=budgets,
        **given,
    )


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def evaluate_config(asked: Asked) -> EvaluateConfig:
    """The config of an evaluation; the later of run, config file, command line, --set wins.

    Raises:
        ConfigError, RunFolderError, CheckpointError: what is missing or wrong, named.
    """
    data: dict[str, Any] = {}
    policy, ppm, name = asked.policy, asked.ppm, "models"
    if asked.what is not None:
        name = asked.what.resolve().name
        if (asked.what / "config.json").is_file() or asked.what.parent.name.startswith("round="):
            if policy is not None:
                raise ConfigError(f"{asked.what} is a policy already: leave --policy out")
            policy = asked.what
        else:
            if policy is not None or ppm is not None:
                raise ConfigError("give a run, or --policy and --ppm, not both")
            policy, ppm = pair_of_run(asked.what, asked.round)
            data |= _settings_of_run(asked.what)
            name += f"-round{asked.round}" if asked.round is not None else ""
    elif policy is not None:
        name = policy.resolve().name
    if asked.config is not None:
        data |= read_yaml(asked.config)
    data |= {key: path for key, path in (("policy", policy), ("ppm", ppm)) if path is not None}
    if "policy" not in data:
        raise ConfigError("no policy: give a run, a model's directory, or --policy DIR")
    if asked.benchmarks or "benchmarks" not in data:
        data["benchmarks"] = find_benchmarks(asked.benchmarks, asked.data)
    given = {
        "methods": list(asked.methods),
        "trajectories": sorted(set(asked.trajectories)),
        "limit": asked.limit,
    }
    data |= {key: value for key, value in given.items() if value}
    data["run_dir"] = asked.out or data.get("run_dir") or Path("runs") / f"evaluate-{name}"
    source = str(asked.config or asked.what or "rstar evaluate")
    made = make_config(data, asked.overrides, kind=EvaluateConfig, source=source)
    made = with_checkpoint_directories(made)
    missing = [m for m in made.methods if m.needs_preference and made.ppm is None]
    if missing:
        raise ConfigError(
            f"method {missing[0]} needs a PPM: give --ppm DIR, or choose another --method"
        )
    return made


def pair_of_run(run: Path, round: int | None) -> tuple[Path, Path | None]:
    """Policy and PPM of one round of a run; of round 0, and before any PPM, the policy alone.

    Raises:
        RunFolderError: there is no such run, or no such round; says which there are.
    """
    store = CheckpointStore(RunFolder(run).checkpoints)
    if round is None:
        latest = store.latest("ppm") or store.latest("policy")
        if latest is None:
            what = "no checkpoints" if run.is_dir() else "no such folder"
            raise RunFolderError(f"{run}: {what}; expected a run, or a model's directory")
        round = latest.round
    policy, ppm = store.current("policy", round), store.current("ppm", round)
    if policy is None:
        there = [r for r in range(100) if store.current("policy", r) is not None]
        raise RunFolderError(
            f"{run}: no policy of round {round}; there are rounds {', '.join(map(str, there))}"
        )
    return Path(policy.path), Path(ppm.path) if ppm is not None else None


def _settings_of_run(run: Path) -> dict[str, Any]:
    """Serving settings of a run, and those its own evaluation uses the methods with."""
    stored = read_yaml(run / "config.yaml")
    settings = {name: stored[name] for name in RUN_SECTIONS if name in stored}
    evaluation = stored.get("evaluation") or {}
    for name in ("max_solution_tokens", "vote_top_k"):
        if name in evaluation:
            settings[name] = evaluation[name]
    if "num_candidates" in evaluation and "search" in settings:
        settings["search"]["num_candidates"] = evaluation["num_candidates"]
    return settings


def find_benchmarks(names: Sequence[str], data: Path | None) -> list[Path]:
    """The problem files that are meant: paths, or names in a folder; all of the folder if none.

    Raises:
        ConfigError: no such file (with the nearest name), or nothing was named at all.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder")
    there = sorted(data.iterdir()) if data is not None else []
    known = {path.stem: path for path in there if path.suffix in SUFFIXES}
    if not names:
        raise ConfigError(
            "no benchmark: give --benchmarks NAME,... with --data DIR, or paths of problem files"
            + (f"; in {data}: {', '.join(known)}" if known else "")
        )
    found = []
    for name in names:
        path = Path(name)
        if path.suffix in SUFFIXES and path.is_file():
            found.append(path)
        elif name in known:
            found.append(known[name])
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = f"; in {data}: {', '.join(known)}" if known else "; give its folder by --data"
            raise ConfigError(f"benchmark {name!r}: no such file{hint or listed}")
    stems = Counter(path.stem for path in found)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise ConfigError(f"two benchmarks are called {twice[0]!r}; each file needs its own name")
    return found


# -------------------------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One problem file, as it was read."""

    name: str
    file: str
    num_rows: int
    num_problems: int
    """That are evaluated."""
    skipped: Mapping[str, int]
    """Rows left out, by reason."""
    num_repeated: int
    """Problems whose statement stands in the file before."""
    num_sentences: int
    """Answers that are sentences: equal to the same text only, so hardly ever found."""


def read_benchmark(
    path: Path, config: EvaluateConfig
) -> tuple[list[Problem], Benchmark, list[str]]:
    """The problems of a file, with ids that no other file has; what it is; lines for people.

    Raises:
        ProblemFileError: it cannot be used.
    """
    problems, report = read_problems(path, default_level=config.default_level)
    problems = [
        replace(problem, id=f"{path.stem}:{problem.id}", source=path.stem)
        for problem in problems[: config.limit]
    ]
    texts = Counter(_words(problem) for problem in problems)
    about = Benchmark(
        name=path.stem,
        file=str(path),
        num_rows=report.num_rows,
        num_problems=len(problems),
        skipped=dict(report.skipped),
        num_repeated=sum(count - 1 for count in texts.values()),
        num_sentences=sum(not any(map(is_comparable, p.golds)) for p in problems),
    )
    return problems, about, report.lines()


def overlaps(problems: Mapping[str, Sequence[Problem]]) -> list[str]:
    """A warning for each two benchmarks of which one is largely a part of the other."""
    texts = {name: {_words(problem) for problem in some} for name, some in problems.items()}
    names = sorted(texts, key=lambda name: len(texts[name]))
    warnings = []
    for position, small in enumerate(names):
        for large in names[position + 1 :]:
            common = len(texts[small] & texts[large])
            if common >= SUBSET_SHARE * len(texts[small]):
                warnings.append(
                    f"{common} of {len(texts[small])} problems of {small} stand in {large} too: "
                    "do not report them as two samples"
                )
    return warnings


def _words(problem: Problem) -> str:
    return " ".join(problem.text.split())


# ---------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How the policy is asked."""

    kind: str
    """steps | chat | plain"""
    text: str | None
    """With `{question}`; None for steps."""


def choose_prompting(config: EvaluateConfig, tokenizer: Any) -> Prompting:
    """The prompt of `config.prompt`, for "auto" what the tokenizer suggests.

    Raises:
        ConfigError: chat is asked of a tokenizer without a chat template.
    """
    kind = config.prompt
    if kind == "auto":
        taught = all(len(tokenizer(m, add_special_tokens=False).input_ids) == 1 for m in MARKERS)
        kind = "steps" if taught else "chat" if tokenizer.chat_template else "plain"
    if kind == "steps":
        return Prompting(kind=kind, text=None)
    if kind == "plain":
        return Prompting(kind=kind, text=f"Question: {{question}}\n{config.instruction}\nAnswer:")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{config.policy}: prompt chat, but its tokenizer has no chat template; choose "
            "--set prompt=plain or prompt=steps"
        )
    turn = {"role": "user", "content": f"{{question}}\n{config.instruction}"}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    if "{question}" not in text:
        raise ConfigError(f"{config.policy}: its chat template does not keep the question's text")
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("x").input_ids[0] == tokenizer.bos_token_id:
        text = text.removeprefix(begin)  # the tokenizer puts it there itself
    return Prompting(kind=kind, text=text)


# --------------------------------------------------------------------------------- the run


class EvaluationRun:
    """One evaluation, from its config to its report."""

    def __init__(self, config: EvaluateConfig, view: ProgressView) -> None:
        self.config = config
        self.view = view
        self.folder = RunFolder(config.run_dir)
        self.problems: list[Problem] = []
        self.benchmarks: list[Benchmark] = []
        self.warnings: list[str] = []
        self.prompting = Prompting(kind="steps", text=None)

    @property
    def arms(self) -> list[Arm]:
        return sorted({ARM_OF[m] for m in self.config.methods}, key=lambda arm: arm.round)

    @property
    def width(self) -> int:
        """Trajectories of one beam search."""
        return min(self.config.beam_width, max(self.config.trajectories))

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

        check_policy_checkpoint(self.config.policy, markers=())
        tokenizer = AutoTokenizer.from_pretrained(self.config.policy, local_files_only=True)
        self.prompting = choose_prompting(self.config, tokenizer)
        config = self.config
        if self.prompting.kind == "steps":
            check_policy_checkpoint(config.policy)
            config = with_prompt_template(config)
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
            check_preference_checkpoint(config.ppm)
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
            missed = [k for k in config.trajectories if k % self.width]
            if missed:
                self.warnings.append(
                    f"beam has no budget of {', '.join(map(str, missed))}: a beam of "
                    f"{self.width} finishes {self.width} solutions"
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
            method=method,
            prompt=self.prompting.text,
        )
        self.view.begin("rollout", f"{arm}: {len(self.problems):,} problems", len(jobs))
        began_s = time.monotonic()
        name = _arm_record(arm)
        before = (self.folder.read(name) or {}).get("seconds", 0.0)
        outcome: RolloutOutcome | None = None
        try:
            outcome = await fleet.rollout(
                arm.round, jobs, [stage], preference=guided, on_progress=self.view.update
            )
        finally:
            seconds = before + time.monotonic() - began_s
            facts = outcome.facts() if outcome is not None else {}
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
        count = largest // self.width if arm is Arm.BEAM else largest
        return [of_trajectory(p, number) for number in range(count) for p in self.problems]

    def method(self, arm: Arm) -> MethodConfig:
        """What one job of an arm does."""
        config = self.config
        name = {Arm.GREEDY: Method.GREEDY, Arm.BEAM: Method.BEAM, Arm.MCTS: Method.MCTS}.get(arm)
        if name is None:  # valued samples serve majority as well
            name = Method.BEST_OF_N if config.ppm is not None else Method.MAJORITY
        count = {Arm.SAMPLES: max(config.trajectories), Arm.BEAM: self.width}.get(arm, 1)
        return MethodConfig(
            name=name,
            num_trajectories=count,
            top_k=config.vote_top_k,
            max_solution_tokens=config.max_solution_tokens,
            beam_width=self.width,
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

        results, arms = await asyncio.to_thread(self._score, store, tell)
        summaries = summarise(results, seed=self.config.seed)
        _write_rows(self.folder.root / RESULTS, result_rows(results), RESULT_SCHEMA)
        report = {
            "kind": "evaluation",
            "name": self.folder.root.name,
            "models": self._models(),
            "prompt": self.prompting.kind,
            "vote_top_k": self.config.vote_top_k,
            "benchmarks": [asdict(benchmark) for benchmark in self.benchmarks],
            "warnings": self.warnings,
            "arms": arms,
            "summaries": [asdict(summary) for summary in summaries],
            "seconds_total": round(seconds_total, 1),
            "config": self.config.effective(),
            "versions": versions(),
            "hardware": hardware(),
        }
        self.folder.write(REPORT, report)
        self.view.end(f"{len(results):,} results")
        return report

    def _score(
        self, store: RunStore, on_done: Callable[[int, int], None]
    ) -> tuple[list[Result], dict[str, Any]]:
        """Results of all arms, and facts of each; writes answers.parquet on the way."""
        results: list[Result] = []
        facts: dict[str, Any] = {}
        temporary = self.folder.root / f".{ANSWERS}"
        total = len(self.arms) * len(self.problems)
        done = 0
        with pq.ParquetWriter(temporary, ANSWER_SCHEMA, compression="zstd") as writer:
            for arm in self.arms:
                trees = TrajectoryStore(store, arm.round)
                found = read_attempts(trees.tables(COLUMNS), arm, width=self.width)
                rows = list(answer_rows(self.problems, arm, found))
                writer.write_table(pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA))
                scoring, facts[arm.value] = self._scoring(arm, trees, found)
                for problem in self.problems:
                    results += score_problem(problem, found.get(problem.id), scoring)
                    done += 1
                    if done % 200 == 0:
                        on_done(done, total)
        temporary.replace(self.folder.root / ANSWERS)
        return results, facts

    def _scoring(
        self, arm: Arm, trees: TrajectoryStore, found: Mapping[str, ProblemAttempts]
    ) -> tuple[Scoring, dict[str, Any]]:
        manifest = trees.manifest()
        assert manifest is not None
        record = self.folder.read(_arm_record(arm)) or {}
        tokens = manifest.totals.generated_tokens
        gpu_seconds = record.get("seconds", 0.0) * record.get("gpus", 0.0)
        largest = max(self.config.trajectories)
        num_made = {Arm.GREEDY: 1, Arm.BEAM: largest // self.width * self.width}
        scoring = Scoring(
            arm=arm,
            methods=tuple(m for m in self.config.methods if ARM_OF[m] is arm),
            budgets=tuple(self.config.trajectories),
            top_k=self.config.vote_top_k,
            width=self.width if arm is Arm.BEAM else 1,
            num_made=num_made.get(arm, largest),
            gpu_seconds_per_token=gpu_seconds / tokens if gpu_seconds and tokens else None,
            seed=self.config.seed,
        )
        attempts = [a for of_problem in found.values() for a in of_problem.attempts]
        facts = {
            "problems": len(self.problems),
            "answered_problems": sum(
                any(a.answer is not None for a in f.attempts) for f in found.values()
            ),
            "solutions": len(attempts),
            "failures": dict(
                Counter(a.failure.value for a in attempts if a.failure is not None).most_common()
            ),
            "undecided": sum(a.verdict in ("undecided", "limit") for a in attempts),
            "quarantined": dict(manifest.failed),
            "lost": record.get("lost"),
            "doubled": record.get("doubled"),
            "deaths": record.get("deaths", {}),
            "seconds": round(record.get("seconds", 0.0), 2),
            "gpus": record.get("gpus", 0.0),
            "reliability": reliability_bins(found.values()),
            "generated_tokens": tokens,
            "scored_tokens": manifest.totals.scored_tokens,
        }
        return scoring, facts

    def _models(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in ("policy", "ppm"):
            path = getattr(self.config, kind)
            if path is not None:
                version = given_checkpoint(kind, path).version
                found[kind] = {"path": str(path), "version": version}
        return found


def _arm_record(arm: Arm) -> str:
    return f"stages/{arm.value}.json"


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(sink.getvalue())
    temporary.replace(path)


def read_evaluation(root: Path) -> dict[str, Any]:
    """The report of a finished evaluation.

    Raises:
        RunFolderError: there is none, or it cannot be read.
    """
    path = root / REPORT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"{path}: no such file; expected the folder of a finished `rstar evaluate`"
        ) from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error
