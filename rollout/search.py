"""Monte Carlo tree search over code-augmented steps, for one problem.

    rollout: root -- select (UCT) --> leaf -- expand --> ... --> terminal -- backup --> root

    expand:  policy: n candidates in one request
             -> parse, merge equal ones     -> sandbox: run each new code on its parent's state
             -> verifier: grade answers     -> PPM: one value per valid candidate (rounds 3-4)

There is no simulation phase: a rollout is one root-to-terminal path built step by step. Each search
is a coroutine that awaits the engines; thousands run on one event loop and none waits for another.
The search reads no clock of its own and draws every seed from the tree's (`derive_seed`).

What an expansion finds out is gathered beside the tree and becomes part of it in one go, without an
await, and so does a backup. So a search may be interrupted anywhere, by a failing engine or by a
cancellation, and goes on from its tree (`run_search(resume=...)`) to the very tree it would have
become; only an expansion in progress is done again, with the same seed.

Several rollouts of one tree may run at a time (`parallel_rollouts`). They go in step: each walks to
its leaf, those before it counting as visits that ended in -1 (virtual loss), all leaves are
expanded at once, then each walks on; their rewards are backed up when the last has ended. That
costs a wait for the slowest of them, and keeps the tree a function of seed and engines alone.

Deviations from arXiv 2501.04519, which leaves these open:
- a child that no rollout went through is worth its PPM value, else 0, without exploration term;
- a visited terminal is not selected again, so a search ends early when the tree is exhausted;
- a failure (too deep, no valid child) backs up -1 along its path (`failure_backup="path"`).
From the released code, with the preset "released":
- code ends a branch at its first error (there: the second one in a row, in round 1);
- a step without an end marker is no step (there: it is run as code, and mostly fails);
- a path of `max_depth` steps without an answer is a failure (there: it stays open, never visited).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.engine import (
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
    values_of,
)
from rollout.problem import Problem
from rollout.prompt import (
    ANSWER,
    BOOTSTRAP_TEMPLATE,
    CODE,
    TEMPLATES,
    PromptTemplate,
    Step,
    StepKind,
    read_completion,
    render_question,
    render_steps,
    training_template,
)
from rollout.repetition import ends_in_repetition
from rollout.seeds import derive_seed
from rollout.selection import Unvisited, select_child
from rollout.tasks import all_of
from rollout.tree import Discard, Node, Terminal, Tree, backup, expand, is_answer
from rollout.worked_examples import WorkedExamples
from verifier import GRADER_VERSION, SandboxError, Verdict, verify_answer
from verifier.accuracy import answer_groups
from verifier.equivalence import Reason
from verifier.sandbox import INFRASTRUCTURE_STATUSES, StepResult

MAX_REOPENINGS = 3
"""How often a search starts its interpreters anew because the sandbox lost them."""


class TerminalValue(StrEnum):
    """What an answer's backup is."""

    LABEL = "label"
    """+1 or -1 from the verifier: data generation."""
    PREFERENCE = "preference"
    """The PPM's value: test time, where no label exists."""


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "num_answer_candidates": None,
        "unvisited": Unvisited.ZERO,
        "invalid_candidates": "leaf",
        "answer_candidates": "first",
        "failure_backup": "leaf",
    },
}


