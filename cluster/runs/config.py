"""One YAML file is one run: `RunConfig` composes every package's config.

docs/configuration.md, made by `tools.config_reference`, lists every key;
`cluster.folder.config_file` reads the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import EndpointConfig, EngineConfig
from cluster.evaluation.config import EvaluationConfig
from cluster.fleet.config import (
    TRACKING,
    ActorConfig,
    GivenModelsConfig,
    ServingConfig,
    StorageConfig,
    check_run_dir,
)
from cluster.folder.config_file import Config, Place
from cluster.telemetry.exporter import MetricsConfig
from cluster.telemetry.trackers import TrackerName
from learner.fit import PolicyTrainConfig, PreferenceTrainConfig
from learner.select import DatasetConfig
from rollout.methods import MethodConfig
from rollout.problem import Level
from rollout.search import SearchConfig, TerminalValue


class MiniatureConfig(Config):
    """The CPU-sized world: made-up word problems and a policy trained from scratch on them."""

    num_demonstrations: int = Field(450, ge=1, description="written solutions for the cold start")
    num_train: int = Field(600, ge=1, description="problems to search")
    num_test: int = Field(300, ge=1, description="held-out problems")
    num_pair_problems: int = Field(
        0, ge=0, description="problems held out to measure the PPM on; 0: none"
    )
    families: list[str] | None = Field(None, description="problem families; null: all 18")
    seed: int | None = Field(None, description="of the world; null: the run's seed")


class ProblemsConfig(Config):
    """Where the problems come from: files, or the miniature's generator."""

    train: list[Place] = Field(default_factory=list, description="problem files to search")
    test: Place | None = Field(None, description="held-out problem file; null: no evaluation")
    pairs: Place | None = Field(
        None,
        description="problem file held out to measure the PPM on: searched after each round, "
        "never trained on; null: none",
    )
    pair_share: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="instead: share of the training files' problems, variations together, taken "
        "out of them for that",
    )
    demonstrations: Place | None = Field(
        None, description="written solutions for a cold start; null: none"
    )
    default_level: Level | None = Field(None, description="level of rows that name none")
    miniature: MiniatureConfig | None = Field(
        None, description="generate the miniature's files instead"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ProblemsConfig:
        if bool(self.train) == bool(self.miniature):
            raise ValueError("give either problems.train files or problems.miniature, not both")
        if self.pair_share and (self.pairs is not None or self.miniature is not None):
            raise ValueError(
                "pair_share is of problems.train and instead of problems.pairs; the miniature has "
                "num_pair_problems"
            )
        return self


class EscalationConfig(Config):
    """A further search of the problems that are still unsolved."""

    num_rollouts: int = Field(ge=1, description="rollouts of each further tree")
    num_candidates: int | None = Field(None, ge=1, description="candidates; null: as the round's")
    trees: int = Field(
        1, ge=1, description="further trees of a problem, own seeds; each only if it is unsolved"
    )

    def search(self, base: SearchConfig) -> SearchConfig:
        """The search of this stage, given the one of the stages before."""
        own = self.model_dump(include={"num_rollouts", "num_candidates"}, exclude_none=True)
        return base.model_copy(update=own)


class RoundConfig(Config):
    """One round of self-evolution: how it searches, and with which models."""

    preference: bool = Field(
        description="false: terminal-guided values (rounds 1-2); true: PPM-augmented (3-4)"
    )
    num_candidates: int | None = Field(None, ge=1, description="overrides search.num_candidates")
    num_rollouts: int | None = Field(None, ge=1, description="overrides search.num_rollouts")
    temperature: float | None = Field(None, ge=0, description="overrides search.temperature")
    template: Literal["rstar", "short", "bootstrap"] | None = Field(
        None, description="overrides search.template: bootstrap for a first round without SFT"
    )
    trees: int = Field(1, ge=1, description="trees per problem, each with its own seed")
    escalation: list[EscalationConfig] = Field(
        default_factory=list, description="stages for problems unsolved so far, in order"
    )

    def search(self, base: SearchConfig) -> SearchConfig:
        """The search of this round."""
        names = {"num_candidates", "num_rollouts", "temperature", "template"}
        own = self.model_dump(include=names, exclude_none=True)
        return SearchConfig.model_validate(base.model_dump() | own)


Trunk = Literal["policy", "previous", "cold_start", "base"]
"""A checkpoint of a run: the round's own policy, the PPM of the round before with its head (in
round 1 the policy), the policy of round 0, the base model."""


class LineageConfig(Config):
    """Which weights training starts from."""

    base_model: Place | None = Field(
        None, description="Hugging Face checkpoint directory; null with the miniature: made"
    )
    policy_init: Literal["base", "previous"] = Field(
        "base", description="start of each round's SFT: base (paper) or the previous policy"
    )
    ppm_trunk: Trunk | Place = Field(
        "policy",
        description="start of each round's PPM: the round's policy (paper), previous (the PPM of "
        "the round before, which keeps what it has learned, unless its ruler cannot tell it from "
        "chance: then the policy), cold_start or base, which never saw "
        "the trees' solutions, or the directory of another causal language model",
    )


class SolveConfig(GivenModelsConfig):
    """One problem, one answer: `rstar solve`."""

    policy: Place = Field(description="Hugging Face checkpoint directory of the policy")
    policy_engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig(gpu_memory_utilization=0.45),
        description="vLLM, policy; half a GPU, so that one holds both models",
    )
    ppm_engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig(gpu_memory_utilization=0.45), description="vLLM, PPM"
    )
    method: MethodConfig = Field(
        default_factory=MethodConfig, description="how the answer is found, and its budget"
    )

    @model_validator(mode="after")
    def _has_logprobs(self) -> SolveConfig:
        if self.method.logprob_weight and not self.policy_engine.logprobs:
            raise ValueError("method.logprob_weight needs policy_engine.logprobs: true")
        return self


