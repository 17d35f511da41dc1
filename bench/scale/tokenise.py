"""What tokenising a dataset takes, with a real tokenizer on one core.

    tokenise_s_per_1m_texts        CPU seconds for a million trajectories of the policy
    tokenise_ppm_s_per_1m_texts    likewise of the PPM's texts, prefix included
    tokenise_tokens_per_text       of the policy's

Texts are the trajectories and pairs of made trees (`bench.scale.made`), in pieces of the size a
rank takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bench.scale.made import made_trees
from learner.batch import nodes_of, tokenise_pairs, tokenise_texts
from learner.candidates import find
from learner.select import DatasetConfig, recipe_of
from learner.task import _TEXTS
from rollout.prompt import MARKERS, RSTAR_TEMPLATE, render_segments

MADE = 32


def measure(tokenizer: Path = Path("models/SmolLM2-135M-Instruct")) -> dict[str, float]:
    """The figures above, with the tokenizer in a folder.

    Raises:
        OSError: there is none.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.add_tokens(list(MARKERS), special_tokens=True)
    recipe = recipe_of(DatasetConfig(trajectories_per_problem=16), RSTAR_TEMPLATE)
    found = [find(tree, recipe) for tree in made_trees(MADE)]
    texts = [
        render_segments(one.tree.problem.text, trajectory.steps, RSTAR_TEMPLATE)
        for one in found
        for _, trajectory in one.programs
    ]
    nodes = list(nodes_of(pair for one in found for pair in one.pairs))
    tokenise_texts(loaded, texts[:8])
    policy_s, tokenised = spent(lambda some: tokenise_texts(loaded, some), texts)
    ppm_s, groups = spent(lambda some: tokenise_pairs(loaded, chain.from_iterable(some)), nodes)
    return {
        "tokenise_s_per_1m_texts": 1e6 * policy_s / len(texts),
        "tokenise_ppm_s_per_1m_texts": 1e6 * ppm_s / sum(len(group.texts) for group in groups),
        "tokenise_tokens_per_text": sum(text.length for text in tokenised) / len(texts),
    }


def spent(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and all that it gave."""
    begun = time.process_time()
    made = [work(items[at : at + _TEXTS]) for at in range(0, len(items), _TEXTS)]
    return time.process_time() - begun, list(chain.from_iterable(made))
