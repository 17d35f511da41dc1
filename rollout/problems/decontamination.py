"""Does a training problem stand in a benchmark? By text, by 13-grams, and is the answer the same?

    benchmark files --> index: keys of identity, every run of 13 words and numbers
    batch of problems --> hits: benchmark, its problem, what is shared, whether the answers agree

Two tests name a hit:

    text     the same text but for layout and white space; the only test of texts under 13 words
    13-gram  a run of 13 words and numbers is shared (as GPT-3, arXiv 2005.14165, appendix C)

and near-duplicates (`duplicates`), found when the set is complete, are a third:

    near     same numbers, same answer, 0.7 of the runs of three tokens shared

Of a run it counts that it is *distinctive*: one that stands in more than 3 different problems of
one benchmark ("where m and n are relatively prime positive integers. Find m + n") tells nothing. A
problem has a run for each of its words but twelve, so a copy still has others.

Every hit is reported with the answers of both sides and whether they agree, by normalised text or,
failing that, by the same check that grades a trajectory. A 13-gram alone is enough to remove a
problem by default; `DecontaminationRule.SAME_ANSWER` removes only where the answers agree as well,
or the text is the same.

Not covered: rewordings and translations of benchmark problems; problems under 13 words that were
changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from rollout.problem import DecontaminationRule
from rollout.problems.text import (
    NGRAM,
    Hashes,
    Places,
    TokenBatch,
    answer_key,
    folded,
    problem_key,
    spans,
    tokenise,
    word_ngrams,
)
from verifier import answers_match

MAX_PROBLEMS_WITH_NGRAM = 3
"""A run of words in more different problems of one benchmark than this names none of them. Counted
within a benchmark, because one problem may stand in many, each time laid out otherwise."""


class HitKind(StrEnum):
    """How a benchmark problem was recognised."""

    TEXT = "text"
    NGRAM = "13-gram"
    NEAR = "near"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkProblem:
    """One problem that must not be trained on."""

    benchmark: str
    id: str
    text: str
    answer: str
    answers_alt: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A problem that shares something with a benchmark."""

    row: int
    """Which problem of the batch."""
    benchmark: BenchmarkProblem
    kind: HitKind
    matched: str
    """The first distinctive run of words shared, as it stands in the problem."""
    overlap: float
    """Of the benchmark problem's runs of 13, the share that the problem has too, or of a near
    duplicate's three-token runs; 1 for the same text."""
    same_answer: bool

    def removes(self, rule: DecontaminationRule) -> bool:
        return rule is DecontaminationRule.ANY or self.same_answer or self.kind is HitKind.TEXT


class BenchmarkIndex:
    """Every benchmark problem, ready to be looked for in batches."""

    def __init__(self, problems: Sequence[BenchmarkProblem]) -> None:
        self.problems = list(problems)
        self._by_key: dict[int, list[int]] = {}
        for number, problem in enumerate(self.problems):
            self._by_key.setdefault(problem_key(problem.text), []).append(number)
        batch = tokenise([problem.text for problem in self.problems])
        hashes, owners, _ = word_ngrams(batch)
        self.common = self._common(hashes, owners)
        kept = ~np.isin(hashes, self.common)
        pairs = np.unique(np.stack((hashes[kept], owners[kept].astype(np.uint64)), axis=1), axis=0)
        self._hashes, self._owners = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
        self._num_ngrams = np.bincount(self._owners, minlength=len(self.problems))

    def _common(self, hashes: Hashes, owners: Places) -> Hashes:
        """Runs of words in too many different texts of one benchmark."""
        texts = np.empty(len(self.problems), np.int64)
        for text, numbers in enumerate(self._by_key.values()):
            texts[numbers] = text
        names = np.array([problem.benchmark for problem in self.problems])
        found = []
        for name in np.unique(names):
            own = (names == name)[owners]
            seen = np.stack((hashes[own], texts[owners[own]].astype(np.uint64)), axis=1)
            values, counts = np.unique(np.unique(seen, axis=0)[:, 0], return_counts=True)
            found.append(values[counts > MAX_PROBLEMS_WITH_NGRAM])
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)

    def hits(
        self, texts: Sequence[str], answers: Sequence[str], keys: Hashes, batch: TokenBatch
    ) -> list[Hit]:
        """The hits of a batch: for each problem and benchmark the one with most in common.

        Args:
            keys: [B] `problem_key` of the texts.
            batch: their tokens.
        """
        best: dict[tuple[int, str], Hit] = {}

        def offer(row: int, number: int, kind: HitKind, matched: str, overlap: float) -> None:
            problem = self.problems[number]
            hit = Hit(
                row=row,
                benchmark=problem,
                kind=kind,
                matched=matched,
                overlap=overlap,
                same_answer=agree(problem, answers[row]),
            )
            old = best.get((row, problem.benchmark))
            if old is None or _rank(hit) > _rank(old):
                best[row, problem.benchmark] = hit

        for row, key in enumerate(keys.tolist()):
            for number in self._by_key.get(key, ()):
                offer(row, number, HitKind.TEXT, beginning(texts[row]), 1.0)
        for row, number, count, place in self._shared(batch):
            old = best.get((row, self.problems[number].benchmark))
            overlap = count / int(self._num_ngrams[number])
            if old is None or (old.kind is not HitKind.TEXT and old.overlap <= overlap):
                offer(row, number, HitKind.NGRAM, _run(texts[row], place), overlap)
        return [best[place] for place in sorted(best)]

    def _shared(self, batch: TokenBatch) -> list[tuple[int, int, int, int]]:
        """(row, benchmark problem, number of shared runs, first shared word) of a batch."""
        hashes, rows, places = word_ngrams(batch)
        if not len(self._hashes) or not len(hashes):
            return []
        begins = np.searchsorted(self._hashes, hashes, "left")
        present = begins < len(self._hashes)
        present[present] = self._hashes[begins[present]] == hashes[present]
        hashes, rows = hashes[present], rows[present]
        places, begins = places[present], begins[present]
        ends = np.searchsorted(self._hashes, hashes, "right")
        first: dict[tuple[int, int], int] = {}
        shared: dict[tuple[int, int], set[int]] = {}
        columns = [column.tolist() for column in (hashes, rows, places, begins, ends)]
        for value, row, place, begin, end in zip(*columns, strict=True):
            for number in self._owners[begin:end].tolist():
                first.setdefault((row, number), place)
                shared.setdefault((row, number), set()).add(value)
        return [
            (row, number, len(values), first[row, number])
            for (row, number), values in shared.items()
        ]


def agree(problem: BenchmarkProblem, answer: str) -> bool:
    """Whether an answer is one of a benchmark problem's."""
    golds = [gold for gold in (problem.answer, *problem.answers_alt) if gold]
    own = answer_key(answer)
    return any(answer_key(gold) == own for gold in golds) or any(
        answers_match(gold, answer) for gold in golds
    )


def beginning(text: str) -> str:
    """What is quoted of a text that is matched as a whole."""
    return " ".join(text.split())[:200]


def _rank(hit: Hit) -> tuple[bool, bool, float]:
    return hit.kind is HitKind.TEXT, hit.same_answer, hit.overlap


def _run(text: str, place: int) -> str:
    low = folded(text)
    found = spans(low)[place : place + NGRAM]
    return " ".join(low[found[0][0] : found[-1][1]].split())
