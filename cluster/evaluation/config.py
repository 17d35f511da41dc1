"""What is measured on held-out problems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.fleet.config import GivenModelsConfig
from cluster.folder.config_file import Config
from rollout.methods import Method
from rollout.problem import Level
from rollout.search import SearchConfig


class EvaluationConfig(Config):
    """What is measured on held-out problems after each round."""

    num_problems: int | None = Field(
        None, ge=1, description="first so many test problems, levels balanced; null: all"
    )
    num_rollouts: int = Field(
        8,
        ge=1,
        description="rollouts of search; majority and best-of-N choose among as many samples as "
        "come nearest to its generated tokens",
    )
    num_search_problems: int | None = Field(
        None, ge=1, description="problems for majority, best-of-N and search; null: all"
    )
    num_candidates: int = Field(8, ge=1, description="candidates per expansion of search")
    temperature: float | None = Field(
        None, gt=0.0, description="of samples and search; null: search.temperature"
    )
    vote_top_k: int = Field(4, ge=1, description="answers that vote, best PPM value first")
    max_solution_tokens: int = Field(2048, ge=1, description="generated tokens per sample")
    num_pair_problems: int = Field(
        600,
        ge=1,
        description="most problems held out for pairs that are searched, levels balanced; without "
        "any, most validation problems whose pairs the PPM is measured on",
    )
    min_pair_accuracy: float | None = Field(
        0.55,
        ge=0.0,
        lt=1.0,
        description="a PPM steers the search of the next round only if the lower bound (2.5 %, "
        "over at least 20 problems) of its held-out pair accuracy is above this; null: every PPM "
        "does",
    )

    def searched(self, search: SearchConfig) -> SearchConfig:
        """The search of a run, as it is evaluated."""
        own = {name: getattr(self, name) for name in _OF_SEARCH}
        return search.model_copy(update={n: value for n, value in own.items() if value is not None})


_OF_SEARCH = ("num_candidates", "temperature")
"""Settings of a search that an evaluation has its own of."""


def search_of_run(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Section `search` of a run's stored config, as the run itself is evaluated; {} without one."""
    evaluation = stored.get("evaluation") or {}
    own = {name: evaluation[name] for name in _OF_SEARCH if evaluation.get(name) is not None}
    return {**stored["search"], **own} if "search" in stored else {}


class EvaluateConfig(GivenModelsConfig):
    """Methods on benchmarks with given models: `rstar evaluate`."""

    policy: Path = Field(description="Hugging Face directory of any causal language model")
    benchmarks: list[Path] = Field(
        min_length=1, description="problem files; the name of each without suffix is its name"
    )
    methods: list[Method] = Field(
        default_factory=lambda: [Method.GREEDY],
        min_length=1,
        description="greedy | majority | best-of-n | weighted-majority | beam | mcts; those with "
        "n samples choose among the same ones, weighted-majority wherever best-of-n does",
    )
    trajectories: list[int] = Field(
        default_factory=lambda: [1, 2, 4, 8],
        min_length=1,
        description="budgets: solutions a method may choose among; made once, for the largest",
    )
    limit: int | None = Field(None, ge=1, description="first so many problems of each file")
    default_level: Level = Field(Level.MATH, description="level of rows that name none")
    prompt: Literal["auto", "steps", "chat", "plain"] = Field(
        "auto",
        description="steps: ours, with code; chat: the chat template of the tokenizer; plain: a "
        "question and no template; auto: the first of these that the tokenizer has what it takes "
        "for",
    )
    instruction: str = Field(
        "Please reason step by step, and put your final answer within \\boxed{}.",
        description="added to the question of a chat or plain prompt",
    )
    vote_top_k: int = Field(
        4, ge=1, description="solutions that vote, best PPM value first (released evaluation: 4)"
    )
    logprob_weight: float = Field(
        0.0,
        ge=0.0,
        description="also rank and weigh the samples by PPM and policy together: how much the "
        "policy's mean log-probability of a token counts; needs policy_engine.logprobs; 0: not",
    )
    max_solution_tokens: int = Field(2048, ge=1, description="generated tokens per sample")
    beam_width: int = Field(8, ge=1, description="paths kept after each step of a beam")
    beam_candidates: int = Field(8, ge=1, description="candidates per path and step of a beam")
    rollouts_per_tree: int = Field(
        12, ge=1, description="mcts: a trajectory is a tree of so many rollouts (released: 12)"
    )

    @property
    def width(self) -> int:
        """Trajectories of one beam search."""
        return min(self.beam_width, max(self.trajectories))

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if any(budget < 1 for budget in self.trajectories):
            raise ValueError(f"trajectories must be >= 1, got {self.trajectories}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("methods names a method twice")
        if self.logprob_weight and not self.policy_engine.logprobs:
            raise ValueError("logprob_weight needs policy_engine.logprobs: true")
        return self
