"""Monte Carlo tree search over code-augmented steps, for one problem.

    rollout: root -- select (UCT) --> leaf -- expand --> ... --> terminal -- backup --> root

    expand:  policy: n candidates in one request
             -> parse, merge identical ones -> sandbox: run each new code on its parent's state
             -> verifier: grade answers     -> PPM: one value per valid candidate (rounds 3-4)

There is no simulation phase: a rollout is one root-to-terminal path built step by step. Each search
is a coroutine that awaits the engines; thousands run on one event loop and none waits for another.
The search keeps no clock and draws every seed from its own (`derive_seed`).

Deviations from arXiv 2501.04519, which leaves these open:
- a visited terminal is not selected again, so a search ends early when the tree is exhausted;
- a failure (too deep, no valid child) backs up -1 along its path (`failure_backup="path"`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from rollout.engine import (
    EvaluationRequest,
    FinishReason,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
)
from rollout.problem import Problem
from rollout.prompt import (
    STOP_STRINGS,
    TEMPLATES,
    PromptTemplate,
    StepKind,
    parse_step,
    render_prompt,
)
from rollout.seeds import derive_seed
from rollout.selection import Unvisited, select_child
from rollout.tree import Discard, Node, Terminal, Tree, backup, expand, is_answer
from verifier import GRADER_VERSION, Verdict, verify_answer
from verifier.sandbox import INFRASTRUCTURE_STATUSES, StepResult


class TerminalValue(StrEnum):
    """What an answer's backup is."""

    LABEL = "label"
    """+1 or -1 from the verifier: data generation."""
    PREFERENCE = "preference"
    """The PPM's value: test time, where no label exists."""