class SearchConfig(BaseModel):
    """Everything that shapes a search; defaults follow the paper (rounds 2-3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["paper", "released"] = Field(
        "paper",
        description="rules where the two differ, unless given themselves: unvisited, "
        "num_answer_candidates, invalid_candidates, answer_candidates, failure_backup; released: "
        "of microsoft/rStar",
    )
    num_candidates: int = Field(8, ge=1, description="candidates per expansion, n")
    num_answer_candidates: int | None = Field(
        1,
        ge=1,
        description="candidates where only the answer can follow (it repeats an output, so they "
        "hardly differ); null: num_candidates",
    )
    num_rollouts: int = Field(16, ge=1, description="root-to-terminal descents per tree")
    parallel_rollouts: int = Field(
        1, ge=1, description="descents of one tree at a time, kept apart by virtual loss"
    )
    max_depth: int = Field(16, ge=1, description="steps on a path, the answer included")
    exploration: float = Field(2.0, ge=0, description="c of UCT (Eq. 1)")
    temperature: float = Field(1.0, ge=0, description="sampling temperature of the policy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling mass")
    max_step_tokens: int = Field(2048, ge=1, description="generated tokens per candidate")
    max_repeats: int | None = Field(
        8,
        ge=2,
        description="a candidate that ends in so many equal passages is discarded as "
        "repetitive; null: none is",
    )
    max_generated_tokens: int | None = Field(
        None, ge=1, description="no rollout starts beyond this many tokens; null: no budget"
    )
    template: Literal["rstar", "short", "bootstrap"] = Field(
        "rstar", description="prompt template; bootstrap: examples for a model never fine-tuned"
    )
    bootstrap: WorkedExamples | None = Field(
        None,
        description="instructions and worked examples of template bootstrap, or a YAML file with "
        "them; null: those that are shipped",
    )
    unvisited: Unvisited = Field(
        Unvisited.FIRST_PLAY,
        description="worth in UCT of a child no rollout went through: first_play (its PPM value, "
        "else 0), zero (released: 0, but a PPM value counts as a visit) or infinite",
    )
    invalid_candidates: Literal["discard", "leaf"] = Field(
        "discard", description="failing code: discard (paper) or keep as a -1 leaf (released)"
    )
    answer_candidates: Literal["all", "first"] = Field(
        "all", description="distinct answers of one expansion: all, or only the first (released)"
    )
    failure_backup: Literal["path", "leaf"] = Field(
        "path", description="whether ancestors learn of a failure; leaf is the released rule"
    )
    terminal_value: TerminalValue = Field(
        TerminalValue.LABEL, description="label (data generation) or preference (test time)"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**_PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    @model_validator(mode="after")
    def _rules_fit(self) -> SearchConfig:
        if self.invalid_candidates == "leaf" and self.failure_backup == "path":
            raise ValueError(
                "invalid_candidates: leaf needs failure_backup: leaf, as in preset: released: no "
                "rollout goes through failing code, so there is no path to tell"
            )
        if self.answer_candidates == "first" and (self.num_answer_candidates or 1) > 1:
            raise ValueError(
                f"answer_candidates: first keeps one of num_answer_candidates: "
                f"{self.num_answer_candidates}; give 1, or null for num_candidates (released)"
            )
        if self.temperature == 0 and self.num_candidates > 1:
            raise ValueError(
                f"temperature: 0 makes all num_candidates: {self.num_candidates} the same; give 1 "
                "candidate or a temperature above 0"
            )
        return self

    @field_validator("bootstrap", mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        # What stands in the file goes on with the config: no other machine needs to read it.
        if not isinstance(given, str | Path):
            return given
        try:
            return yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"cannot be read: {error}") from error

    @property
    def prompt_template(self) -> PromptTemplate:
        """What the policy continues."""
        if self.template == BOOTSTRAP_TEMPLATE.name and self.bootstrap is not None:
            return self.bootstrap.template()
        return TEMPLATES[self.template]

    def trained(self) -> SearchConfig:
        """The same search for a model that was fine-tuned on what this one finds."""
        return self.model_copy(update={"template": self.training_template.name})

    @property
    def training_template(self) -> PromptTemplate:
        """What the search's steps are trained, and valued by a PPM, under."""
        return training_template(self.prompt_template)

    def at_test_time(self, num_rollouts: int, *, guided: bool) -> SearchConfig:
        """The same search where no label may be seen; to be run with `grade=None`.

        Args:
            num_rollouts: of the tree.
            guided: there is a PPM, whose values are backed up; without one every answer's backup
                is the same.
        """
        value = TerminalValue.PREFERENCE if guided else TerminalValue.LABEL
        return self.model_copy(update={"num_rollouts": num_rollouts, "terminal_value": value})


class StepSandbox(Protocol):
    """Where step code runs: a tree of interpreter states per search."""

    async def open(self, tree_id: str) -> str:
        """Start a tree; returns the id of its root state."""
        ...

    async def run(self, state: str, codes: Sequence[str]) -> Sequence[StepResult]:
        """Run sibling codes, each on its own copy of `state`; order kept."""
        ...

    async def close(self, tree_id: str) -> None:
        """Free every state of the tree; harmless if it is not open."""
        ...


