"""One YAML file is one run: `RunConfig` composes every package's config and refuses what it does
not know.

    file or preset --+-- --set a.b=c --> RunConfig --> stored beside the run as config.yaml

A preset is a config that is shipped; its name is enough, as in `rstar evolve demo`.
docs/configuration.md, made by `cluster.config_reference`, lists every key.

An unknown key is an error that names the file, the key and the nearest valid one; a wrong value is
an error with field, rule and value. All errors of a file are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.admission import AdmissionConfig
from cluster.endpoint import EndpointConfig
from cluster.exporter import MetricsConfig
from cluster.membership import SupervisionConfig
from cluster.replica import EngineConfig
from cluster.scaler import ScalerConfig
from cluster.spot import SpotConfig
from cluster.tracing import TracingConfig
from learner.fit import PolicyTrainConfig, PreferenceTrainConfig
from learner.select import DatasetConfig
from rollout.difficulty import SuspectConfig
from rollout.methods import Method, MethodConfig
from rollout.problem import Level
from rollout.search import SearchConfig
from verifier import SandboxLimits


class ConfigError(ValueError):
    """A config file or override cannot be used; the message says where and what is right."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MiniatureConfig(_Config):
    """The CPU-sized world: made-up word problems and a policy trained from scratch on them."""

    num_demonstrations: int = Field(450, ge=1, description="written solutions for the cold start")
    num_train: int = Field(600, ge=1, description="problems to search")
    num_test: int = Field(300, ge=1, description="held-out problems")
    families: list[str] | None = Field(None, description="problem families; null: all 18")
    seed: int | None = Field(None, description="of the world; null: the run's seed")


