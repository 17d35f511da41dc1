"""What selection takes of trees, read back from the files it writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.dataset import (
    Demonstration,
    SFTExample,
    read_pairs,
    read_sft,
    read_valued_nodes,
)
from learner.pairs import PreferencePair, ValuedNode
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import SHORT_TEMPLATE, PromptTemplate
from rollout.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows of a dataset, with its manifest."""

    sft_train: list[SFTExample]
    sft_validation: list[SFTExample]
    pairs_train: list[PreferencePair]
    pairs_validation: list[PreferencePair]
    steps_train: list[ValuedNode]
    manifest: dict[str, Any]


def rows_of(directory: Path, manifest: dict[str, Any]) -> Rows:
    """The rows in a dataset directory."""
    return Rows(
        sft_train=list(read_sft(directory, "train")),
        sft_validation=list(read_sft(directory, "validation")),
        pairs_train=list(read_pairs(directory, "train")),
        pairs_validation=list(read_pairs(directory, "validation")),
        steps_train=list(read_valued_nodes(directory)),
        manifest=manifest,
    )


def selected(
    trees: Iterable[Tree],
    *,
    template: PromptTemplate = SHORT_TEMPLATE,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    valued_steps: bool = False,
) -> Rows:
    """What `select_dataset` writes, by way of a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = select_dataset(
            trees,
            folder,
            template=template,
            config=config,
            demonstrations=demonstrations,
            valued_steps=valued_steps,
        )
        return rows_of(Path(folder), manifest)
