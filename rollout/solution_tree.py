"""Solutions as a `Tree`, so that an evaluation is stored, audited and looked at as a rollout is.

    Solver --> solutions --> a chain of nodes each, all below the root --> TrajectoryStore
               mcts: the search tree itself

One record for both means one path: the same jobs, leases, worker, exactly-once commits, Parquet
columns, `rstar tree`. In a tree of chains

- `rollout` of a node is the number of its solution, in the order they were sampled, so the first k
  solutions are what a budget of k would have drawn;
- `num_tokens` and `logprob` of a solution stand on the last node of its chain;
- nothing is merged and nothing is backed up: Q-values say nothing. The nodes of a solution that
  reached an answer count one visit each, as a path that a rollout took.

The verdict is set here, after the method has chosen its answers: no method sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from rollout.engine import FinishReason, PolicyEngine, PreferenceEngine
from rollout.methods import Method, MethodConfig, Solver, SolveResult
from rollout.problem import Problem
from rollout.prompt import Step, StepKind
from rollout.sampling import Solution
from rollout.search import SearchConfig, StepSandbox, grade_any, run_search
from rollout.tree import Discard, Node, Terminal, Tree, expand
from verifier import GRADER_VERSION, Verdict


async def answer_tree(
    tree: Tree,
    *,
    method: MethodConfig,
    search: SearchConfig,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
    clock: Callable[[], float],
    prompt: str | None = None,
) -> list[Tree]:
    """Solve the problem of a new (or interrupted) tree with a method, fill the tree and return it.

    MCTS searches the tree itself and goes on with one that was interrupted; every other method
    starts anew.

    Args:
        method: its number of trajectories is of this one tree.
        search: as `search_of` makes it.
        clock: in seconds.
        prompt: as of `Solver`.
    Raises:
        EngineError, SearchError, SandboxError: a part failed; nothing of the problem is at fault.
    """
    if method.name is Method.MCTS:
        await run_search(
            tree.problem,
            config=search,
            policy=policy,
            preference=preference,
            sandbox=sandbox,
            round=tree.round,
            index=tree.index,
            seed=tree.seed,
            grade=None,
            clock=clock,
            resume=tree,
        )
    else:
        solver = Solver(
            config=method,
            search=search,
            policy=policy,
            preference=preference,
            sandbox=sandbox,
            clock=clock,
            prompt=prompt,
        )
        fill_tree(tree, await solver.solve(tree.problem, seed=tree.seed))
        tree.search_config = search.model_dump_json()
    return [await grade_tree(tree)]


def fill_tree(tree: Tree, result: SolveResult) -> None:
    """Attach each solution as a chain below the root, and what they cost together.

    `chain_solutions` is its inverse.

    Raises:
        ValueError: the tree is not new.
    """
    if len(tree.nodes) > 1:
        raise ValueError(f"the tree of problem {tree.problem.id} is not new")
    chains = [_chain(solution, number) for number, solution in enumerate(result.solutions)]
    if result.solutions and all(s.finish is FinishReason.PROMPT_TOO_LONG for s in result.solutions):
        tree.root.terminal = Terminal.PROMPT_TOO_LONG
        tree.note = "prompt too long"
    else:
        _attach(tree, chains)
    tree.num_rollouts = len(chains)
    tree.policy_version = result.policy_version
    tree.preference_version = result.preference_version
    tree.generated_tokens = result.cost.generated_tokens
    tree.prompt_tokens = result.cost.prompt_tokens
    tree.cached_tokens = result.cost.cached_tokens
    tree.scored_tokens = result.cost.scored_tokens
    tree.num_requests = result.cost.num_requests
    tree.num_executions = sum(bool(solution.status) for solution in result.solutions)
    tree.seconds += result.cost.seconds


def _chain(solution: Solution, number: int) -> list[Node]:
    """The nodes of one solution, first step first, not yet in a tree."""
    steps: Sequence[Step] = solution.steps or (Step(kind=StepKind.UNFINISHED, text=""),)
    nodes = [
        Node(id=-1, parent=-1, depth=-1, step=step, rollout=number, stdout=step.output or "")
        for step in steps
    ]
    last = nodes[-1]
    last.num_tokens, last.logprob = solution.num_tokens, solution.logprob
    programs = [n for n, step in zip(nodes, steps, strict=True) if step.kind is StepKind.LAST_CODE]
    if programs:
        programs[-1].execution_status = solution.status
        programs[-1].execution_error = solution.error
    if solution.answer:
        last.terminal, last.value = Terminal.ANSWER, solution.value
        for node in nodes:
            node.visit_count = 1
        return nodes
    if solution.finish is FinishReason.REPETITION:
        last.discard = Discard.REPETITIVE
    elif solution.finish is FinishReason.LENGTH:
        last.discard = Discard.UNFINISHED
    elif solution.status not in ("", "ok"):
        last.discard = Discard.CODE_FAILED
    elif steps[-1].kind is StepKind.ANSWER:
        last.discard = Discard.NO_ANSWER
    else:
        last.discard = Discard.UNFINISHED
    return nodes


def chain_solutions(tree: Tree) -> list[Solution]:
    """The solutions of a tree of chains, in the order they were sampled."""
    last = {node.rollout: node for node in tree.nodes[1:]}
    return [
        Solution(
            steps=tuple(tree.steps(node)),
            answer=node.step.answer if node.step and node.terminal is Terminal.ANSWER else None,
            value=node.value,
            num_tokens=node.num_tokens,
            status=next((n.execution_status for n in tree.path(node) if n.execution_status), ""),
            seed=tree.seed,
            logprob=node.logprob,
        )
        for _, node in sorted(last.items())
    ]


def _attach(tree: Tree, chains: Sequence[Sequence[Node]]) -> None:
    expand(tree, tree.root, [chain[0] for chain in chains])
    tree.root.visit_count = sum(chain[0].visit_count for chain in chains)
    for chain in chains:
        for node, following in pairwise(chain):
            expand(tree, node, [following])


def search_of(method: MethodConfig, search: SearchConfig, *, guided: bool) -> SearchConfig:
    """The search settings of a method's first tree, or of each of its independent ones.

    Args:
        guided: there is a PPM.
    """
    if method.name is not Method.MCTS:
        return search
    return search.at_test_time(method.rollouts_of_a_tree, guided=guided)


async def grade_tree(tree: Tree) -> Tree:
    """Set the verdict of every answer of a tree, each text compared once."""
    verdicts: dict[str, Verdict | None] = {}
    for node in tree.answers():
        answer = node.step.answer if node.step is not None else None
        if answer is None:
            continue
        if answer not in verdicts:
            # Comparing answers may take a while, so not on the event loop.
            verdicts[answer] = await asyncio.to_thread(grade_any, tree.problem, answer)
        verdict = verdicts[answer]
        node.correct = verdict.equal if verdict is not None else None
        node.verdict = verdict.reason.value if verdict is not None else ""
    tree.grader_version = GRADER_VERSION
    return tree


def of_trajectory(problem: Problem, number: int) -> Problem:
    """The problem as the job of one trajectory: jobs are per problem, so it has an id of its own.

    `trajectory_of` takes such an id apart.
    """
    return replace(problem, id=f"{problem.id}#{number}")


def trajectory_of(problem_id: str) -> tuple[str, int]:
    """Id of the problem, and number of the trajectory (0 if the id has none)."""
    name, mark, number = problem_id.rpartition("#")
    return (name, int(number)) if mark and number.isdigit() else (problem_id, 0)