class ProblemsConfig(_Config):
    """Where the problems come from: files, or the miniature's generator."""

    train: list[Path] = Field(default_factory=list, description="problem files to search")
    test: Path | None = Field(None, description="held-out problem file; null: no evaluation")
    demonstrations: Path | None = Field(
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
        return self


class EscalationConfig(_Config):
    """A further search of the problems that are still unsolved."""

    num_rollouts: int = Field(ge=1, description="rollouts of each further tree")
    num_candidates: int | None = Field(None, ge=1, description="candidates; null: as the round's")
    trees: int = Field(1, ge=1, description="further trees per unsolved problem, own seeds")

    def search(self, base: SearchConfig) -> SearchConfig:
        """The search of this stage, given the one of the stages before."""
        own: dict[str, Any] = {"num_rollouts": self.num_rollouts}
        if self.num_candidates is not None:
            own["num_candidates"] = self.num_candidates
        return base.model_copy(update=own)


class HardProblemsConfig(_Config):
    """What is done about problems that stay unsolved, besides searching them on."""

    max_generated_tokens: int | None = Field(
        None,
        ge=1,
        description="a problem that cost so much is not searched on; null: no cap",
    )
    leave_suspects: bool = Field(
        False, description="do not search problems on whose searches agree on another answer"
    )
    suspect: SuspectConfig = Field(
        default_factory=SuspectConfig, description="when a label is suspect"
    )


class RoundConfig(_Config):
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
        names = ("num_candidates", "num_rollouts", "temperature", "template")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return base.model_copy(update=own)


class ActorConfig(_Config):
    """How many actors of a kind, and what each asks of Ray."""

    replicas: int = Field(1, ge=1, description="number of actors")
    num_cpus: float = Field(0, ge=0, description="CPUs each reserves")
    num_gpus: float = Field(
        0,
        ge=0,
        description="GPUs each reserves; a fraction shares one; of a replica spread over several "
        "GPUs, all of them",
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources each reserves, as named in the cluster"
    )


class CostConfig(_Config):
    """What the machines cost, for the progress view and `rstar status`."""

    usd_per_hour: float | None = Field(
        None, ge=0, description="dollars per hour of all machines together; null: not shown"
    )
    budget_usd: float | None = Field(
        None, gt=0, description="an alert says when the run costs more; null: none does"
    )


class ClusterConfig(_Config):
    """Where the actors run."""

    address: str = Field(
        "local", description='"local" starts an embedded Ray; else a Ray address, or "auto"'
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of an embedded Ray; null: the machine's"
    )
    dashboard_port: int | None = Field(
        None, ge=1024, le=65535, description="Ray dashboard of an embedded Ray; null: none"
    )
    object_store_mib: int = Field(256, ge=80, description="object store of an embedded Ray")
    policy: ActorConfig = Field(default_factory=ActorConfig, description="policy replicas")
    ppm: ActorConfig = Field(default_factory=ActorConfig, description="PPM replicas")
    sandbox: ActorConfig = Field(default_factory=ActorConfig, description="sandbox workers")
    workers: ActorConfig = Field(default_factory=ActorConfig, description="rollout workers")
    learner: ActorConfig = Field(
        default_factory=lambda: ActorConfig(replicas=2), description="learner ranks"
    )
    max_open_trees: int = Field(64, ge=1, description="most searches open per rollout worker")
    admission: AdmissionConfig = Field(
        default_factory=AdmissionConfig, description="how many of them the engines take now"
    )
    shard_size: int = Field(16, ge=1, description="problems per job")
    lease_s: float = Field(600.0, gt=0, description="a job not renewed for so long is given again")
    start_timeout_s: float = Field(
        300.0, gt=0, description="an actor not ready by then is an error that says what is missing"
    )
    hand_over: bool = Field(
        False,
        description="engines end before each training run and start again after it, so that both "
        "can have the same GPU; costs two starts of the engines a round",
    )
    orphan_s: float = Field(
        300.0,
        gt=0,
        description="after the driver's death engines and workers carry on for so long (not on an "
        "embedded Ray, which ends with it)",
    )
    request_timeout_s: float = Field(300.0, gt=0, description="deadline of one engine request")
    checkpoint_open_trees_s: float | None = Field(
        60.0,
        gt=0,
        description="pause between two checkpoints of unfinished searches; null: only on drain",
    )
    supervision: SupervisionConfig = Field(
        default_factory=SupervisionConfig, description="how dead actors are found and replaced"
    )
    stalled_after_s: float = Field(
        120.0, gt=0, description="a part with work and no progress for so long is shown as stalled"
    )
    autoscale: dict[Literal["policy", "ppm", "sandbox"], ScalerConfig] = Field(
        default_factory=dict,
        description="pools that grow and shrink during rollouts (units: trees); others stay fixed",
    )
    spot: SpotConfig | None = Field(
        None, description="watch the cloud's metadata service on each node; null: do not"
    )


class SandboxConfig(_Config):
    """How step code is isolated."""

    isolation: Literal["strict", "best_effort"] = Field(
        "best_effort", description="strict refuses to start where a layer is missing"
    )
    limits: SandboxLimits = Field(default_factory=SandboxLimits, description="per step")


class EvaluationConfig(_Config):
    """What is measured on held-out problems after each round."""

    num_problems: int | None = Field(
        None, ge=1, description="first so many test problems, levels balanced; null: all"
    )
    num_samples: int = Field(8, ge=1, description="samples for majority and best-of-N")
    num_search_problems: int | None = Field(
        None, ge=1, description="problems for majority, best-of-N and search; null: all"
    )
    num_candidates: int = Field(8, ge=1, description="candidates per expansion of search")
    vote_top_k: int = Field(4, ge=1, description="answers that vote, best PPM value first")
    max_solution_tokens: int = Field(2048, ge=1, description="generated tokens per sample")


class LineageConfig(_Config):
    """Which weights training starts from."""

    base_model: Path | None = Field(
        None, description="Hugging Face checkpoint directory; null with the miniature: made"
    )
    policy_init: Literal["base", "previous"] = Field(
        "base", description="start of each round's SFT: base (paper) or the previous policy"
    )


class ServingConfig(_Config):
    """What every command that searches needs: where it runs and how."""

    run_dir: Path = Field(description="folder that everything is written to, seen by all machines")
    seed: int = Field(0, ge=0, description="every random choice follows from it")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="actors")
    policy_engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM, policy")
    ppm_engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM, PPM")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig, description="step code")
    search: SearchConfig = Field(default_factory=SearchConfig, description="of every round")
    hard_problems: HardProblemsConfig = Field(
        default_factory=HardProblemsConfig, description="problems that stay unsolved"
    )
    cost: CostConfig = Field(default_factory=CostConfig, description="for people")
    metrics: MetricsConfig = Field(
        default_factory=MetricsConfig, description="what is measured while it runs"
    )
    tracing: TracingConfig = Field(
        default_factory=TracingConfig, description="which problems leave a trace (docs/logs.md)"
    )

    @model_validator(mode="after")
    def _gpus_of_replicas(self) -> Self:
        for name in ("policy", "ppm"):
            ranks = getattr(self, f"{name}_engine").num_ranks
            num_gpus = getattr(self.cluster, name).num_gpus
            if ranks > 1 and num_gpus not in (0, ranks):
                raise ValueError(
                    f"cluster.{name}.num_gpus must be {ranks}, "
                    f"{name}_engine.tensor_parallel_size x pipeline_parallel_size; got {num_gpus:g}"
                )
        return self

    def effective(self) -> dict[str, Any]:
        """The whole config as plain data, defaults included; reading it back gives an equal one."""
        return self.model_dump(mode="json")


