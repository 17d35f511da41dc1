"""From committed answers to accuracies: what an evaluation shows, computed and nothing measured.

    trees of an arm --read_attempts--> attempts of each problem --score_problem--> results
                                       (a row a solution)                (a row a problem, method
                                                                          and budget)
    results --summarise--> accuracy, interval and cost of each benchmark, method and budget

A *budget* of k means: choose among the first k trajectories. They were made once, for the largest
budget, so the curves of all budgets are of the same samples, and a point costs what its own k
trajectories cost. pass@1 and pass@k use all N samples (unbiased, Chen et al. 2021); the methods
that choose use the first k, which is one draw of k.

Every problem is in every result: one without an answer, or whose search failed, counts as wrong,
with the reason beside it.

    method            arm      chosen by
    greedy            greedy   nothing: one sample at temperature 0
    pass@1, pass@k    samples  nothing; an oracle
    majority          samples  the vote of all
    best-of-n         samples  the highest PPM value
    weighted-majority samples  the vote of all, weighed by PPM value
    ... + logprob     samples  these two, by PPM and log-probability (`logprob_weight`)
    top-K vote        samples  the vote of the K best-valued
    beam              beam     the vote of the K best-valued of finished beams
    mcts              mcts     the vote of the K best-valued; a trajectory is a tree, and its
                               best-valued answer its solution (the released evaluation)
    mcts pass@k       mcts     an oracle
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from statistics import fmean
from typing import Any

import pyarrow as pa

from rollout.methods import Method, choose
from rollout.problem import Problem
from rollout.programs import one_per_program, program_key
from rollout.solution_tree import trajectory_of
from rollout.tree import Discard, Terminal
from verifier.accuracy import RankedAnswer, pass_at_k, rank_answers
from verifier.bootstrap import Estimate, bootstrap_mean
from verifier.equivalence import Reason

PASS_AT_1 = "pass@1"
PASS_AT_K = "pass@k"
TOP_K_VOTE = "top-k-vote"
WITH_LOGPROB = " + logprob"
MCTS_PASS_AT_K = "mcts pass@k"
METHODS = (
    *("greedy", PASS_AT_1, "majority", "best-of-n", TOP_K_VOTE, "beam", "mcts"),
    *("weighted-majority", f"best-of-n{WITH_LOGPROB}", f"weighted-majority{WITH_LOGPROB}"),
    *(PASS_AT_K, MCTS_PASS_AT_K),
)
"""In the order of tables; the last two are oracles."""


class Arm(StrEnum):
    """Solutions that are made together; several methods may choose among those of one arm."""

    GREEDY = "greedy"
    SAMPLES = "samples"
    BEAM = "beam"
    MCTS = "mcts"

    @property
    def round(self) -> int:
        """Under which an evaluation's store keeps the arm's trees."""
        return list(Arm).index(self) + 1

    @property
    def job_is_trajectory(self) -> bool:
        """True if a problem has a job for each trajectory, false if one for all."""
        return self in (Arm.BEAM, Arm.MCTS)


ARM_OF: Mapping[Method, Arm] = {
    Method.GREEDY: Arm.GREEDY,
    Method.MAJORITY: Arm.SAMPLES,
    Method.BEST_OF_N: Arm.SAMPLES,
    Method.WEIGHTED_MAJORITY: Arm.SAMPLES,
    Method.BEAM: Arm.BEAM,
    Method.MCTS: Arm.MCTS,
}


class Failure(StrEnum):
    """Why a solution, or a problem, has no answer."""

    PROMPT_TOO_LONG = "prompt too long"
    UNFINISHED = "unfinished"
    """Cut at the token limit, or ended without the program's end."""
    REPETITIVE = "repetitive"
    CODE_FAILED = "code failed"
    NO_READABLE_ANSWER = "no readable answer"
    NOTHING_FOUND = "search found no answer"
    SEARCH_FAILED = "search failed"
    """It raised, and the problem was quarantined."""