class RolloutConfig(GivenModelsConfig):
    """One pass of search over one problem file with given models: `rstar rollout`."""

    problems: Place = Field(description="problem file")
    default_level: Level | None = Field(None, description="level of rows that name none")
    limit: int | None = Field(None, ge=1, description="only the first so many problems")
    endpoint: EndpointConfig | None = Field(
        None, description="completions endpoint that is the policy; null: replicas of `policy`"
    )
    escalation: list[EscalationConfig] = Field(
        default_factory=list, description="stages for problems unsolved so far, in order"
    )

    @model_validator(mode="after")
    def _one_policy(self) -> RolloutConfig:
        if (self.policy is None) == (self.endpoint is None):
            raise ValueError("give either a policy checkpoint or an endpoint section")
        return self

    @property
    def policy_tokenizer(self) -> Path | None:
        return self.policy if self.endpoint is None else self.endpoint.tokenizer


class RunConfig(ServingConfig):
    """A whole run of self-evolution: `rstar evolve`."""

    name: str = Field(min_length=1, description="of the run, for people")
    problems: ProblemsConfig = Field(description="what is searched and measured")
    models: LineageConfig = Field(default_factory=LineageConfig, description="starting weights")
    endpoint: EndpointConfig | None = Field(
        None, description="completions endpoint that is the policy of round 1; null: replicas"
    )
    rounds: list[RoundConfig] = Field(min_length=1, description="in order")
    dataset: DatasetConfig = Field(
        default_factory=DatasetConfig, description="trees to training data"
    )
    cold_start: PolicyTrainConfig | None = Field(
        None, description="SFT on the demonstrations before round 1; null: none"
    )
    train_policy: PolicyTrainConfig = Field(
        default_factory=PolicyTrainConfig, description="SFT of each round"
    )
    train_ppm: PreferenceTrainConfig = Field(
        default_factory=PreferenceTrainConfig, description="PPM training of each round"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="after each round"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.problems.miniature is None and self.models.base_model is None:
            raise ValueError("models.base_model is needed unless problems.miniature is used")
        if self.search.terminal_value is not TerminalValue.LABEL:
            raise ValueError(
                "search.terminal_value must be label: what trees teach rests on verdicts; "
                "preference is for test time, and evaluation sets it itself"
            )
        for settings in self.rounds:
            settings.search(self.search)
        if self.rounds[0].preference:
            raise ValueError("rounds[0].preference must be false: no PPM exists before round 1")
        has_demonstrations = (
            self.problems.miniature is not None or self.problems.demonstrations is not None
        )
        if self.cold_start is not None and not has_demonstrations:
            raise ValueError("cold_start needs problems.demonstrations")
        if self.models.ppm_trunk == "cold_start" and self.cold_start is None:
            raise ValueError("models.ppm_trunk: cold_start, but the run has no cold_start section")
        if self.models.ppm_trunk == "previous" and self.train_ppm.lm_weight:
            raise ValueError(
                "models.ppm_trunk: previous goes on from a PPM, which has no output layer for "
                "train_ppm.lm_weight"
            )
        return self


class TrainDataConfig(Config):
    """What one training run reads: a round of a run, or files."""

    run: Place | None = Field(None, description="folder of a run whose committed round is used")
    round: int | None = Field(None, ge=0, description="of that run; null: its last")
    train: Place | None = Field(
        None, description="Parquet or JSONL: prompt, response; for a PPM prompt, chosen, rejected"
    )
    validation: Place | None = Field(
        None, description="held-out rows; null: a share of the prompts (dataset.validation_share)"
    )
    template: Literal["rstar", "short"] | None = Field(
        None, description="prompts are questions to render so; null: they are used as they are"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TrainDataConfig:
        if (self.run is None) == (self.train is None):
            raise ValueError("give either data.run or data.train")
        return self


class TrainRunConfig(Config):
    """One training run alone: `rstar train`."""

    run_dir: Place = Field(description="folder or bucket for the checkpoint and its logs")
    storage: StorageConfig = Field(
        default_factory=StorageConfig, description="how a bucket is reached (docs/storage.md)"
    )
    seed: int = Field(0, ge=0, description="every random choice follows from it")
    base: Place | None = Field(
        None,
        description="checkpoint to start from, for a PPM its trunk; null: that of data.run",
    )
    ppm_trunk: Trunk | None = Field(
        None,
        description="rstar train ppm: which checkpoint of data.run is the trunk; null: base, else "
        "as that run has it",
    )
    previous: Place | None = Field(
        None, description="checkpoint in service, which stays there if the new one is worse"
    )
    data: TrainDataConfig = Field(description="what is trained on")
    dataset: DatasetConfig = Field(
        default_factory=DatasetConfig,
        description="trees to training data, where the round has none yet; and the split of files",
    )
    tracking: list[TrackerName] = Field(default_factory=list, description=TRACKING)
    address: str = Field("local", description='Ray address of more than one rank; "local": own')
    learner: ActorConfig = Field(
        default_factory=ActorConfig, description="ranks; one trains in this process"
    )
    stage_attempts: int = Field(
        3,
        ge=1,
        description="times that more than one rank try when actors or machines are lost",
    )
    metrics: MetricsConfig = Field(
        default_factory=MetricsConfig, description="what is measured while it trains"
    )
    train_policy: PolicyTrainConfig = Field(
        default_factory=PolicyTrainConfig, description="rstar train policy"
    )
    train_ppm: PreferenceTrainConfig = Field(
        default_factory=PreferenceTrainConfig, description="rstar train ppm"
    )

    @model_validator(mode="after")
    def _run_dir_of_all_machines(self) -> TrainRunConfig:
        check_run_dir(self.run_dir, self.address, key="address")
        return self

    @model_validator(mode="after")
    def _one_base(self) -> TrainRunConfig:
        if self.ppm_trunk is not None and self.base is not None:
            raise ValueError("give either base or ppm_trunk, not both")
        if self.ppm_trunk is not None and self.data.run is None:
            raise ValueError("ppm_trunk names a checkpoint of data.run, which is not given")
        return self
