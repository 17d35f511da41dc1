"""Training sets from elsewhere: a Parquet or JSONL file of texts becomes a dataset.

    policy   prompt, response            loss on the response only
    ppm      prompt, chosen, rejected    whole solutions; all rows of one prompt share it

Prompts are taken as they are, or rendered as questions with a prompt template. Optional columns of
the PPM: chosen_q and rejected_q, in [-1, 1], what the regression objective learns of each text; 1
and -1 where there is none. Without a validation file a share of the prompts is held out, by hash:
rows of one prompt never stand on both sides.

A file is read twice, row by row: once to see what of it can be used, once to write that. Rows that
cannot be trained on are left out and counted. Pairs are sorted by prompt on the way, on disk.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from learner.checkpoint import Kind
from learner.dataset import DatasetError, SFTExample, read_rows, unusable, writing_dataset
from learner.pairs import PairKind, PreferencePair, ValuedNode, ValuedStep
from learner.select import DatasetConfig, is_validation
from learner.spill import SortedSpill
from rollout.prompt import PromptTemplate, Segment, render_question

logger = logging.getLogger(__name__)

_Q_COLUMNS = {"chosen_q": 1.0, "rejected_q": -1.0}
"""Name -> what a text counts as that has none."""

COLUMNS = {"policy": ("prompt", "response"), "ppm": ("prompt", "chosen", "rejected")}


def write_plain_dataset(
    kind: Kind,
    train: Path,
    directory: Path,
    *,
    validation: Path | None = None,
    config: DatasetConfig,
    template: PromptTemplate | None = None,
) -> dict[str, Any]:
    """A dataset directory of one kind from files, which are read row by row; returns its manifest.

    Its `excluded` counts the rows that are left out: empty (a column holds no text), unrenderable
    (a lone surrogate, which no file can hold), same_text (chosen is rejected).

    Args:
        validation: held-out rows; None: the `validation_share` of the prompts is.
        template: renders prompts as questions; None: they are used as they are.
    Raises:
        DatasetError: a file or column is missing, a Q-value is not in [-1, 1], no row of a file can
            be used, all texts of a pair set are of one class, or the disk is full.
    """
    counts: Counter[str] = Counter()
    excluded: Counter[str] = Counter()
    name = "sft" if kind == "policy" else "pairs"
    with writing_dataset(directory) as writer:
        for path, held_out in ((train, False), (validation, True)):
            if path is None:
                continue
            left_out = _check(path, kind)
            excluded += left_out
            if left_out:
                logger.warning("rows are left out. file=%s %s", path, _listed(left_out))
            rows = (
                (_example(row, template) for row in _usable_rows(path, kind))
                if kind == "policy"
                else _pairs(path, template, directory)
            )
            for row in rows:
                held = held_out
                if validation is None:
                    held = is_validation(row.problem_id, config)
                if isinstance(row, ValuedNode):
                    if not held:
                        writer.add("steps_train", row)
                        counts["steps_train"] += len(row.steps)
                    continue
                target = f"{name}_{'validation' if held else 'train'}"
                writer.add(target, row)
                counts[target] += 1
        return writer.commit(
            template=template.name if template is not None else None,
            counts={"all": dict(counts)},
            excluded={"all": dict(excluded)},
            info={"files": [str(path) for path in (train, validation) if path is not None]},
        )


def _example(row: dict[str, Any], template: PromptTemplate | None) -> SFTExample:
    return SFTExample(
        problem_id=_problem_id(row["prompt"]),
        level="unknown",
        origin="file",
        round=-1,
        mean_q=1.0,
        segments=(
            Segment(text=_prompt(row["prompt"], template), trained=False),
            Segment(text=row["response"], trained=True),
        ),
    )


def _pairs(
    path: Path, template: PromptTemplate | None, folder: Path
) -> Iterator[PreferencePair | ValuedNode]:
    """Pairs of whole solutions, those of a prompt together, weighted 1 / (chosen * rejected), and
    after them its solutions with their Q-values."""
    with SortedSpill[dict[str, Any]](folder) as spill:
        for number, row in enumerate(_usable_rows(path, "ppm")):
            spill.add((_problem_id(row["prompt"]), number), row)
        for problem_id, group in groupby(spill, key=lambda row: _problem_id(row["prompt"])):
            rows = list(group)
            num_chosen, num_rejected = (
                len({row[side] for row in rows}) for side in ("chosen", "rejected")
            )
            values: dict[str, float] = {}
            for row in rows:
                chosen_q, rejected_q = (
                    float(default if row.get(name) is None else row[name])
                    for name, default in _Q_COLUMNS.items()
                )
                values.setdefault(row["chosen"], chosen_q)
                values.setdefault(row["rejected"], rejected_q)
                yield PreferencePair(
                    problem_id=problem_id,
                    level="unknown",
                    round=-1,
                    tree_index=0,
                    node=0,
                    kind=PairKind.ANSWER,
                    shared_steps=0,
                    prefix=_prompt(row["prompt"], template),
                    chosen=row["chosen"],
                    rejected=row["rejected"],
                    chosen_q=chosen_q,
                    rejected_q=rejected_q,
                    weight=1.0 / (num_chosen * num_rejected),
                )
            if values:
                yield ValuedNode(
                    problem_id=problem_id,
                    level="unknown",
                    round=-1,
                    tree_index=0,
                    node=0,
                    prefix=_prompt(rows[0]["prompt"], template),
                    steps=tuple(ValuedStep(text=text, q=q) for text, q in values.items()),
                )


def _problem_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _prompt(prompt: str, template: PromptTemplate | None) -> str:
    return prompt if template is None else render_question(prompt, template)


def _rows(path: Path) -> Iterator[Any]:
    return read_rows(path, "training file", "training data")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _usable_rows(path: Path, kind: Kind) -> Iterator[Any]:
    return (row for row in _rows(path) if _unusable(row, kind) is None)


def _unusable(row: dict[str, Any], kind: Kind) -> str | None:
    """Why a row cannot be trained on; None: it can."""
    texts: list[Any] = [row.get(name) for name in COLUMNS[kind]]
    if not all(isinstance(text, str) for text in texts):
        return "empty"
    if kind == "ppm" and row["chosen"] == row["rejected"]:
        return "same_text"
    return unusable(texts, trained=texts)


def _listed(counts: Counter[str]) -> str:
    return " ".join(f"{reason}={count}" for reason, count in counts.items())


def _check(path: Path, kind: Kind) -> Counter[str]:
    """Read a file once; why how many of its rows cannot be used. Raises DatasetError: none can."""
    needed = COLUMNS[kind]
    present: set[str] = set()
    left_out: Counter[str] = Counter()
    num_rows = 0
    for number, row in enumerate(_rows(path), start=1):
        if not isinstance(row, dict):
            raise DatasetError(f"{path}: expected one JSON object with named columns per line")
        num_rows = number
        present |= {name for name, value in row.items() if value}
        for name in _Q_COLUMNS if kind == "ppm" else ():
            q = row.get(name)
            if q is not None and not (_is_number(q) and -1.0 <= q <= 1.0):
                raise DatasetError(
                    f"{path}, row {number}: {name} must be a number in [-1, 1], got {q!r}"
                )
        reason = _unusable(row, kind)
        if reason is not None:
            left_out[reason] += 1
    if not num_rows:
        raise DatasetError(f"{path} holds no rows")
    missing = [name for name in needed if name not in present]
    if len(missing) == 1 and missing[0] in ("chosen", "rejected"):
        only = "rejected" if missing[0] == "chosen" else "chosen"
        raise DatasetError(
            f"{path}: only {only} texts, no row has a {missing[0]} one; a PPM needs both classes"
        )
    if missing:
        near = difflib.get_close_matches(missing[0], sorted(present), n=1)
        hint = f"; is it {near[0]!r}?" if near else f"; it has {', '.join(sorted(present))}"
        raise DatasetError(
            f"{path}: no column {missing[0]!r} (a {kind} set has {', '.join(needed)}){hint}"
        )
    if left_out["same_text"] == num_rows:
        raise DatasetError(
            f"{path}: chosen and rejected are the same text in all {num_rows} rows; a PPM needs "
            "both classes"
        )
    if left_out.total() == num_rows:
        raise DatasetError(f"{path}: no row can be trained on: {_listed(left_out)}")
    return left_out
