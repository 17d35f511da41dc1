"""Training sets from elsewhere: a Parquet or JSONL file of texts becomes a dataset.

    policy   prompt, response            loss on the response only
    ppm      prompt, chosen, rejected    whole solutions; all rows of one prompt share it

Prompts are taken as they are, or rendered as questions with a prompt template. Optional columns of
the PPM: chosen_q and rejected_q, in [-1, 1], for the regression objective. Without a validation
file a share of the prompts is held out, by hash: rows of one prompt never stand on both sides.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from learner.checkpoint import Kind
from learner.dataset import Dataset, DatasetConfig, DatasetError, SFTExample, is_validation
from learner.pairs import PairKind, PreferencePair
from rollout.prompt import PromptTemplate, Segment, render_question

COLUMNS = {"policy": ("prompt", "response"), "ppm": ("prompt", "chosen", "rejected")}


def plain_dataset(
    kind: Kind,
    train: Path,
    validation: Path | None = None,
    *,
    config: DatasetConfig,
    template: PromptTemplate | None = None,
) -> Dataset:
    """A dataset of one kind from files.

    Args:
        validation: held-out rows; None: the `validation_share` of the prompts is.
        template: renders prompts as questions; None: they are used as they are.
    Raises:
        DatasetError: a file or column is missing, a row is empty, or all texts of a pair set are of
            one class.
    """
    if kind == "policy":
        found = [_example(row, template) for row in _read(train, kind)]
        held = [_example(row, template) for row in _read(validation, kind)] if validation else None
        sft_train, sft_validation = _split(found, held, config)
        return _dataset(template, sft_train=sft_train, sft_validation=sft_validation)
    pairs = _pairs(train, template)
    held_pairs = _pairs(validation, template) if validation else None
    pairs_train, pairs_validation = _split(pairs, held_pairs, config)
    return _dataset(template, pairs_train=pairs_train, pairs_validation=pairs_validation)


def _dataset(template: PromptTemplate | None, **lists: Any) -> Dataset:
    names = ("sft_train", "sft_validation", "pairs_train", "pairs_validation")
    filled = {name: lists.get(name, []) for name in names}
    counts = {name: len(rows) for name, rows in filled.items() if rows}
    return Dataset(
        template=template.name if template is not None else None,
        **filled,
        counts={"all": counts},
        excluded={"all": {}},
    )


def _split(
    found: list[Any], held: list[Any] | None, config: DatasetConfig
) -> tuple[list[Any], list[Any]]:
    if held is not None:
        return found, held
    return (
        [row for row in found if not is_validation(row.problem_id, config)],
        [row for row in found if is_validation(row.problem_id, config)],
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


def _pairs(path: Path, template: PromptTemplate | None) -> list[PreferencePair]:
    """Pairs of whole solutions, weighted 1 / (chosen * rejected) of their prompt."""
    rows = list(_read(path, "ppm"))
    same = sum(row["chosen"] == row["rejected"] for row in rows)
    if same == len(rows):
        raise DatasetError(
            f"{path}: chosen and rejected are the same text in all {same} rows; a PPM needs both "
            "classes"
        )
    by_prompt: dict[str, tuple[set[str], set[str]]] = {}
    for row in rows:
        chosen, rejected = by_prompt.setdefault(row["prompt"], (set(), set()))
        chosen.add(row["chosen"])
        rejected.add(row["rejected"])
    return [
        PreferencePair(
            problem_id=_problem_id(row["prompt"]),
            level="unknown",
            round=-1,
            tree_index=0,
            node=0,
            kind=PairKind.ANSWER,
            prefix=_prompt(row["prompt"], template),
            chosen=row["chosen"],
            rejected=row["rejected"],
            chosen_q=float(row.get("chosen_q") or 1.0),
            rejected_q=float(row.get("rejected_q") or -1.0),
            weight=1.0 / (len(by_prompt[row["prompt"]][0]) * len(by_prompt[row["prompt"]][1])),
        )
        for row in rows
        if row["chosen"] != row["rejected"]
    ]


def _problem_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _prompt(prompt: str, template: PromptTemplate | None) -> str:
    return prompt if template is None else render_question(prompt, template)


def _read(path: Path, kind: Kind) -> Iterable[dict[str, Any]]:
    """Checked rows of a file."""
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    except FileNotFoundError:
        raise DatasetError(f"no training file {path}") from None
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read training data from {path}: {error}") from error
    if not rows:
        raise DatasetError(f"{path} holds no rows")
    if not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{path}: expected one JSON object with named columns per line")
    needed = COLUMNS[kind]
    present = {name for row in rows for name, value in row.items() if value}
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
    for number, row in enumerate(rows, start=1):
        bad = [name for name in needed if not isinstance(row.get(name), str) or not row[name]]
        if bad:
            raise DatasetError(f"{path}, row {number}: {bad[0]} is empty or no text")
    return rows
