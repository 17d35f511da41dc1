"""Are the miniature's mistakes of structure, and does only the question tell that they are ones?

    python -m bench.world [RUN...] [--seed S] [--problems N] [--rounds R...]

    RUN     --> the preference pairs its trees gave --+
    no RUN  --> written solution over each of its ----+--> shares --> gates
                misreadings, of generated problems

Without a run the pairs are what a confused policy writes: the program of the same problem with one
phrase taken for another, from the first step that differs and as whole trajectories. With runs they
are what policies did write (all pairs of their datasets, of the rounds asked for).

A table of each kind of pair, then one JSON object on the last line, with the gates:

    number_only   share of pairs whose two sides are alike once numbers are masked     < 0.3
    blind         pairs ranked right by who never sees the question (n-grams)          < 0.6
    form          the same with numbers masked                                         < 0.6
    length        the same from the number of tokens and lines alone                   < 0.6

`blind`, `form` and `length` are pairwise logistic fits (Bradley-Terry), measured on problems the
fit has not seen (five folds over problems). A linear fit of n-grams is a lower bound of what can be
known without the question. Exit status 1 if a gate does not hold.

Not covered: shortcuts that need more than neighbouring tokens, as calculating the result.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from cluster.folder.run_folder import RunFolder
from learner.dataset import read_pairs
from rollout.problems.miniature import generate
from rollout.problems.miniature_checked import FAMILIES
from rollout.prompt import ASSISTANT, parse_response

GATES = {"number_only": 0.3, "blind": 0.6, "form": 0.6, "length": 0.6}
"""Each share has to stay below."""

FOLDS = 5
_RIDGE = 1.0
_NUMBER = re.compile(r"\d+")
_TOKEN = re.compile(r"<\w+>|[^\W\d_]+|\d{1,2}|\n|[^\w\s]+")


@dataclass(frozen=True)
class Comparison:
    """A pair without its question."""

    problem: str
    kind: str
    shared: str
    """Steps that both sides follow."""
    chosen: str
    rejected: str

    @property
    def number_only(self) -> bool:
        return _masked(self.chosen) == _masked(self.rejected)


def run_comparisons(run: Path, rounds: Sequence[int] | None) -> list[Comparison]:
    """The pairs in a run's datasets, each text once; `rounds` None: of all its rounds.

    Raises:
        DatasetError: the run has no complete dataset of a round that was asked for.
    """
    folder = RunFolder(run)
    last = next(number for number in count(1) if not folder.dataset(number).exists())
    found = {
        Comparison(
            pair.problem_id,
            pair.kind.value,
            pair.prefix.rpartition(ASSISTANT)[2],
            pair.chosen,
            pair.rejected,
        ): None
        for number in rounds or range(1, last)
        for split in ("train", "validation")
        for pair in read_pairs(folder.dataset(number), split)
        if rounds is None or pair.round in rounds
    }
    return list(found)


def generated_comparisons(*, seed: int, num_problems: int) -> list[Comparison]:
    """Each written solution over its misreadings: whole, and from the first step that differs."""
    miniature = generate(
        seed=seed,
        num_demonstrations=0,
        num_train=num_problems,
        num_test=0,
        families=list(FAMILIES),
    )
    found = []
    for problem in miniature.train:
        right = [step.rendered for step in parse_response(problem.solution)]
        for trajectory in problem.misreadings:
            wrong = [step.rendered for step in parse_response(trajectory)]
            place = next(i for i, (r, w) in enumerate(zip(right, wrong, strict=True)) if r != w)
            sides = (
                ("step", "".join(right[:place]), right[place], wrong[place]),
                ("answer", "", problem.solution, trajectory),
            )
            found += [Comparison(problem.id, *side) for side in sides]
    return found


def shares(pairs: Sequence[Comparison], *, seed: int = 0) -> dict[str, float]:
    """The figures of `GATES` (see the module's text) of pairs of two problems or more."""
    return {
        "number_only": float(np.mean([pair.number_only for pair in pairs])),
        "blind": ranked_right(pairs, _ngrams, seed=seed),
        "form": ranked_right(pairs, lambda text: _ngrams(_masked(text)), seed=seed),
        "length": ranked_right(pairs, _counts, seed=seed),
    }


def ranked_right(
    pairs: Sequence[Comparison], features: Callable[[str], Counter[str]], *, seed: int
) -> float:
    """Share of pairs that a logistic fit of the difference of `features` ranks right.

    Each problem is judged by a fit of the others; a pair without a difference counts half.
    """
    columns: dict[str, int] = {}
    rows, cols, values = [], [], []
    for row, pair in enumerate(pairs):
        difference = features(pair.shared + pair.chosen)
        difference.subtract(features(pair.shared + pair.rejected))
        for name, value in difference.items():
            if value:
                rows.append(row)
                cols.append(columns.setdefault(name, len(columns)))
                values.append(float(value))
    matrix = csr_matrix((values, (rows, cols)), shape=(len(pairs), max(1, len(columns))))
    fold = np.array([zlib.crc32(f"{seed}/{pair.problem}".encode()) % FOLDS for pair in pairs])
    right = np.full(len(pairs), 0.5)
    for number in range(FOLDS):
        seen, new = matrix[fold != number], matrix[fold == number]
        if seen.shape[0] and new.shape[0]:
            right[fold == number] = (1 + np.sign(new @ _fit(seen))) / 2
    return float(right.mean())


def _fit(differences: csr_matrix) -> np.ndarray:
    """Weights [columns] that maximise sum log sigmoid(differences @ w) - ridge / 2 |w|^2."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = differences @ weights
        gradient = differences.T @ (-1 / (1 + np.exp(np.clip(margin, -50, 50))))
        return (
            float(np.logaddexp(0, -margin).sum() + _RIDGE / 2 * weights @ weights),
            gradient + _RIDGE * weights,
        )

    start = np.zeros(differences.shape[1])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def _masked(text: str) -> str:
    return _NUMBER.sub("#", text)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.replace("#", " # "))


def _ngrams(text: str) -> Counter[str]:
    """How often each run of one to three tokens occurs."""
    tokens = _tokens(text)
    return Counter(
        " ".join(tokens[place : place + size])
        for size in (1, 2, 3)
        for place in range(len(tokens) - size + 1)
    )


def _counts(text: str) -> Counter[str]:
    return Counter(tokens=len(_tokens(text)), lines=text.count("\n"))


def report(pairs: Sequence[Comparison], *, seed: int = 0) -> dict[str, Any]:
    """The figures of all pairs and of each kind, and which gates do not hold."""
    figures = {}
    for kind in ("all", *sorted({pair.kind for pair in pairs})):
        some = [pair for pair in pairs if kind in ("all", pair.kind)]
        counts = {"pairs": len(some), "problems": len({pair.problem for pair in some})}
        figures[kind] = counts | shares(some, seed=seed)
    failed = [name for name, limit in GATES.items() if not figures["all"][name] < limit]
    return {"kinds": figures, "gates": GATES, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", help="run folders; none: generate a world")
    parser.add_argument("--seed", type=int, default=3, help="of the generated world and the folds")
    parser.add_argument("--problems", type=int, default=600, help="generated ones")
    parser.add_argument("--rounds", type=int, nargs="+", help="of the runs; default: all")
    arguments = parser.parse_args()
    try:
        pairs = [c for run in arguments.runs for c in run_comparisons(run, arguments.rounds)]
        if not arguments.runs:
            pairs = generated_comparisons(seed=arguments.seed, num_problems=arguments.problems)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    if not pairs:
        raise SystemExit("no pairs: no tree had right and wrong answers")
    found = report(pairs, seed=arguments.seed)
    table = Table(title="pairs, and what is known without the question", box=box.SIMPLE)
    for column in ("", "pairs", "problems", *GATES):
        table.add_column(column, justify="right" if column else "left")
    for kind, figures in found["kinds"].items():
        counts = (str(figures["pairs"]), str(figures["problems"]))
        table.add_row(kind, *counts, *(f"{figures[name]:.3f}" for name in GATES))
    table.add_row("gate", "", "", *(f"< {limit}" for limit in GATES.values()))
    Console().print(table)
    print(json.dumps(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
