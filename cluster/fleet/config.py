"""What every command that searches is told: where its actors run, and how they search."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.engines.config import EngineConfig
from cluster.fleet.membership import SupervisionConfig
from cluster.folder.config_file import Config, Place
from cluster.jobs.admission import AdmissionConfig
from cluster.machines.cost import Expected, MachinePrice
from cluster.machines.scaler import ScalerConfig
from cluster.machines.spot import SpotConfig
from cluster.telemetry.exporter import MetricsConfig
from cluster.telemetry.tracing import TracingConfig
from cluster.telemetry.trackers import TrackerName
from rollout.difficulty import SuspectConfig
from rollout.run_store import address_of
from rollout.search import SearchConfig
from verifier import SandboxLimits


class HardProblemsConfig(Config):
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


class ActorConfig(Config):
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

    def ray_options(self) -> dict[str, Any]:
        """What one actor asks of Ray; those that reserve nothing are spread over all nodes."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if not self.bundle():
            options["scheduling_strategy"] = "SPREAD"
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.resources:
            options["resources"] = dict(self.resources)
        return options

    def bundle(self) -> dict[str, float]:
        """The same as the bundle of resources that one actor takes."""
        bundle = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in bundle.items() if amount > 0}

    def rank_bundles(self, ranks: int) -> list[dict[str, float]]:
        """What each rank of one replica takes: of what the replica reserves, an equal part.

        The first rank also has the CPUs, for the actor that stands beside it. A replica of one rank
        has one bundle, and one that reserves nothing has none.
        """
        shared = {"GPU": self.num_gpus, **self.resources}
        each = {name: amount / ranks for name, amount in shared.items() if amount > 0}
        first = {"CPU": self.num_cpus, **each} if self.num_cpus else each
        return [dict(bundle) for bundle in (first, *[each] * (ranks - 1)) if bundle]

    def learner_bundle(self) -> dict[str, float]:
        """What one rank of a learner group takes, which is at least one CPU."""
        gpus = {"GPU": self.num_gpus} if self.num_gpus else {}
        return {**self.resources, **gpus, "CPU": self.num_cpus or 1.0}


class MembersConfig(ActorConfig):
    """Actors that serve, each for itself: some may be missing."""

    min_ready: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of them, rounded up, that is enough to start and to go on with new "
        "weights; the others join when they come",
    )


_SECRET = re.compile(r"key|secret|token|password|credential|signature|sas|connection_string")


class StorageConfig(Config):
    """How a run_dir on a bucket is reached. Credentials stand nowhere here: the bucket's client
    looks for them where it always does (environment, profile, role of the machine)."""

    endpoint_url: str | None = Field(
        None, description="of a store that speaks S3, as MinIO; null: the cloud's own"
    )
    options: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict,
        description="further arguments of its fsspec client (s3fs, gcsfs, adlfs), no secrets",
    )

    @model_validator(mode="after")
    def _no_secrets(self) -> StorageConfig:
        named = [name for name in self.options if _SECRET.search(name.lower())]
        if named or "@" in (self.endpoint_url or ""):
            what = f"options.{named[0]}" if named else "a name or password in endpoint_url"
            raise ValueError(
                f"{what}: secrets stay out of configs, which are stored with the run; give them "
                "by the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) or the machine's role"
            )
        return self

    @property
    def client(self) -> dict[str, Any]:
        """Arguments of the fsspec client."""
        given = {"endpoint_url": self.endpoint_url} if self.endpoint_url else {}
        return {**self.options, **given}


def check_run_dir(run_dir: Path, address: str, *, key: str = "cluster.address") -> None:
    """Raises ValueError if a run on several machines would have a folder on each."""
    if address != "local" and not run_dir.is_absolute() and address_of(run_dir) is None:
        raise ValueError(
            f"run_dir must be absolute unless {key} is local, got {str(run_dir)!r}: each machine "
            "would have its own; give a bucket or a folder that all machines mount, as with "
            "--set run_dir=s3://BUCKET/runs/... or --set run_dir=/mnt/shared/runs/..."
        )


class CostConfig(Config):
    """What the machines cost, and what the run may cost in all (docs/cost.md)."""

    usd_per_hour: float | None = Field(
        None,
        ge=0,
        description="dollars per hour of all machines together, however many are up; null: of each "
        "by `prices`",
    )
    prices: dict[str, MachinePrice] = Field(
        default_factory=dict,
        description="kind of machine -> its price, counted for each node while it is up; the kind "
        "is the node's label `machine`, else Ray's `ray.io/node-group` or accelerator type",
    )
    budget_usd: float | None = Field(
        None, gt=0, description="dollars the run may cost, all starts together; null: no limit"
    )
    on_budget: Literal["warn", "drain"] = Field(
        "warn",
        description="when it has cost that much: warn says so and goes on; drain commits what is "
        "finished and ends the actors, and the run goes on once the budget is raised",
    )
    expected: Expected | None = Field(
        None,
        description="what `rstar plan CONFIG`, and the estimate kept with a run, rest on; null: no "
        "estimate",
    )

    @model_validator(mode="after")
    def _priced(self) -> CostConfig:
        machines = self.expected.machines if self.expected is not None else {}
        wrong = sorted({machine.kind for machine in machines.values()} - self.prices.keys())
        if wrong and self.usd_per_hour is None:
            raise ValueError(f"expected.machines: no price of {', '.join(wrong)} in prices")
        if self.expected is not None and not machines and self.usd_per_hour is None:
            raise ValueError("expected needs its machines, with prices, or usd_per_hour")
        return self