class SearchError(RuntimeError):
    """A search could not go on because a part of the system failed; it may be run again."""


Grade = Callable[[str, str], Verdict]


def grade_any(problem: Problem, answer: str, grade: Grade = verify_answer) -> Verdict | None:
    """The first accepting verdict over the problem's accepted answers, else the last one.

    None if the problem has no accepted answer to compare with.
    """
    verdict: Verdict | None = None
    for gold in problem.golds:
        verdict = grade(gold, answer)
        if verdict.equal:
            break
    return verdict


async def run_codes(
    sandbox: StepSandbox, state: str, codes: Sequence[str], *, problem_id: str
) -> Sequence[StepResult]:
    """Run sibling codes after `state`; order kept.

    Raises:
        SearchError: the sandbox failed on one of them.
    """
    results = await sandbox.run(state, codes)
    for result in results:
        if result.status in INFRASTRUCTURE_STATUSES:
            raise SearchError(
                f"sandbox failed on problem {problem_id}: {result.status} {result.error_message}"
            )
    return results


def discard_reason(step: Step, previous: Step | None, max_repeats: int | None) -> Discard | None:
    """Why a step cannot follow `previous` (None: the question); None if it can.

    Args:
        max_repeats: of equal passages at its end; None: any number.
    """
    if max_repeats is not None and ends_in_repetition(step.body, max_repeats):
        return Discard.REPETITIVE
    if step.kind is StepKind.UNFINISHED:
        return Discard.UNFINISHED
    if step.kind is StepKind.ANSWER:
        if not step.text.startswith(ANSWER):
            return Discard.OUT_OF_PLACE
        return None if step.answer else Discard.NO_ANSWER
    if only_answer_follows(previous):
        return Discard.OUT_OF_PLACE
    if previous is None and not step.text.startswith(CODE):
        return Discard.OUT_OF_PLACE
    return None if step.code.strip() else Discard.EMPTY


async def same_answers(answers: Sequence[str]) -> list[list[int]]:
    """Places of answers that say the same, in order of first appearance.

    Comparing anything but plain numbers may take a second and wait for another process, so that is
    done off the event loop.
    """
    if all(_PLAIN_NUMBER.fullmatch(answer) for answer in answers):
        return answer_groups(answers)
    return await asyncio.to_thread(answer_groups, answers)


def only_answer_follows(step: Step | None) -> bool:
    """True if the code is closed by `step`."""
    return step is not None and step.kind is StepKind.LAST_CODE


async def run_search(
    problem: Problem,
    *,
    config: SearchConfig,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
    round: int,
    index: int = 0,
    seed: int,
    grade: Grade | None = verify_answer,
    clock: Callable[[], float] | None = None,
    resume: Tree | None = None,
) -> Tree:
    """Search one problem and return its tree.

    Args:
        preference: the PPM; None means terminal-guided search (rounds 1-2).
        round, index: of the tree, recorded and part of its sandbox id.
        seed: of this tree; the same seed and deterministic engines give the same tree.
        grade: called on the event loop for plain numbers, else in a thread. None withholds the
            label, as at test time: no answer has a verdict.
        clock: seconds, for the tree's timings; None leaves them 0.
        resume: a tree to go on with, in place: of a search that was interrupted or is to get more
            rollouts, or a new `Tree` that the caller wants to hold while it grows. Interpreter
            states are made again by running the code of the paths that are gone on with.
    Raises:
        ValueError: `terminal_value` is "preference" and there is no PPM, or `resume` is of another
            problem, round, index, seed or grader.
        EngineError, SandboxError, SearchError: a part failed; nothing of the problem is at fault,
            and `resume` holds what was found before.
    """
    if config.terminal_value is TerminalValue.PREFERENCE and preference is None:
        raise ValueError('terminal_value="preference" needs a process preference model')
    tree = resume or Tree(problem=problem, round=round, index=index, seed=seed)
    _check_same(tree, problem, round, index, seed)
    tree.grader_version = GRADER_VERSION
    tree.search_config = _as_json(config)
    tree.note = ""
    now = clock or (lambda: 0.0)
    began_s = now()
    interpreters = _Interpreters(tree, sandbox)
    await interpreters.open()
    try:
        search = _Search(tree, config, policy, preference, interpreters, grade, now)
        await search.run()
    finally:
        tree.seconds += now() - began_s
        await interpreters.close()
    return tree


