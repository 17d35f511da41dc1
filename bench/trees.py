"""What the search hands to the learner: how deep its pairs are, at how many tokens, how clean.

    python -m bench.trees [--problems N] [--run RUN]

Bench trees are made by the real search (8 candidates x 16 rollouts) of a scripted world: a problem
takes 2 to 7 code steps, as the released samples do, and has a skill, the chance that a candidate is
right. One wrong step makes every answer below it wrong; one candidate in ten fails to run. The PPM
is right about a step's rightness nine times in ten. So it is known of each pair whether it compares
a right step with a wrong one after a right prefix (`clean`). With the released rules two thirds of
the step pairs are deep there, as of the authors' samples (65.7 %, microsoft/rStar, issue 32); most
of theirs are against code that failed. Answers are asked for once under each rule, so that tokens
compare what the rules visit.

Of a finished run (`--run`) the same shares come from its manifests, its dataset of the last round
and its held-out evaluations; a key that the bench or the run cannot say is null.

Prints a table, then one JSON object on the last line:

    deep_pair_share_terminal, _ppm   step pairs behind two or more shared steps, preset paper
    tokens_vs_released               generated tokens, paper over released; the larger of both modes
    budget_ratio                     held-out tokens of search over the samples', last round
    newest_round_share               the last round's SFT examples from its own trees
    distinct_program_share           programs over texts on the sides of whole-trajectory pairs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from learner.dataset import read_manifest, read_pairs, read_sft
from learner.pairs import PairConfig, PairKind, PreferencePair, deep_share, tree_pairs
from rollout.engine import (
    Completion,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
)
from rollout.problem import Level, Problem
from rollout.programs import program_of
from rollout.prompt import (
    ANSWER,
    CODE,
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_STEP,
    RSTAR_TEMPLATE,
    parse_response,
)
from rollout.search import SearchConfig, run_search
from rollout.tree import Tree
from verifier import StepResult, StepStatus, Verdict
from verifier.equivalence import Reason

RULES = {
    "paper": {"preset": "paper"},
    "every child first": {"preset": "paper", "unvisited": "infinite"},
    "released": {"preset": "released"},
}
NUM_STEPS = (2, 3, 4, 5, 6, 7)
SKILLS = (0.55, 0.65, 0.75, 0.85, 0.92, 0.97)
STEP_TOKENS, ANSWER_TOKENS = 40, 15


class World:
    """Policy, PPM and sandbox in one: right steps call `good`, wrong ones `bad`, others `fail`."""

    def __init__(self, seed: int, count: int) -> None:
        rng = random.Random(seed)
        self.problems = [
            Problem(id=f"p{n}", source="bench", level=Level.MATH, text=f"Question {n}?", answer="1")
            for n in range(count)
        ]
        self._of = {
            problem.text: (rng.choice(NUM_STEPS), rng.choice(SKILLS)) for problem in self.problems
        }

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        rng = random.Random(request.seed)
        question = request.prompt.split("\n", 2)[1]
        num_steps, skill = self._of[question]
        depth = request.prompt.count(END_OF_STEP) + request.prompt.count(END_OF_CODE)
        texts, num_tokens = [], ANSWER_TOKENS if depth == num_steps else STEP_TOKENS
        for _ in range(request.num_candidates):
            if depth == num_steps:
                said = 2 if "bad(" in request.prompt else 1
                texts.append(f"{ANSWER}\\boxed{{{said}}}{END_OF_ANSWER}")
                continue
            kind = "fail" if rng.random() < 0.1 else "good" if rng.random() < skill else "bad"
            way = int(rng.expovariate(0.6))
            code = f"# step {depth + 1}, way {way}\nx{depth} = {kind}({way})\n"
            last = depth == num_steps - 1
            end = f"print(x{depth})\n{END_OF_CODE}" if last else END_OF_STEP
            texts.append(f"{CODE if depth == 0 else ''}\n{code}{end}")
        completions = tuple(
            Completion(text=text, finish=FinishReason.STOP, num_tokens=num_tokens) for text in texts
        )
        return GenerationReply(completions=completions, prompt_tokens=1, policy_version="bench")

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        values = tuple(
            math.tanh(random.Random(text).gauss(-0.6 if "bad(" in text else 0.6, 0.45))
            for text in request.texts
        )
        return EvaluationReply(values=values, num_tokens=1, preference_version="bench")

    async def open(self, tree_id: str) -> str:
        return tree_id

    async def close(self, tree_id: str) -> None:
        return None

    async def run(self, state: str, codes: Sequence[str]) -> list[StepResult]:
        return [_result(code) for code in codes]

    def search(self, rules: dict[str, Any], *, ppm: bool) -> list[Tree]:
        """A tree of each problem."""

        async def all_of() -> list[Tree]:
            config = SearchConfig(num_answer_candidates=1, **rules)
            searches = (
                run_search(
                    problem,
                    config=config,
                    policy=self,
                    preference=self if ppm else None,
                    sandbox=self,
                    round=3 if ppm else 2,
                    seed=seed,
                    grade=_grade,
                )
                for seed, problem in enumerate(self.problems)
            )
            return list(await asyncio.gather(*searches))

        return asyncio.run(all_of())


def _result(code: str) -> StepResult:
    if "fail(" in code:
        return StepResult(
            status=StepStatus.ERROR, state=None, error_type="NameError", error_message="fail"
        )
    return StepResult(status=StepStatus.OK, state="on", stdout="3\n" if "print(" in code else "")


def _grade(gold: str, answer: str) -> Verdict:
    equal = gold == answer
    return Verdict(equal=equal, reason=Reason.EXACT if equal else Reason.DIFFERENT, path="bench")


def distinct_program_share(pairs: Iterable[PreferencePair]) -> float | None:
    """Distinct programs over distinct texts among the sides of a tree's whole-trajectory pairs."""
    sides: dict[tuple[str, int, int], set[str]] = {}
    for pair in pairs:
        if pair.kind is PairKind.ANSWER:
            tree = sides.setdefault((pair.problem_id, pair.round, pair.tree_index), set())
            tree |= {pair.chosen, pair.rejected}
    programs = sum(len({program_of(parse_response(t)) for t in texts}) for texts in sides.values())
    total = sum(map(len, sides.values()))
    return programs / total if total else None