class ClusterConfig(Config):
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
    policy: MembersConfig = Field(default_factory=MembersConfig, description="policy replicas")
    ppm: MembersConfig = Field(default_factory=MembersConfig, description="PPM replicas")
    sandbox: MembersConfig = Field(default_factory=MembersConfig, description="sandbox workers")
    workers: MembersConfig = Field(default_factory=MembersConfig, description="rollout workers")
    learner: ActorConfig = Field(
        default_factory=lambda: ActorConfig(replicas=2), description="learner ranks"
    )
    max_open_trees: int = Field(64, ge=1, description="most searches open per rollout worker")
    admission: AdmissionConfig = Field(
        default_factory=AdmissionConfig, description="how many of them the engines take now"
    )
    priority: int = Field(
        0,
        description="of the run among those on its cluster: while actors of a higher one wait for "
        "a place, its pools that hold the like give up members, down to min_ready of them",
    )
    priorities: dict[str, int] = Field(
        default_factory=dict,
        description="problem set (a problem's source) -> priority: jobs of a higher one are "
        "searched first; 0 of sets not named",
    )
    shard_size: int = Field(16, ge=1, description="problems per job")
    lease_s: float = Field(600.0, gt=0, description="a job not renewed for so long is given again")
    start_timeout_s: float = Field(
        300.0, gt=0, description="an actor not ready by then is an error that says what is missing"
    )
    stage_weights: Path | None = Field(
        None,
        description="absolute folder on each engine node's own disk, to which a checkpoint is "
        "copied once before its replicas read it; null: each reads it where it is",
    )
    hand_over: bool = Field(
        False,
        description="engines end before each training run and start again after it, so that both "
        "can have the same GPU; costs two starts of the engines a round",
    )
    orphan_s: float = Field(
        300.0,
        gt=0,
        description="after the driver's death engines and workers carry on for so long, and the "
        "same command takes them over; then they end (on an embedded Ray, with the driver)",
    )
    request_timeout_s: float | None = Field(
        None,
        gt=0,
        description="deadline of one engine request; null: four times what its max_tokens take at "
        "the pace its replica showed lately, at least 300 s",
    )
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
    min_step_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="a rollout stops if fewer of its first 200 candidates end in a step; 0: never",
    )
    fit_stalled_after_s: float = Field(
        1800.0, gt=0, description="a training run that reports no progress for so long is given up"
    )
    stage_attempts: int = Field(
        3,
        ge=1,
        description="times a fit, a rollout, an evaluation or, on a cluster, a start of actors is "
        "tried when actors or machines are lost or do not come; then the run stops",
    )
    autoscale: dict[Literal["policy", "ppm", "sandbox"], ScalerConfig] = Field(
        default_factory=dict,
        description="pools that grow and shrink during rollouts (units: trees); others stay fixed",
    )
    spot: SpotConfig | None = Field(
        None, description="watch the cloud's metadata service on each node; null: do not"
    )

    @field_validator("stage_weights")
    @classmethod
    def _same_on_each_node(cls, value: Path | None) -> Path | None:
        if value is not None and (not value.is_absolute() or "://" in str(value)):
            raise ValueError(
                f"expected an absolute folder that each node has on its own disk, got {value}"
            )
        return value


class SandboxConfig(Config):
    """How step code is isolated."""

    isolation: Literal["strict", "best_effort"] = Field(
        "best_effort", description="strict refuses to start where a layer is missing"
    )
    limits: SandboxLimits = Field(default_factory=SandboxLimits, description="per step")


TRACKING = "experiment trackers that are told of it: tensorboard, mlflow, wandb (docs/tracking.md)"


class ServingConfig(Config):
    """What every command that searches needs: where it runs and how."""

    run_dir: Place = Field(
        description="folder or bucket (s3://, gs://, az://) that everything is written to, seen by "
        "all machines"
    )
    storage: StorageConfig = Field(
        default_factory=StorageConfig, description="how a bucket is reached (docs/storage.md)"
    )
    seed: int = Field(0, ge=0, description="every random choice follows from it")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="actors")
    policy_engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM, policy")
    ppm_engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM, PPM")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig, description="step code")
    search: SearchConfig = Field(default_factory=SearchConfig, description="of every round")
    hard_problems: HardProblemsConfig = Field(
        default_factory=HardProblemsConfig, description="problems that stay unsolved"
    )
    cost: CostConfig = Field(default_factory=CostConfig, description="prices and budget")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what every process keeps in RUN/logs: this and above"
    )
    metrics: MetricsConfig = Field(
        default_factory=MetricsConfig, description="what is measured while it runs"
    )
    tracing: TracingConfig = Field(
        default_factory=TracingConfig, description="which problems leave a trace (docs/logs.md)"
    )
    tracking: list[TrackerName] = Field(default_factory=list, description=TRACKING)

    @model_validator(mode="after")
    def _run_dir_of_all_machines(self) -> Self:
        check_run_dir(self.run_dir, self.cluster.address)
        return self

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


class GivenModelsConfig(ServingConfig):
    """What is served is named, not made."""

    policy: Place | None = Field(
        None, description="Hugging Face checkpoint directory of the policy; null: an endpoint's"
    )
    ppm: Place | None = Field(None, description="checkpoint of the PPM; null: terminal-guided")

    @property
    def policy_tokenizer(self) -> Path | None:
        """Folder with the tokenizer of the policy; None: not known."""
        return self.policy