def _check_same(tree: Tree, problem: Problem, round: int, index: int, seed: int) -> None:
    found = (tree.problem.id, tree.round, tree.index, tree.seed)
    asked = (problem.id, round, index, seed)
    if found != asked:
        raise ValueError(
            f"the tree to go on with has (problem, round, index, seed) = {found}, asked: {asked}"
        )
    if tree.grader_version not in ("", GRADER_VERSION):
        raise ValueError(
            f"the tree of problem {problem.id} was graded by {tree.grader_version!r}, this is "
            f"{GRADER_VERSION!r}: its verdicts cannot be mixed with new ones"
        )


@lru_cache(maxsize=64)
def _as_json(config: SearchConfig) -> str:
    """One string for all trees of a config."""
    return config.model_dump_json()


class _Interpreters:
    """The interpreter states of one tree, rebuilt where they are missing.

    A state is missing in a tree that is gone on with, and after the sandbox lost it: then the tree
    is opened again. Both are made up by running the code of the path, whose output must be the
    recorded one.
    """

    def __init__(self, tree: Tree, sandbox: StepSandbox) -> None:
        self.tree = tree
        self.sandbox = sandbox
        self.tree_id = f"r{tree.round}/{tree.problem.id}/{tree.index}/{tree.seed}"
        self._states: dict[int, str] = {}
        self._openings = 0
        self._reopening = asyncio.Lock()

    async def open(self) -> None:
        self._states = {0: await self.sandbox.open(self.tree_id)}
        self._openings += 1

    async def close(self) -> None:
        await self.sandbox.close(self.tree_id)

    def keep(self, parent: Node, states: Sequence[tuple[Node, str]], opening: int) -> None:
        """Remember the states after a node's children; its own is not asked for again."""
        if opening != self._openings:
            return  # other rollouts had the tree opened again meanwhile
        for child, state in states:
            self._states[child.id] = state
        if parent.parent >= 0:
            self._states.pop(parent.id, None)

    async def run(self, node: Node, codes: Sequence[str]) -> tuple[Sequence[StepResult], int]:
        """Run sibling codes after `node`; also returns which opening of the tree they ran in.

        Raises:
            EngineError, SandboxError: the sandbox keeps failing.
            SearchError: it failed on a code, or a path that ran again printed something else.
        """
        while True:
            states, opening = self._states, self._openings
            try:
                return await self._run(await self._state(node, states), codes), opening
            except (EngineError, SandboxError):
                async with self._reopening:
                    if self._openings == opening:
                        if opening > MAX_REOPENINGS:
                            raise
                        await self.close()
                        await self.open()

    async def _state(self, node: Node, states: dict[int, str]) -> str:
        missing: list[Node] = []
        while node.id not in states:
            missing.append(node)
            node = self.tree.nodes[node.parent]
        state = states[node.id]
        for step in reversed(missing):
            assert step.step is not None
            (result,) = await self._run(state, [step.step.code])
            if result.state is None or result.stdout != step.stdout:
                raise SearchError(
                    f"problem {self.tree.problem.id}: the code of node {step.id} ran again and "
                    f"ended {result.status} with {result.stdout[:80]!r}, before "
                    f"{step.execution_status} with {step.stdout[:80]!r}"
                )
            state = states[step.id] = result.state
        return state

    async def _run(self, state: str, codes: Sequence[str]) -> Sequence[StepResult]:
        return await run_codes(self.sandbox, state, codes, problem_id=self.tree.problem.id)