_FAILURE_OF = {
    Discard.UNFINISHED.value: Failure.UNFINISHED,
    Discard.REPETITIVE.value: Failure.REPETITIVE,
    Discard.CODE_FAILED.value: Failure.CODE_FAILED,
    Discard.NO_ANSWER.value: Failure.NO_READABLE_ANSWER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One solution; of a tree, one answer that was visited."""

    trajectory: int
    answer: str | None = None
    correct: bool = False
    verdict: str = ""
    """The grader's reason; "" without an answer."""
    value: float | None = None
    mean_logprob: float | None = None
    """Of a token, in nats; None: not known, as of any answer of a search tree."""
    failure: Failure | None = None
    """None: it has an answer."""
    generated_tokens: int = 0
    """Of this solution; of a tree's answers the first carries the tree's, the others 0."""

    @property
    def share(self) -> float:
        """As of `Solution`; each tree is one of its own here, so its answers have one vote."""
        return 1.0

    @property
    def undecided(self) -> bool:
        """True if the grader could not tell."""
        return self.verdict in (Reason.UNDECIDED.value, Reason.LIMIT.value)


NOT_SEARCHED = Attempt(trajectory=0, failure=Failure.SEARCH_FAILED)
"""Of a problem that was quarantined."""


@dataclass(slots=True, kw_only=True)
class ProblemAttempts:
    """Everything one arm found for one problem."""

    attempts: list[Attempt] = field(default_factory=list)
    """By trajectory."""
    scored_tokens: list[tuple[int, int]] = field(default_factory=list)
    """(first trajectory, tokens the PPM read) of each tree."""
    seconds: list[tuple[int, float]] = field(default_factory=list)
    """(first trajectory, seconds from its start to its end) of each tree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an answer took."""

    generated_tokens: float
    scored_tokens: float
    seconds: float
    gpu_seconds: float | None
    """None: no GPU took part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Cost):
    """How one method did on one problem with one budget."""

    benchmark: str
    problem_id: str
    level: str
    method: str
    """One of `METHODS`."""
    budget: int
    answer: str | None
    """None: none was found, or the method is an estimate over all."""
    score: float
    """1 right, 0 wrong; a chance in between for pass@1 and pass@k."""
    outcome: str
    """"right", "wrong", "undecided" (wrong for us: the grader could not tell), or why there is no
    answer."""


# ------------------------------------------------------------------------- reading the trees

COLUMNS = (
    *("problem_id", "tree", "node", "parent", "rollout", "step_kind", "step_code", "step_answer"),
    *("terminal", "discard", "correct", "verdict", "value", "num_tokens", "logprob"),
    *("visit_count", "execution_status", "generated_tokens", "scored_tokens", "seconds", "note"),
)
"""What `read_attempts` needs of a table of trees."""


def read_attempts(
    tables: Iterable[pa.Table], arm: Arm, *, width: int = 1
) -> dict[str, ProblemAttempts]:
    """The attempts of an arm by problem, trajectories in order.

    Args:
        tables: of the arm's trees, with `COLUMNS`.
        width: trajectories of one beam search.
    """
    found: defaultdict[str, ProblemAttempts] = defaultdict(ProblemAttempts)
    for table in tables:
        for rows in _trees(table):
            name, number = rows[0]["problem_id"], 0
            if arm.job_is_trajectory:
                name, number = trajectory_of(name)
            first = number * (width if arm is Arm.BEAM else 1)
            of_problem = found[name]
            made = _answers(rows, first) if arm is Arm.MCTS else _solutions(rows, first)
            of_problem.attempts += made
            of_problem.scored_tokens.append((first, rows[0]["scored_tokens"]))
            of_problem.seconds.append((first, rows[0]["seconds"]))
    for of_problem in found.values():
        of_problem.attempts.sort(key=lambda attempt: attempt.trajectory)
    return dict(found)


def _trees(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in table.select(list(COLUMNS)).to_pylist():
        if row["node"] == 0 and rows:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _attempt(row: Mapping[str, Any], trajectory: int, tokens: int) -> Attempt:
    return Attempt(
        trajectory=trajectory,
        answer=row["step_answer"],
        correct=bool(row["correct"]),
        verdict=row["verdict"],
        value=row["value"],
        generated_tokens=tokens,
    )


def _solutions(rows: Sequence[Mapping[str, Any]], first: int) -> list[Attempt]:
    """Of a tree of chains (`rollout.solution_tree`)."""
    root, *nodes = rows
    if root["terminal"] == Terminal.PROMPT_TOO_LONG:
        return [Attempt(trajectory=first, failure=Failure.PROMPT_TOO_LONG)]
    last: dict[int, Mapping[str, Any]] = {}
    tokens: Counter[int] = Counter()
    for node in nodes:
        last[node["rollout"]] = node
        tokens[node["rollout"]] += node["num_tokens"]
    if not last:
        return [
            Attempt(
                trajectory=first,
                failure=Failure.NOTHING_FOUND,
                generated_tokens=root["generated_tokens"],
            )
        ]
    made = []
    spent = sum(tokens.values())
    for number, node in sorted(last.items()):
        # A beam spends more than its finished paths hold; each carries its share.
        share = tokens[number] / spent if spent else 1.0 / len(last)
        own = round(root["generated_tokens"] * share)
        if node["terminal"] == Terminal.ANSWER:
            attempt = _attempt(node, first + number, own)
            if node["logprob"] is not None:
                mean = node["logprob"] / max(node["num_tokens"], 1)
                attempt = replace(attempt, mean_logprob=mean)
            made.append(attempt)
        else:
            why = _FAILURE_OF.get(node["discard"] or "", Failure.UNFINISHED)
            made.append(Attempt(trajectory=first + number, failure=why, generated_tokens=own))
    return made


def _answers(rows: Sequence[Mapping[str, Any]], trajectory: int) -> list[Attempt]:
    """Of a search tree: the best-valued visited answer; one of each program if none is valued."""
    root, *nodes = rows
    answers = [n for n in nodes if n["terminal"] == Terminal.ANSWER and n["visit_count"] > 0]
    valued = [n for n in answers if n["value"] is not None]
    if valued:
        answers = [max(valued, key=lambda node: node["value"])]
    elif answers:
        codes: dict[int, tuple[str, ...]] = {-1: ()}
        for row in rows:
            codes[row["node"]] = (*codes[row["parent"]], row["step_code"] or "")
        answers = one_per_program(answers, lambda node: program_key(codes[node["node"]]))
    tokens = root["generated_tokens"]
    if not answers:
        return [
            Attempt(
                trajectory=trajectory,
                failure=_failure_of_search(root, nodes),
                generated_tokens=tokens,
            )
        ]
    return [
        _attempt(node, trajectory, tokens if position == 0 else 0)
        for position, node in enumerate(answers)
    ]


def _failure_of_search(root: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> Failure:
    if root["terminal"] == Terminal.PROMPT_TOO_LONG:
        return Failure.PROMPT_TOO_LONG
    reasons = Counter(_FAILURE_OF[n["discard"]] for n in nodes if n["discard"] in _FAILURE_OF)
    if len(reasons) == 1 and all(n["discard"] for n in nodes):
        return next(iter(reasons))
    return Failure.NOTHING_FOUND


# --------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What is asked of the attempts of one arm."""

    arm: Arm
    methods: tuple[Method, ...]
    """Those of the arm that were asked for."""
    budgets: tuple[int, ...]
    top_k: int
    logprob_weight: float = 0.0
    """0: samples are not judged by their log-probabilities."""
    width: int = 1
    """Trajectories of one beam search."""
    num_made: int
    """Trajectories there are of each problem, made for the largest budget."""
    gpu_seconds_per_token: float | None = None
    """Of the whole arm; None: no GPU took part."""
    seed: int = 0

    @property
    def own_budgets(self) -> tuple[int, ...]:
        """The budgets that the arm can tell something about."""
        if self.arm is Arm.GREEDY:
            return (1,)
        return tuple(k for k in self.budgets if k <= self.num_made and k % self.width == 0)


def score_problem(
    problem: Problem, found: ProblemAttempts | None, scoring: Scoring
) -> list[Result]:
    """All methods and budgets of one arm on one problem.

    Args:
        found: None: the search of the problem failed.
    """
    if found is None or not found.attempts:
        found = ProblemAttempts(attempts=[NOT_SEARCHED])
    attempts = found.attempts
    arm = scoring.arm
    results: list[Result] = []

    def add(
        method: str, k: int, score: float, chosen: Attempt | None, told: str, cost: Cost
    ) -> None:
        results.append(
            Result(
                benchmark=problem.source,
                problem_id=problem.id,
                level=problem.level.value,
                method=method,
                budget=k,
                answer=chosen.answer if chosen is not None else None,
                score=score,
                outcome=told,
                **asdict(cost),
            )
        )

    if arm is Arm.GREEDY:
        (only,) = attempts
        told = _outcome(only if only.answer is not None else None, attempts)
        add("greedy", 1, float(only.correct), only, told, _cost(found, 1, scoring, valued=False))
        return results
    if arm is not Arm.BEAM:
        right = _right_by_trajectory(attempts, scoring)
        answered = any(attempt.answer is not None for attempt in attempts)
        told = "right" if right else "wrong" if answered else _outcome(None, attempts)
        oracle = PASS_AT_K if arm is Arm.SAMPLES else MCTS_PASS_AT_K
        budgets = [(oracle, k) for k in scoring.own_budgets]
        if arm is Arm.SAMPLES:
            budgets = [(PASS_AT_1, 1), *((name, k) for name, k in budgets if k > 1)]
        for method, k in budgets:
            chance = pass_at_k(scoring.num_made, right, k)
            cost = _cost(found, k, scoring, valued=arm is Arm.MCTS, mean=True)
            add(method, k, chance, None, told, cost)
    for k in scoring.own_budgets:
        few = [attempt for attempt in attempts if attempt.trajectory < k]
        for method, ranked, valued in _choices(scoring, few):
            chosen = few[ranked[0].members[0]] if ranked else None
            score = float(chosen is not None and chosen.correct)
            cost = _cost(found, k, scoring, valued=valued)
            add(method, k, score, chosen, _outcome(chosen, few), cost)
    return results


def _choices(
    scoring: Scoring, few: Sequence[Attempt]
) -> Iterator[tuple[str, Sequence[RankedAnswer], bool]]:
    """(method, its answers, the chosen one first, whether the PPM's tokens count)."""

    def ranked(method: Method, logprob_weight: float = 0.0) -> Sequence[RankedAnswer]:
        return choose(
            few,
            method=method,
            top_k=scoring.top_k,
            seed=scoring.seed,
            logprob_weight=logprob_weight,
        )

    if scoring.arm is Arm.BEAM:
        yield "beam", ranked(Method.BEAM), True
    elif scoring.arm is Arm.MCTS:
        yield "mcts", ranked(Method.MCTS), True
    else:
        if Method.MAJORITY in scoring.methods:
            yield "majority", ranked(Method.MAJORITY), False
        everything = Method.BEST_OF_N in scoring.methods
        if everything:
            # The best-valued vote, as those of MCTS do.
            yield TOP_K_VOTE, ranked(Method.MCTS), True
        for method in (Method.BEST_OF_N, Method.WEIGHTED_MAJORITY):
            if everything or method in scoring.methods:
                yield method.value, ranked(method), True
                if scoring.logprob_weight:
                    name = f"{method}{WITH_LOGPROB}"
                    yield name, ranked(method, scoring.logprob_weight), True


def _right_by_trajectory(attempts: Sequence[Attempt], scoring: Scoring) -> int:
    """Trajectories whose answer is right; of several answers of a tree the vote decides."""
    by_number: defaultdict[int, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_number[attempt.trajectory].append(attempt)
    right = 0
    for several in by_number.values():
        if len(several) == 1:
            right += several[0].correct
        else:
            ranked = rank_answers([attempt.answer for attempt in several], seed=scoring.seed)
            right += several[ranked[0].members[0]].correct
    return right


def _outcome(chosen: Attempt | None, few: Sequence[Attempt]) -> str:
    if chosen is not None:
        if chosen.correct:
            return "right"
        return "undecided" if chosen.undecided else "wrong"
    reasons = Counter(a.failure for a in few if a.failure is not None)
    return str(reasons.most_common(1)[0][0]) if reasons else Failure.NOTHING_FOUND.value


def _cost(
    found: ProblemAttempts, budget: int, scoring: Scoring, *, valued: bool, mean: bool = False
) -> Cost:
    """What the first `budget` trajectories took; of one request of N samples, their share.

    Args:
        valued: the PPM's tokens count.
        mean: any `budget` of the samples, not the first ones.
    """
    own = [a for a in found.attempts if a.trajectory < budget]
    whole = sum(a.generated_tokens for a in found.attempts)
    tokens = float(sum(a.generated_tokens for a in own))
    if mean:
        made = len({a.trajectory for a in found.attempts})
        tokens = whole * min(budget / made, 1.0)
    if scoring.arm is Arm.SAMPLES:
        answered = sum(a.answer is not None for a in found.attempts)
        read = sum(a.answer is not None for a in own) / answered if answered else 0.0
        scored = read * sum(count for _, count in found.scored_tokens)
        seconds = sum(s for _, s in found.seconds) * (tokens / whole if whole else 1.0)
    else:
        scored = float(sum(count for first, count in found.scored_tokens if first < budget))
        seconds = sum(s for first, s in found.seconds if first < budget)
    per_token = scoring.gpu_seconds_per_token
    return Cost(
        generated_tokens=tokens,
        scored_tokens=scored if valued else 0.0,
        seconds=seconds,
        gpu_seconds=None if per_token is None else tokens * per_token,
    )


# -------------------------------------------------------------------------------- summaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One method with one budget on one benchmark."""

    benchmark: str
    method: str
    budget: int
    accuracy: Estimate
    outcomes: Mapping[str, int]
    """Problems by outcome; they add up to all of them."""
    generated_tokens: float
    """Mean over problems; likewise below."""
    scored_tokens: float
    seconds: float
    gpu_seconds: float | None
    tokens_over_samples: float | None
    """Generated tokens over those of as many samples; None: the benchmark was not sampled so."""


def summarise(results: Sequence[Result], *, seed: int = 0) -> list[Summary]:
    """Accuracy, interval and cost by benchmark, method and budget, in the order of tables."""
    groups: defaultdict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.benchmark, result.method, result.budget].append(result)
    order = {name: place for place, name in enumerate(dict.fromkeys(r.benchmark for r in results))}
    sampled = {
        (benchmark, budget): fmean(r.generated_tokens for r in group)
        for (benchmark, method, budget), group in groups.items()
        if method in (PASS_AT_1, PASS_AT_K)
    }
    summaries = []
    for benchmark, method, budget in sorted(
        groups, key=lambda key: (order[key[0]], METHODS.index(key[1]), key[2])
    ):
        group = groups[benchmark, method, budget]
        gpu = [r.gpu_seconds for r in group if r.gpu_seconds is not None]
        tokens = fmean(r.generated_tokens for r in group)
        samples = sampled.get((benchmark, budget))
        summaries.append(
            Summary(
                benchmark=benchmark,
                method=method,
                budget=budget,
                accuracy=bootstrap_mean([r.score for r in group], seed=seed),
                outcomes=dict(Counter(r.outcome for r in group).most_common()),
                generated_tokens=tokens,
                scored_tokens=fmean(r.scored_tokens for r in group),
                seconds=fmean(r.seconds for r in group),
                gpu_seconds=fmean(gpu) if gpu else None,
                tokens_over_samples=tokens / samples if samples else None,
            )
        )
    return summaries


def method_label(method: str, budget: int, top_k: int) -> str:
    """A method with its budget, for people: `maj@8`, `best-of-8`, `mcts, 8 trajectories`."""
    match method:
        case "greedy" | "pass@1":
            return method
        case "pass@k":
            return f"pass@{budget}"
        case "majority":
            return f"maj@{budget}"
        case "best-of-n":
            return f"best-of-{budget}"
        case "top-k-vote":
            return f"top-{top_k} vote of {budget}"
        case "weighted-majority":
            return f"weighted maj@{budget}"
        case _ if method.endswith(WITH_LOGPROB):
            own = method.removesuffix(WITH_LOGPROB)
            return f"{method_label(own, budget, top_k)}{WITH_LOGPROB}"
        case "mcts pass@k":
            return f"mcts, pass@{budget}"
        case _:
            return f"{method}, {budget} traj."