def facts_of(trees: Sequence[Tree]) -> dict[str, Any]:
    """What bench trees give, and what they cost."""
    pairs = [
        pair
        for tree in trees
        for pair in tree_pairs(tree, template=RSTAR_TEMPLATE, config=PairConfig())
    ]
    steps = [pair for pair in pairs if pair.kind is PairKind.STEP]
    clean = [p for p in steps if "bad(" in p.rejected and "bad(" not in p.prefix + p.chosen]
    inner = [node for tree in trees for node in tree.nodes[1:] if node.expanded and node.num_passes]
    return {
        "deep": deep_share(Counter(str(pair.shared_steps) for pair in steps)),
        "pairs": len(steps) / len(trees),
        "clean": len(clean) / len(steps),
        "one visit": sum(node.num_passes == 1 for node in inner) / len(inner),
        "solved": sum(any(a.correct and a.visit_count for a in t.answers()) for t in trees)
        / len(trees),
        "tokens": sum(tree.generated_tokens for tree in trees) / len(trees),
        "distinct": distinct_program_share(pairs),
    }


def bench_figures(count: int) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    """Facts of each rule and mode; and the keys of the last line."""
    world = World(2, count)
    found = {
        (rule, mode): facts_of(world.search(rules, ppm=mode == "ppm"))
        for mode in ("terminal", "ppm")
        for rule, rules in RULES.items()
    }
    return found, {
        **{f"deep_pair_share_{mode}": found["paper", mode]["deep"] for mode in ("terminal", "ppm")},
        "tokens_vs_released": max(
            found["paper", mode]["tokens"] / found["released", mode]["tokens"]
            for mode in ("terminal", "ppm")
        ),
        "budget_ratio": None,
        "newest_round_share": None,
        "distinct_program_share": min(found["paper", m]["distinct"] for m in ("terminal", "ppm")),
    }


def run_figures(run: Path) -> dict[str, Any]:
    """The keys of the last line, of a finished run.

    Raises:
        SystemExit: the run has no dataset of a round.
    """
    rounds = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["rounds"]
    last = max((n for n in range(1, len(rounds) + 1) if read_manifest(_data(run, n))), default=0)
    if not last:
        raise SystemExit(f"{run}: no round has a dataset")
    pairs: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for number in range(1, last + 1):
        manifest = read_manifest(_data(run, number)) or {}
        of_round = manifest["shape"]["step_pairs"].get(str(number), {})
        pairs[rounds[number - 1]["preference"]].update(of_round)
    origins = Counter(e.round for e in read_sft(_data(run, last), "train") if e.origin == "tree")
    answers = [p for split in ("train", "validation") for p in read_pairs(_data(run, last), split)]
    return {
        "deep_pair_share_terminal": deep_share(pairs[False]),
        "deep_pair_share_ppm": deep_share(pairs[True]),
        "tokens_vs_released": None,
        "budget_ratio": _budget_ratio(run / "evaluations" / f"round={last}.json"),
        "newest_round_share": origins[last] / origins.total() if origins else None,
        "distinct_program_share": distinct_program_share(answers),
    }


def _data(run: Path, number: int) -> Path:
    return run / "datasets" / f"round={number}"


def _budget_ratio(record: Path) -> float | None:
    if not record.is_file():
        return None
    problems = json.loads(record.read_bytes())["problems"]
    searched = [p for p in problems if p["sample_tokens"] and p["search_tokens"]]
    samples = sum(p["sample_tokens"] for p in searched)
    return sum(p["search_tokens"] for p in searched) / samples if samples else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=150, help="bench problems")
    parser.add_argument("--run", type=Path, help="folder of a finished run; null: bench trees")
    arguments = parser.parse_args()
    if arguments.run is not None:
        keys = run_figures(arguments.run)
    else:
        found, keys = bench_figures(arguments.problems)
        columns = list(next(iter(found.values())))
        print(f"{'rule, mode':28}" + "".join(f"{name:>11}" for name in columns))
        for (rule, mode), facts in found.items():
            values = (f"{facts[name]:11,.0f}" if name == "tokens" else f"{facts[name]:11.3f}"
                      for name in columns)  # fmt: skip
            print(f"{rule + ', ' + mode:28}" + "".join(values))
    print(json.dumps(keys))


if __name__ == "__main__":
    main()
