"""The miniature: a seeded world of small problems on which the whole loop runs on a CPU.

18 families with five paraphrases each write demonstrations, training problems, a held-out test set
and problems held out for pairs as Parquet files. They are one more problem source: nothing
downstream knows of it. Twelve families (`miniature_families`) say all in the question: what is hard
is to read it, and mistakes are wrong numbers mostly. Six (`miniature_checked`), two problems
of five, leave one thing open that only the result decides: a policy has to guess, and who sees the
executed check can judge.

    family --draw numbers, names, nouns--> Draft (five phrasings, steps, answer)
           --pick a paraphrase-----------> MiniatureProblem

Why a loop can improve here: paraphrases are long-tailed in the demonstrations (8:6:2:1:1)
and uniform in the training and test problems, so a policy trained on the
demonstrations knows common phrasings well and rare ones badly; search reaches the rare ones and
training on what it finds closes the gap. Of `compose` problems, which nest three operations,
demonstrations show half of the 24 combinations.

Invariants: a seed and the counts decide every byte; no problem text occurs twice, within a file or
between files; the test set does not depend on how many demonstrations or training problems are
asked for. The answer is worked out beside the written solution, not by running it, so running a
solution checks both.

A solution is a trajectory as `rollout.prompt` reads it. Not covered: solutions with mistakes,
problems whose answer is not a rational number, more than one solution of a problem.
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.files import replacing
from rollout.problem import Level
from rollout.problems import miniature_checked, miniature_families
from rollout.problems.miniature_draft import NUM_PARAPHRASES, Draft, Draw, Family
from rollout.prompt import (
    ANSWER,
    CODE,
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_STEP,
    output_block,
)

SOURCE = "miniature"
"""The `source` of every problem of the miniature."""


FAMILIES: Mapping[str, Family] = {
    name: family
    for level in Level
    for families in (miniature_families.FAMILIES, miniature_checked.FAMILIES)
    for name, family in families.items()
    if family.level is level
}
"""Every family by name, in level order."""

DEMONSTRATION_WEIGHTS = (8, 6, 2, 1, 1)
"""How often each paraphrase occurs in the demonstrations; elsewhere all are as frequent."""

MAX_DRAWS_PER_PROBLEM = 1000
"""After so many repeated texts a family is taken to be exhausted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniatureProblem:
    """A generated problem with its written solution."""

    id: str
    level: Level
    text: str
    answer: str
    solution: str
    """A whole trajectory: steps, output block, answer sentence."""
    family: str
    paraphrase: int
    """Which of the family's phrasings, from 0 (most common in demonstrations)."""
    misreadings: tuple[str, ...] = ()
    """Whole trajectories of who guesses wrong what the question leaves open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miniature:
    """The sets, each balanced over levels, families and (by weight) paraphrases."""

    demonstrations: tuple[MiniatureProblem, ...]
    train: tuple[MiniatureProblem, ...]
    test: tuple[MiniatureProblem, ...]
    pairs: tuple[MiniatureProblem, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniatureFiles:
    """Where `write_miniature` left the sets."""

    demonstrations: Path
    train: Path
    test: Path
    pairs: Path | None
    """None: there are none."""


def generate(
    *,
    seed: int,
    num_demonstrations: int,
    num_train: int,
    num_test: int,
    num_pairs: int = 0,
    families: Sequence[str] | None = None,
) -> Miniature:
    """Draw the sets of a miniature.

    Args:
        seed: with the other arguments it decides every problem.
        num_demonstrations: paraphrases weighted by `DEMONSTRATION_WEIGHTS`.
        num_train: paraphrases uniform.
        num_test: paraphrases uniform.
        num_pairs: likewise, held out for preference pairs.
        families: subset of `FAMILIES`; None takes all 18.
    Raises:
        ValueError: a count is negative, a family is unknown or named twice
            or cannot give that many different problems.
    """
    chosen = _check_families(families)
    for name, count in (
        ("num_demonstrations", num_demonstrations),
        ("num_train", num_train),
        ("num_test", num_test),
        ("num_pairs", num_pairs),
    ):
        if count < 0:
            raise ValueError(f"{name} must be >= 0, got {count}")
    uniform = (1,) * NUM_PARAPHRASES
    taken: set[str] = set()
    # The order matters: what comes first cannot depend on the counts of what comes later.
    test = _generate_split("test", seed, num_test, chosen, uniform, taken)
    demonstrations = _generate_split(
        "demonstrations", seed, num_demonstrations, chosen, DEMONSTRATION_WEIGHTS, taken
    )
    train = _generate_split("train", seed, num_train, chosen, uniform, taken)
    pairs = _generate_split("pairs", seed, num_pairs, chosen, uniform, taken)
    return Miniature(demonstrations=demonstrations, train=train, test=test, pairs=pairs)


def write_miniature(directory: str | os.PathLike[str], miniature: Miniature) -> MiniatureFiles:
    """Write `demonstrations.parquet`, `train.parquet` and `test.parquet` into `directory`, and
    `pairs.parquet` if there are any.

    Columns: id, source, level, problem, answer, family, paraphrase; demonstrations also have
    solution. Files that exist are replaced, each whole or not at all.

    Raises:
        OSError: the directory cannot be written.
    """
    root = Path(directory)
    files = MiniatureFiles(
        demonstrations=root / "demonstrations.parquet",
        train=root / "train.parquet",
        test=root / "test.parquet",
        pairs=root / "pairs.parquet" if miniature.pairs else None,
    )
    _write_parquet(files.demonstrations, miniature.demonstrations, with_solution=True)
    _write_parquet(files.train, miniature.train, with_solution=False)
    _write_parquet(files.test, miniature.test, with_solution=False)
    if files.pairs is not None:
        _write_parquet(files.pairs, miniature.pairs, with_solution=False)
    return files


def render_solution(
    steps: Sequence[tuple[str, str]], answer: int | Fraction, check: bool | None = None
) -> str:
    """A whole trajectory of (thought, code) steps.

    What the last one assigns is printed by a step of its own; with a `check` it prints both itself,
    and the answer repeats the check.
    """
    if check is None:
        result = steps[-1][1].splitlines()[-1].split(" = ")[0]
        steps = (*steps, ("Now print the final answer", f"print({result})"))
        output, repeated = str(answer), ""
    else:
        output, repeated = f"{answer} {check}", f", multiple: {check}"
    parts = [CODE]
    for number, (thought, code) in enumerate(steps, start=1):
        end = END_OF_STEP if number < len(steps) else END_OF_CODE
        parts.append(f"\n# Step {number}: {thought}\n{code}\n{end}")
    parts.append(output_block(output))
    parts.append(f"{ANSWER}The answer is \\boxed{{{answer}}}{repeated}{END_OF_ANSWER}")
    return "".join(parts)


def _check_families(families: Sequence[str] | None) -> dict[str, Family]:
    if families is None:
        return dict(FAMILIES)
    if not families:
        raise ValueError("families is empty; leave it out to take all")
    for name in families:
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown family {name!r}{hint} (known: {', '.join(FAMILIES)})")
    if len(set(families)) != len(families):
        raise ValueError(f"families names one twice: {', '.join(families)}")
    # Registry order, so that the order in a config file decides nothing.
    return {name: family for name, family in FAMILIES.items() if name in set(families)}


def _generate_split(
    split: str,
    seed: int,
    count: int,
    families: Mapping[str, Family],
    weights: Sequence[int],
    taken: set[str],
) -> tuple[MiniatureProblem, ...]:
    """`count` problems whose texts are not in `taken`, which grows by theirs."""
    drawn: list[tuple[str, int, str, Draft]] = []
    for family, num_problems in _spread_over_levels(count, families).items():
        rng = random.Random(f"miniature/{seed}/{split}/{family}")
        for paraphrase in _paraphrase_plan(num_problems, weights, rng):
            text, draft = _draw_new(family, families[family], paraphrase, rng, split, taken)
            drawn.append((family, paraphrase, text, draft))
    random.Random(f"miniature/{seed}/{split}").shuffle(drawn)
    return tuple(
        MiniatureProblem(
            id=f"miniature-{split}-{index:06d}",
            level=families[family].level,
            text=text,
            answer=str(draft.answer),
            solution=render_solution(draft.steps, draft.answer, draft.check),
            family=family,
            paraphrase=paraphrase,
            misreadings=tuple(
                render_solution(wrong.steps, wrong.answer, wrong.check)
                for wrong in draft.misreadings
            ),
        )
        for index, (family, paraphrase, text, draft) in enumerate(drawn)
    )


def _draw_new(
    name: str, family: Family, paraphrase: int, rng: random.Random, split: str, taken: set[str]
) -> tuple[str, Draft]:
    draw = Draw(rng, demonstration=split == "demonstrations")
    for _ in range(MAX_DRAWS_PER_PROBLEM):
        draft = family.draft(draw)
        text = draft.phrasings[paraphrase]
        if text not in taken:
            taken.add(text)
            return text, draft
    raise ValueError(
        f"family {name!r} ran out of new problems for {split} "
        f"({MAX_DRAWS_PER_PROBLEM} draws in a row were repeats); ask for fewer"
    )


def _spread_over_levels(count: int, families: Mapping[str, Family]) -> dict[str, int]:
    """How many problems each family gives: equal over levels, then by weight within a level."""
    by_level: dict[Level, list[str]] = {}
    for name, family in families.items():
        by_level.setdefault(family.level, []).append(name)
    result: dict[str, int] = {}
    for level_count, members in zip(
        _apportion(count, [1] * len(by_level)), by_level.values(), strict=True
    ):
        weights = [families[name].weight for name in members]
        result.update(zip(members, _apportion(level_count, weights), strict=True))
    return result


def _paraphrase_plan(count: int, weights: Sequence[int], rng: random.Random) -> list[int]:
    """The paraphrase of each problem; apportioned, not drawn, so that seeds differ less."""
    quotas = _apportion(count, weights)
    plan = [paraphrase for paraphrase, quota in enumerate(quotas) for _ in range(quota)]
    rng.shuffle(plan)
    return plan


def _apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Integers in proportion to `weights` that sum to `total` (largest remainders)."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    order = sorted(
        range(len(weights)), key=lambda index: (-(total * weights[index] % whole), index)
    )
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _write_parquet(
    path: Path, problems: Sequence[MiniatureProblem], *, with_solution: bool
) -> None:
    columns: dict[str, pa.Array] = {
        "id": pa.array([problem.id for problem in problems], pa.string()),
        "source": pa.array([SOURCE] * len(problems), pa.string()),
        "level": pa.array([problem.level.value for problem in problems], pa.string()),
        "problem": pa.array([problem.text for problem in problems], pa.string()),
        "answer": pa.array([problem.answer for problem in problems], pa.string()),
    }
    if with_solution:
        columns["solution"] = pa.array([problem.solution for problem in problems], pa.string())
    columns["family"] = pa.array([problem.family for problem in problems], pa.string())
    columns["paraphrase"] = pa.array([problem.paraphrase for problem in problems], pa.int32())
    with replacing(path) as hidden:
        pq.write_table(pa.table(columns), hidden)