class SearchConfig(BaseModel):
    """Everything that shapes a search; defaults follow the paper (rounds 2-3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_candidates: int = Field(8, ge=1, description="candidates per expansion, n")
    num_answer_candidates: int | None = Field(
        None, ge=1, description="candidates where only the answer can follow; null: num_candidates"
    )
    num_rollouts: int = Field(16, ge=1, description="root-to-terminal descents per tree")
    max_depth: int = Field(16, ge=1, description="steps on a path, the answer included")
    exploration: float = Field(2.0, ge=0, description="c of UCT (Eq. 1)")
    temperature: float = Field(1.0, ge=0, description="sampling temperature of the policy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling mass")
    max_step_tokens: int = Field(2048, ge=1, description="generated tokens per candidate")
    max_generated_tokens: int | None = Field(
        None, ge=1, description="no rollout starts beyond this many tokens; null: no budget"
    )
    template: Literal["rstar", "short"] = Field("rstar", description="prompt template")
    unvisited: Unvisited = Field(
        Unvisited.INFINITE, description="worth of an unvisited child in UCT: infinite | zero"
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

    @property
    def prompt_template(self) -> PromptTemplate:
        return TEMPLATES[self.template]

    def released(self) -> SearchConfig:
        """The same search with the switches of the released code (microsoft/rStar)."""
        return self.model_copy(
            update={
                "unvisited": Unvisited.ZERO,
                "invalid_candidates": "leaf",
                "answer_candidates": "first",
                "failure_backup": "leaf",
            }
        )


class StepSandbox(Protocol):
    """Where step code runs: a tree of interpreter states per search."""

    async def open(self, tree_id: str) -> str:
        """Start a tree; returns the id of its root state."""
        ...

    async def run(self, state: str, codes: Sequence[str]) -> Sequence[StepResult]:
        """Run sibling codes, each on its own copy of `state`; order kept."""
        ...

    async def close(self, tree_id: str) -> None:
        """Free every state of the tree."""
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
    grade: Grade = verify_answer,
) -> Tree:
    """Search one problem and return its tree.

    Args:
        preference: the PPM; None means terminal-guided search (rounds 1-2).
        round, index: of the tree, recorded and part of its sandbox id.
        seed: of this tree; the same seed and deterministic engines give the same tree.
    Raises:
        ValueError: `terminal_value` is "preference" and there is no PPM.
        EngineError, SearchError: a part failed; nothing of the problem is at fault.
    """
    if config.terminal_value is TerminalValue.PREFERENCE and preference is None:
        raise ValueError('terminal_value="preference" needs a process preference model')
    tree = Tree(problem=problem, round=round, index=index, seed=seed, grader_version=GRADER_VERSION)
    tree_id = f"r{round}/{problem.id}/{index}/{seed}"
    states = {0: await sandbox.open(tree_id)}
    try:
        search = _Search(tree, states, config, policy, preference, sandbox, grade)
        for rollout in range(config.num_rollouts):
            if tree.root.exhausted:
                tree.note = "exhausted"
                break
            budget = config.max_generated_tokens
            if budget is not None and tree.generated_tokens >= budget:
                tree.note = "token budget"
                break
            await search.rollout(rollout)
            tree.num_rollouts += 1
    finally:
        await sandbox.close(tree_id)
    return tree


class _Search:
    """The moving parts of one `run_search` call."""

    def __init__(
        self,
        tree: Tree,
        states: dict[int, str],
        config: SearchConfig,
        policy: PolicyEngine,
        preference: PreferenceEngine | None,
        sandbox: StepSandbox,
        grade: Grade,
    ) -> None:
        self.tree = tree
        self.states = states
        self.config = config
        self.policy = policy
        self.preference = preference
        self.sandbox = sandbox
        self.grade = grade

    async def rollout(self, rollout: int) -> None:
        """Descend from the root to a terminal, expanding on the way, and back up its reward."""
        node = self.tree.root
        while node.terminal is None:
            if not node.expanded:
                await self._expand(node, rollout)
                if node.terminal is not None:
                    break
            child = select_child(
                self.tree,
                node,
                exploration=self.config.exploration,
                unvisited=self.config.unvisited,
            )
            if child is None:  # only failing leaves are left below (released rule)
                node.exhausted = True
                if node.parent < 0:
                    return
                node = self.tree.root
                continue
            node = child
        self._back_up(node)

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

    async def _expand(self, node: Node, rollout: int) -> None:
        """Generate, run, grade and value the candidates that follow `node`."""
        candidates = await self._generate(node, rollout)
        if node.terminal is not None:
            return
        states = await self._execute(node, candidates)
        await self._grade_answers(candidates)
        self._apply_rules(node, candidates)
        await self._evaluate(node, candidates)
        expand(self.tree, node, candidates)
        for child, state in zip(candidates, states, strict=True):
            if state is not None:
                self.states[child.id] = state
            if child.terminal is Terminal.CODE_ERROR:
                backup(self.tree, child, -1.0, leaf_only=True)
        if not self.tree.valid_children(node):
            node.terminal = Terminal.NO_VALID_CHILD

    async def _generate(self, node: Node, rollout: int) -> list[Node]:
        config = self.config
        tree = self.tree
        num_candidates = config.num_candidates
        if config.num_answer_candidates is not None and _only_answer_follows(node):
            num_candidates = config.num_answer_candidates
        reply = await self.policy.generate(
            GenerationRequest(
                prompt=self._prompt(node),
                num_candidates=num_candidates,
                max_tokens=config.max_step_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                stop=STOP_STRINGS,
                seed=derive_seed(tree.seed, rollout, node.id),
                routing_key=tree.problem.id,
            )
        )
        tree.policy_version = reply.policy_version
        tree.prompt_tokens += reply.prompt_tokens
        tree.cached_tokens += reply.cached_tokens
        if all(c.finish is FinishReason.PROMPT_TOO_LONG for c in reply.completions):
            node.terminal = Terminal.PROMPT_TOO_LONG
            return []
        merged: dict[str, Node] = {}
        for completion in reply.completions:
            tree.generated_tokens += completion.num_tokens
            known = merged.get(completion.text)
            if known is not None:
                known.multiplicity += 1
                known.num_tokens += completion.num_tokens
                continue
            step = parse_step(completion.text)
            logprob = completion.logprob
            merged[completion.text] = Node(
                id=-1,
                parent=-1,
                depth=-1,
                step=step,
                num_tokens=completion.num_tokens,
                logprob=logprob if logprob is not None and math.isfinite(logprob) else None,
                rollout=rollout,
                discard=_discard_reason(node, step.kind, step.code, step.answer),
            )
        return list(merged.values())

    async def _execute(self, node: Node, candidates: list[Node]) -> list[str | None]:
        """Run the code of valid candidates on the state of `node` and attach what came out.

        Returns the interpreter state after each candidate, None where no code ran to its end.
        """
        states: dict[int, str | None] = {}
        runnable = [c for c in candidates if c.discard is None and not is_answer(c)]
        if not runnable:
            return [None] * len(candidates)
        codes = [c.step.code for c in runnable if c.step is not None]
        results = await self.sandbox.run(self.states[node.id], codes)
        self.tree.num_executions += len(set(codes))
        for child, result in zip(runnable, results, strict=True):
            if result.status in INFRASTRUCTURE_STATUSES:
                raise SearchError(
                    f"sandbox failed on problem {self.tree.problem.id}: "
                    f"{result.status} {result.error_message}"
                )
            child.execution_status = result.status
            child.stdout = result.stdout
            if result.status != "ok":
                child.discard = Discard.CODE_FAILED
                child.execution_error = f"{result.error_type}: {result.error_message}"
                continue
            if child.step is not None and child.step.kind is StepKind.LAST_CODE:
                child.step = replace(child.step, output=result.stdout)
            states[id(child)] = result.state
        return [states.get(id(child)) for child in candidates]

    async def _grade_answers(self, candidates: list[Node]) -> None:
        """Set the verdict of each answer; grading may take a while, so not on the event loop."""
        for child in candidates:
            if child.discard is not None or not is_answer(child):
                continue
            child.terminal = Terminal.ANSWER
            answer = child.step.answer if child.step is not None else None
            if answer is None:
                continue
            verdict = await asyncio.to_thread(grade_any, self.tree.problem, answer, self.grade)
            if verdict is not None:
                child.correct = verdict.equal
                child.verdict = str(verdict.reason)

    def _apply_rules(self, node: Node, candidates: list[Node]) -> None:
        """Depth limit, and the switches between the paper's and the released rules."""
        answers = [c for c in candidates if c.terminal is Terminal.ANSWER]
        if self.config.answer_candidates == "first" and answers:
            for child in candidates:
                if child is not answers[0] and child.discard is None:
                    child.discard = Discard.NOT_KEPT
        for child in candidates:
            failed_code = child.discard is Discard.CODE_FAILED
            if failed_code and self.config.invalid_candidates == "leaf":
                child.discard = None
                child.terminal = Terminal.CODE_ERROR
            too_deep = node.depth + 1 >= self.config.max_depth
            if too_deep and child.discard is None and child.terminal is None:
                child.terminal = Terminal.TOO_DEEP

    async def _evaluate(self, node: Node, candidates: list[Node]) -> None:
        """Give each valid candidate the PPM's value (Eq. 3); a NaN leaves it unscored."""
        if self.preference is None:
            return
        valid = [c for c in candidates if c.discard is None]
        if not valid:
            return
        prefix = self._prompt(node)
        texts = tuple(prefix + c.step.rendered for c in valid if c.step is not None)
        reply = await self.preference.evaluate(
            EvaluationRequest(texts=texts, routing_key=self.tree.problem.id)
        )
        self.tree.preference_version = reply.preference_version
        self.tree.scored_tokens += reply.num_tokens
        for child, value in zip(valid, reply.values, strict=True):
            child.value = min(1.0, max(-1.0, value)) if math.isfinite(value) else None

    def _prompt(self, node: Node) -> str:
        return render_prompt(
            self.tree.problem.text, self.tree.steps(node), self.config.prompt_template
        )


def _only_answer_follows(node: Node) -> bool:
    return node.step is not None and node.step.kind is StepKind.LAST_CODE


def _discard_reason(node: Node, kind: StepKind, code: str, answer: str | None) -> Discard | None:
    """Why a parsed candidate cannot follow `node`; None if it can."""
    if kind is StepKind.UNFINISHED:
        return Discard.UNFINISHED
    if kind is StepKind.ANSWER:
        return None if answer else Discard.NO_ANSWER
    if _only_answer_follows(node):
        return Discard.OUT_OF_PLACE
    return None if code.strip() else Discard.EMPTY