class GivenModelsConfig(ServingConfig):
    """What is served is named, not made."""

    policy: Path | None = Field(
        None, description="Hugging Face checkpoint directory of the policy; null: an endpoint's"
    )
    ppm: Path | None = Field(None, description="checkpoint of the PPM; null: terminal-guided")


class SolveConfig(GivenModelsConfig):
    """One problem, one answer: `rstar solve`."""

    policy: Path = Field(description="Hugging Face checkpoint directory of the policy")
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


class RolloutConfig(GivenModelsConfig):
    """One pass of search over one problem file with given models: `rstar rollout`."""

    problems: Path = Field(description="problem file")
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


class EvaluateConfig(GivenModelsConfig):
    """Methods on benchmarks with given models: `rstar evaluate`."""

    policy: Path = Field(description="Hugging Face directory of any causal language model")
    benchmarks: list[Path] = Field(
        min_length=1, description="problem files; the name of each without suffix is its name"
    )
    methods: list[Method] = Field(
        default_factory=lambda: [Method.GREEDY],
        min_length=1,
        description="greedy | majority | best-of-n | beam | mcts; majority and best-of-n choose "
        "among the same samples",
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
    max_solution_tokens: int = Field(2048, ge=1, description="generated tokens per sample")
    beam_width: int = Field(8, ge=1, description="paths kept after each step of a beam")
    beam_candidates: int = Field(8, ge=1, description="candidates per path and step of a beam")
    rollouts_per_tree: int = Field(
        12, ge=1, description="mcts: a trajectory is a tree of so many rollouts (released: 12)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if any(budget < 1 for budget in self.trajectories):
            raise ValueError(f"trajectories must be >= 1, got {self.trajectories}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("methods names a method twice")
        return self


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
        if self.rounds[0].preference:
            raise ValueError("rounds[0].preference must be false: no PPM exists before round 1")
        has_demonstrations = (
            self.problems.miniature is not None or self.problems.demonstrations is not None
        )
        if self.cold_start is not None and not has_demonstrations:
            raise ValueError("cold_start needs problems.demonstrations")
        return self


class TrainDataConfig(_Config):
    """What one training run reads: a round of a run, or files."""

    run: Path | None = Field(None, description="folder of a run whose committed round is used")
    round: int | None = Field(None, ge=0, description="of that run; null: its last")
    train: Path | None = Field(
        None, description="Parquet or JSONL: prompt, response; for a PPM prompt, chosen, rejected"
    )
    validation: Path | None = Field(
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


class TrainRunConfig(_Config):
    """One training run alone: `rstar train`."""

    run_dir: Path = Field(description="folder for the checkpoint and its logs")
    seed: int = Field(0, ge=0, description="every random choice follows from it")
    base: Path | None = Field(
        None,
        description="checkpoint to start from, for a PPM the policy; null: that of data.run",
    )
    previous: Path | None = Field(
        None, description="checkpoint in service, which stays there if the new one is worse"
    )
    data: TrainDataConfig = Field(description="what is trained on")
    dataset: DatasetConfig = Field(
        default_factory=DatasetConfig,
        description="trees to training data, where the round has none yet; and the split of files",
    )
    address: str = Field("local", description='Ray address of more than one rank; "local": own')
    learner: ActorConfig = Field(
        default_factory=ActorConfig, description="ranks; one trains in this process"
    )
    train_policy: PolicyTrainConfig = Field(
        default_factory=PolicyTrainConfig, description="rstar train policy"
    )
    train_ppm: PreferenceTrainConfig = Field(
        default_factory=PreferenceTrainConfig, description="rstar train ppm"
    )

    def effective(self) -> dict[str, Any]:
        """The whole config as plain data, defaults included."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=BaseModel)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[C],
    given: Mapping[str, Any] | None = None,
) -> C:
    """Read a config and apply `a.b=c` overrides (values are YAML).

    Args:
        path: a file, or the name of a preset (`find_config`).
        kind: as `RunConfig` or `RolloutConfig`.
        given: top-level values from the command line; they win over the file.
    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), wrong value.
    """
    path = find_config(path, kind=kind)
    return make_config(read_yaml(path) | dict(given or {}), overrides, kind=kind, source=str(path))


def find_config(path: str | Path, *, kind: type[BaseModel] = RunConfig) -> Path:
    """The file a config argument means: itself, or the preset of that name.

    Args:
        kind: of the config, for the names an error lists.
    Raises:
        ConfigError: there is no such file, and no such preset.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = presets(kind)
    if path.parent == Path() and path.suffix in ("", ".yaml"):
        if path.stem in shipped:
            return shipped[path.stem]
        near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(shipped) or "none found"
        raise ConfigError(f"{path}: no such config file; {hint}presets: {names}")
    raise ConfigError(f"{path}: no such config file")


def presets(kind: type[BaseModel] = RunConfig) -> dict[str, Path]:
    """The shipped configs of a kind by name: file name without .yaml."""
    package = Path(__file__).parent
    # In an installed package they lie inside it, in a checkout beside it.
    folders = (package / "presets", package.parent / "deploy" / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder is not None else []
    has_rounds = issubclass(kind, RunConfig)
    return {f.stem: f for f in files if ("rounds" in read_yaml(f)) == has_rounds}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a config file, unchecked.

    Raises:
        ConfigError: unreadable file, or no mapping.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a YAML mapping, got {type(data).__name__}")
    return data


def make_config(
    data: dict[str, Any], overrides: Sequence[str] = (), *, kind: type[C], source: str
) -> C:
    """Apply `a.b=c` overrides to plain data and check it.

    Args:
        source: where the data comes from, for messages.
    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong value.
    """
    for override in overrides:
        _apply(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{source}: {_explain(kind, item)}" for item in error.errors())
        ) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, as in search.num_rollouts=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    names = key.strip().split(".")
    place: Any = data
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                where = ".".join(names[:depth])
                raise ConfigError(
                    f"--set {override}: {where} is a list of {len(place)}, {name!r} is no index"
                )
            index = int(name)
            if last:
                place[index] = value
            else:
                place = place[index]
        elif last:
            place[name] = value
        else:
            if not isinstance(place.get(name), (dict, list)):
                place[name] = {}
            place = place[name]


def _explain(kind: type[BaseModel], item: Any) -> str:
    location = item["loc"]
    name = ".".join(str(part) for part in location) or "config"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = _fields_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(sorted(valid))}"
        return f"unknown key {name!r}; {hint}"
    if item["type"] == "missing":
        return f"{name!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = item.get("input")
    # What stands there in place of a variable's name or in an address may be a key.
    secret = location in (("endpoint", "api_key_env"), ("endpoint", "base_url"))
    given = "" if secret or isinstance(shown, dict) else f" (got {shown!r})"
    return f"{name!r}: {message}{given}"


def _fields_at(section: Any, location: Sequence[Any]) -> list[str]:
    """Valid keys of the section found by walking `location` from another one."""
    for part in location:
        if isinstance(part, int):
            continue
        found, _ = section_in(typing.get_type_hints(section).get(str(part)))
        if found is None:
            return []
        section = found
    if issubclass(section, BaseModel):
        return list(section.model_fields)
    return [field.name for field in dataclasses.fields(section)]


def section_in(annotation: Any) -> tuple[Any, bool]:
    """The model or dataclass inside an annotation such as `X | None` or `list[X]`.

    Returns:
        It (None if there is none) and whether it stands in a list.
    """
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        known = issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
        return (annotation if known else None), False
    for argument in typing.get_args(annotation):
        found, in_list = section_in(argument)
        if found is not None:
            return found, in_list or typing.get_origin(annotation) is list
    return None, False