@dataclass(slots=True, kw_only=True)
class _Expansion:
    """What is found out about a node, while it is not yet part of the tree."""

    node: Node
    generation: GenerationReply
    candidates: list[Node]
    terminal: Terminal | None = None
    """Why nothing can follow the node, known without candidates."""
    states: list[tuple[Node, str]]
    """Candidates that code may follow, and the interpreter state after each."""
    opening: int = 0
    """Which opening of the interpreters the states are of."""
    evaluation: EvaluationReply | None = None
    num_executions: int = 0
    generate_s: float = 0.0
    execute_s: float = 0.0
    grade_s: float = 0.0
    evaluate_s: float = 0.0


@dataclass
class _Search:
    """The moving parts of one `run_search` call."""

    tree: Tree
    config: SearchConfig
    policy: PolicyEngine
    preference: PreferenceEngine | None
    interpreters: _Interpreters
    grade: Grade | None
    now: Callable[[], float]

    def __post_init__(self) -> None:
        self.template = self.config.prompt_template
        self.question = render_question(self.tree.problem.text, self.template)
        trained = self.config.training_template
        self.valued_question = render_question(self.tree.problem.text, trained)
        self.verdicts: dict[str, Verdict | None] = {}

    async def run(self) -> None:
        """Go on until the tree's budget is spent or nothing is left to select."""
        tree, config = self.tree, self.config
        while tree.num_rollouts < config.num_rollouts:
            if tree.root.exhausted:
                long = tree.root.terminal is Terminal.PROMPT_TOO_LONG
                tree.note = "prompt too long" if long else "exhausted"
                return
            budget = config.max_generated_tokens
            # A rollout that was interrupted began within the budget.
            begun = tree.nodes[-1].rollout >= tree.num_rollouts
            if budget is not None and tree.generated_tokens >= budget and not begun:
                tree.note = "token budget"
                return
            await self._roll_out(
                min(config.parallel_rollouts, config.num_rollouts - tree.num_rollouts)
            )

    # -- one rollout, or several in step

    async def _roll_out(self, width: int) -> None:
        """Descend from the root to terminals, expanding on the way, and back up their rewards.

        A rollout that finds nothing to select ends without a reward: only failing leaves are left
        below (released rule), or every leaf is taken by another one.
        """
        pending: dict[int, int] | None = {} if width > 1 else None
        places: list[Node | None] = [self.tree.root] * width
        ended: list[Node] = []
        while True:
            leaves: dict[int, int] = {}
            for number, place in enumerate(places):
                leaf = self._descend(place, pending) if place is not None else None
                if leaf is not None and leaf.terminal is not None:
                    if not any(leaf is other for other in ended):
                        ended.append(leaf)
                    leaf = None
                places[number] = leaf
                if leaf is not None:
                    leaves.setdefault(leaf.id, self.tree.num_rollouts + number)
            if not leaves:
                break
            for expansion in await self._look_into(leaves):
                self._commit(expansion)
        for leaf in ended:
            self._back_up(leaf)
        self.tree.num_rollouts += width

    def _descend(self, node: Node, pending: dict[int, int] | None) -> Node | None:
        """Walk to a node that is terminal or not expanded; None: nothing is left on the way."""
        while node.expanded and node.terminal is None:
            child = select_child(
                self.tree,
                node,
                exploration=self.config.exploration,
                unvisited=self.config.unvisited,
                pending=pending,
            )
            if child is None:
                return None
            node = child
            if pending is not None:
                pending[node.id] = pending.get(node.id, 0) + 1
        return node

    async def _look_into(self, leaves: dict[int, int]) -> list[_Expansion]:
        expansions = [
            self._candidates_after(self.tree.nodes[leaf], rollout)
            for leaf, rollout in leaves.items()
        ]
        # A task for each is a cost that a lone rollout need not pay.
        return [await expansions[0]] if len(expansions) == 1 else await all_of(expansions)

    def _back_up(self, leaf: Node) -> None:
        failed = leaf.terminal is not Terminal.ANSWER
        reward = -1.0 if failed else self._answer_reward(leaf)
        backup(
            self.tree,
            leaf,
            reward,
            leaf_only=failed and self.config.failure_backup == "leaf",
        )

    def _answer_reward(self, leaf: Node) -> float:
        if self.config.terminal_value is TerminalValue.PREFERENCE:
            return leaf.value if leaf.value is not None else -1.0
        return 1.0 if leaf.correct else -1.0

    def _commit(self, expansion: _Expansion) -> None:
        """Make an expansion part of the tree."""
        tree, node = self.tree, expansion.node
        tree.num_requests += 1
        tree.policy_version = expansion.generation.policy_version
        tree.prompt_tokens += expansion.generation.prompt_tokens
        tree.cached_tokens += expansion.generation.cached_tokens
        tree.generated_tokens += sum(c.num_tokens for c in expansion.generation.completions)
        tree.num_executions += expansion.num_executions
        if expansion.evaluation is not None:
            tree.preference_version = expansion.evaluation.preference_version
            tree.scored_tokens += expansion.evaluation.num_tokens
        tree.generate_s += expansion.generate_s
        tree.execute_s += expansion.execute_s
        tree.grade_s += expansion.grade_s
        tree.evaluate_s += expansion.evaluate_s
        if expansion.terminal is not None:
            node.terminal = expansion.terminal
            return
        expand(tree, node, expansion.candidates)
        self.interpreters.keep(node, expansion.states, expansion.opening)
        if self.config.failure_backup == "leaf":
            for child in expansion.candidates:
                if child.terminal in (Terminal.CODE_ERROR, Terminal.TOO_DEEP):
                    backup(tree, child, -1.0, leaf_only=True)
        if not tree.valid_children(node):
            node.terminal = Terminal.NO_VALID_CHILD

    # -- the stages of an expansion

    async def _candidates_after(self, node: Node, rollout: int) -> _Expansion:
        """Generate, run, grade and value what may follow `node`; the tree stays as it is."""
        expansion = await self._generate(node, rollout)
        if expansion.terminal is None:
            await self._merge_answers(expansion)
            await self._execute(expansion)
            await self._grade_answers(expansion)
            await self._evaluate(expansion)
        return expansion

    async def _generate(self, node: Node, rollout: int) -> _Expansion:
        config, tree = self.config, self.tree
        num_candidates = config.num_candidates
        if config.num_answer_candidates is not None and only_answer_follows(node.step):
            num_candidates = config.num_answer_candidates
        request = GenerationRequest(
            prompt=self.question + render_steps(tree.steps(node)),
            num_candidates=num_candidates,
            max_tokens=config.max_step_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop=self.template.stop,
            seed=derive_seed(tree.seed, rollout, node.id),
            routing_key=tree.problem.id,
        )
        began_s = self.now()
        reply = await self.policy.generate(request)
        if not reply.completions:
            raise EngineError(
                f"the policy returned no completion of {num_candidates} asked for, problem "
                f"{tree.problem.id}"
            )
        expansion = _Expansion(
            node=node,
            generation=reply,
            candidates=[],
            states=[],
            generate_s=self.now() - began_s,
        )
        if all(c.finish is FinishReason.PROMPT_TOO_LONG for c in reply.completions):
            expansion.terminal = Terminal.PROMPT_TOO_LONG
        else:
            expansion.candidates = self._read(reply, node, rollout)
        return expansion

    def _read(self, reply: GenerationReply, node: Node, rollout: int) -> list[Node]:
        """One candidate for each distinct step of a reply, in order of first appearance."""
        merged: dict[str, Node] = {}
        for completion in reply.completions:
            step = read_completion(completion.text, self.template, node.step)
            known = merged.get(step.text)
            if known is not None:
                known.multiplicity += 1
                known.num_tokens += completion.num_tokens
                continue
            logprob = completion.logprob
            if completion.finish is FinishReason.REPETITION:
                discard: Discard | None = Discard.REPETITIVE
            else:
                discard = discard_reason(step, node.step, self.config.max_repeats)
            merged[step.text] = Node(
                id=-1,
                parent=-1,
                depth=-1,
                step=step,
                num_tokens=completion.num_tokens,
                logprob=logprob if logprob is not None and math.isfinite(logprob) else None,
                rollout=rollout,
                discard=discard,
            )
        return list(merged.values())

    async def _merge_answers(self, expansion: _Expansion) -> None:
        """Leave one candidate for all wordings of an answer; the released rule, one answer."""
        answers = [c for c in expansion.candidates if c.discard is None and is_answer(c)]
        if not answers:
            return
        repeated: set[int] = set()
        for first, *others in await same_answers([c.step.answer or "" for c in answers if c.step]):
            for other in others:
                answers[first].multiplicity += answers[other].multiplicity
                answers[first].num_tokens += answers[other].num_tokens
                repeated.add(id(answers[other]))
        expansion.candidates = [c for c in expansion.candidates if id(c) not in repeated]
        if self.config.answer_candidates == "first":
            for child in expansion.candidates:
                if child is not answers[0] and child.discard is None:
                    child.discard = Discard.NOT_KEPT

    async def _execute(self, expansion: _Expansion) -> None:
        """Run the code of valid candidates on the state of the node and attach what came out."""
        runnable = [c for c in expansion.candidates if c.discard is None and not is_answer(c)]
        if not runnable:
            return
        codes = [c.step.code for c in runnable if c.step is not None]
        began_s = self.now()
        results, expansion.opening = await self.interpreters.run(expansion.node, codes)
        expansion.execute_s = self.now() - began_s
        expansion.num_executions = len(set(codes))
        for child, result in zip(runnable, results, strict=True):
            assert child.step is not None
            child.execution_status = result.status
            child.stdout = result.stdout
            if result.status != "ok":
                child.execution_error = f"{result.error_type}: {result.error_message}"
                if self.config.invalid_candidates == "leaf":
                    child.terminal = Terminal.CODE_ERROR
                else:
                    child.discard = Discard.CODE_FAILED
            elif expansion.node.depth + 1 >= self.config.max_depth:
                child.terminal = Terminal.TOO_DEEP
            if result.status == "ok" and child.step.kind is StepKind.LAST_CODE:
                child.step = replace(child.step, output=result.stdout)
            elif result.state is not None and child.terminal is None:
                expansion.states.append((child, result.state))

    async def _grade_answers(self, expansion: _Expansion) -> None:
        """Set the verdict of each answer."""
        began_s = self.now()
        for child in expansion.candidates:
            if child.discard is not None or not is_answer(child):
                continue
            child.terminal = Terminal.ANSWER
            answer = child.step.answer if child.step is not None else None
            verdict = await self._verdict(answer) if answer is not None else None
            if verdict is not None:
                child.correct = verdict.equal
                child.verdict = verdict.reason.value
        expansion.grade_s = self.now() - began_s

    async def _verdict(self, answer: str) -> Verdict | None:
        """The verdict on an answer, asked once for each text; None where the label is withheld.

        Comparing anything but plain numbers may take a second and wait for another process, so that
        is done off the event loop.
        """
        if self.grade is None:
            return None
        if answer in self.verdicts:
            return self.verdicts[answer]
        problem = self.tree.problem
        if not problem.golds or all(
            _PLAIN_NUMBER.fullmatch(text) for text in (answer, *problem.golds)
        ):
            verdict = grade_any(problem, answer, self.grade)
        else:
            verdict = await asyncio.to_thread(grade_any, problem, answer, self.grade)
        if verdict is None or verdict.reason is not Reason.UNDECIDED:
            self.verdicts[answer] = verdict
        return verdict

    async def _evaluate(self, expansion: _Expansion) -> None:
        """Give each candidate that can be gone on with, or answers, the PPM's value (Eq. 3).

        A value that is not finite leaves its candidate unscored.
        """
        if self.preference is None:
            return
        valued = [
            c
            for c in expansion.candidates
            if c.discard is None and c.terminal in (None, Terminal.ANSWER)
        ]
        if not valued:
            return
        tree = self.tree
        prefix = self.valued_question + render_steps(tree.steps(expansion.node))
        texts = tuple(prefix + c.step.rendered for c in valued if c.step is not None)
        began_s = self.now()
        request = EvaluationRequest(texts=texts, routing_key=tree.problem.id)
        reply = await self.preference.evaluate(request)
        expansion.evaluate_s = self.now() - began_s
        for child, value in zip(valued, values_of(request, reply), strict=True):
            child.value = value
        expansion.evaluation = reply


_PLAIN_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,12}(?:[./][0-9]{1,12})?\s*")
"""What every grader compares in microseconds."""
