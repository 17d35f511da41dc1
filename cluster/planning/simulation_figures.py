"""The figures of a simulation: what it assumes, what it finds, and how each is made; printed."""

from __future__ import annotations

import json

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from cluster.folder.config_file import Config
from cluster.planning.latency import LatencyCurve


class SimulationConfig(Config):
    """What is simulated; the defaults are the paper's problem set on 1,024 spot GPUs."""

    num_problems: int = Field(
        default=747_000, ge=1, description="problems to search, one tree each"
    )
    num_replicas: int = Field(default=1024, ge=1, description="replicas wanted, and at most")
    min_replicas: int | None = Field(
        default=None, ge=1, description="what the scaler may shrink to; null: num_replicas"
    )
    shard_size: int = Field(default=16, ge=1, description="problems per job")
    max_open_trees: int = Field(default=24, ge=1, description="trees open at one replica")
    requests_per_tree: float = Field(
        default=5.5,
        gt=0,
        description="policy requests an open tree has in flight on average: of 8 candidates the "
        "shorter ones end first",
    )
    tokens_per_problem: float = Field(
        default=36_000.0,
        gt=0,
        description="generated tokens of a mean tree: 57 expansions (16 rollouts) x 8 candidates "
        "x 80 tokens",
    )
    level_factors: tuple[float, ...] = Field(
        default=(0.6, 1.0, 1.45),
        min_length=1,
        description="tokens of a problem's level against each other, levels equally frequent, "
        "easiest first; as GSM8K, MATH and Olympiad in the paper's Table 9",
    )
    hardest_first: bool = Field(
        default=True, description="search hard levels first, so that the last trees are short"
    )
    tokens_sigma: float = Field(
        default=0.4, ge=0, description="sigma of log(tokens of a tree) within a level"
    )
    tokens_limit: float = Field(
        default=4.0, ge=1, description="a tree's budget: so many times the mean of its level"
    )
    straggler_share: float = Field(default=0.01, ge=0, le=1, description="trees that need more")
    straggler_factor: float = Field(
        default=3.0,
        ge=1,
        description="how much more they need; as AIME against MATH in the same table",
    )
    slow_share: float = Field(default=0.02, ge=0, le=1, description="replicas that are slow")
    slow_factor: float = Field(default=0.7, gt=0, le=1, description="speed of a slow replica")
    lost_per_hour: float = Field(default=0.05, ge=0, lt=1, description="replicas lost in an hour")
    notice_share: float = Field(default=0.5, ge=0, le=1, description="losses with a notice")
    notice_s: float = Field(default=120.0, ge=0, description="time from notice to loss")
    zombie_share: float = Field(
        default=0.2, ge=0, le=1, description="losses without notice that are only cut off"
    )
    zombie_s: float = Field(default=600.0, ge=0, description="how long a zombie goes on")
    detect_s: float = Field(default=15.0, ge=0, description="time until a loss is noticed")
    node_start_s: float = Field(default=120.0, ge=0, description="from request to a running node")
    engine_start_s: float = Field(default=90.0, ge=0, description="from node to a serving engine")
    weights_s: float = Field(
        default=60.0, ge=0, description="until running engines serve the weights of a fit"
    )
    min_ready: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the replicas wanted that must be READY before work is given out, at "
        "the start and with new weights; late ones join. 1: all of them",
    )
    short_replicas: int = Field(
        default=0, ge=0, description="replicas whose machines cannot be had at first"
    )
    short_s: float = Field(default=3600.0, ge=0, description="until they can be had")
    num_zones: int = Field(
        default=3, ge=1, description="availability zones, each with an equal part of the replicas"
    )
    zone_outage_at_s: float = Field(
        default=0.0, ge=0, description="when the first zone goes, with all it has; 0: never"
    )
    zone_outage_s: float = Field(
        default=600.0,
        ge=0,
        description="how long it is gone; the other zones have no machines instead",
    )
    coordinator_kill_s: float = Field(
        default=3600.0, ge=0, description="time between kills of the coordinator; 0: never"
    )
    coordinator_down_s: float = Field(default=20.0, ge=0, description="how long it is away then")
    lease_s: float = Field(default=600.0, gt=0, description="lease time of a job")
    renew_s: float = Field(default=30.0, gt=0, description="pause between renewals")
    poll_s: float = Field(default=5.0, gt=0, description="pause after no job was left")
    checkpoint_s: float | None = Field(
        default=60.0,
        gt=0,
        description="trees in work are stored so often, and when a replica leaves by a notice; "
        "whoever gets the problem goes on with them. null: searched again from the root",
    )
    commit_s: float = Field(default=0.5, ge=0, description="time a commit takes")
    solve_rate: float = Field(default=0.78, ge=0, le=1, description="problems solved")
    engines_held: bool = Field(
        default=True,
        description="engines stay while the learner works; false: given back when the last tree is "
        "committed, asked for again after the PPM's fit",
    )
    idle_timeout_s: float = Field(
        default=900.0, ge=0, description="a replica's node that was given back is paid for longer"
    )
    select_ms_per_tree: float = Field(
        default=1.2, ge=0, description="from the last commit to a dataset; 900 s for 747k trees"
    )
    policy_fit_tokens: float = Field(
        default=2800.0,
        ge=0,
        description="trained per solved problem: 2 trajectories of 700 tokens, 2 epochs",
    )
    ppm_fit_tokens: float = Field(
        default=4800.0,
        ge=0,
        description="trained per problem: 4 pairs, so 8 trajectories of 600 tokens",
    )
    learner_tokens_per_s: float = Field(
        default=50_000.0, gt=0, description="of all ranks: a 7B model on 8 H100 at 40 % MFU"
    )
    learner_held: bool = Field(
        default=False,
        description="the learner's machine is kept from the start to the end of the round; false: "
        "asked for when selection begins, given back after the PPM's fit",
    )
    learner_node_start_s: float = Field(
        default=300.0, ge=0, description="from request to the learner's running machine"
    )
    learner_start_s: float = Field(
        default=120.0, ge=0, description="from there to the first step, paid for"
    )
    learner_idle_timeout_s: float = Field(
        default=120.0, ge=0, description="the learner's machine is paid for so long after its end"
    )
    learner_lost_per_hour: float = Field(
        default=0.0, ge=0, lt=1, description="learner machines lost in an hour"
    )
    fit_checkpoint_s: float = Field(
        default=600.0, gt=0, description="a fit goes on from its last checkpoint, written so often"
    )
    evaluation_share: float = Field(
        default=0.004,
        ge=0,
        description="trees of the evaluation against num_problems; of 747k six for each of 500 "
        "problems, for searches of 12 rollouts x 32 candidates and samples of as many tokens",
    )
    price_per_hour: float = Field(
        default=1.58,
        ge=0,
        description="dollars per replica-hour: a GPU of a g6e.12xlarge on spot and its share of "
        "the PPM's and sandboxes' machines in ray_cluster.yaml",
    )
    learner_price_per_hour: float = Field(
        default=55.04, ge=0, description="dollars per hour: p5.48xlarge on demand"
    )
    seed: int = Field(default=0, description="of every random choice")

    @property
    def num_evaluation(self) -> int:
        """Trees of the evaluation."""
        return round(self.evaluation_share * self.num_problems)

    @model_validator(mode="after")
    def _bounds(self) -> SimulationConfig:
        if self.min_replicas is not None and self.min_replicas > self.num_replicas:
            raise ValueError(
                f"min_replicas must be <= num_replicas, got {self.min_replicas} > "
                f"{self.num_replicas}"
            )
        if self.short_replicas >= self.num_replicas:
            raise ValueError(
                f"short_replicas must be < num_replicas, got {self.short_replicas} >= "
                f"{self.num_replicas}"
            )
        return self


class SimulationReport(Config):
    """What came of it; of the rollout, where nothing else is said."""

    makespan_s: float = Field(
        description="virtual seconds from the first request for replicas to the last completion"
    )
    ideal_s: float = Field(
        description="committed tokens / (num_replicas * full speed): all replicas there from the "
        "start, never idle, nothing lost"
    )
    scaling_efficiency: float = Field(
        description="committed tokens / tokens the available replicas could have generated, "
        "i.e. the sum over replicas of (first served -> lost, drained or end of the run) * own "
        "speed * full speed; full speed = curve(max_open_trees * requests_per_tree)"
    )
    efficiency_of_constant: float = Field(
        description="ideal_s / makespan_s: start-up and the gaps after losses count too"
    )
    wait_s: float = Field(
        description="from the first request for replicas until work was given out"
    )
    utilisation: float = Field(
        description="generated tokens, lost ones included / the same denominator as "
        "scaling_efficiency"
    )
    mean_replicas: float = Field(description="available replica-seconds / makespan_s")
    lost: int = Field(
        description="trees planned, neither committed nor quarantined, by the audit of all "
        "committed rows"
    )
    doubled: int = Field(description="trees committed more than once, by the same audit")
    unexpected: int = Field(description="trees committed that were not planned, by the same audit")
    quarantined: int = Field(
        description="problems set aside because all leases of their job ended badly"
    )
    committed: int = Field(description="trees in the sealed round")
    solved: int = Field(description="committed trees with a correct answer (drawn with solve_rate)")
    lost_work: float = Field(
        description="generated tokens that are in no committed tree / generated tokens"
    )
    generated_tokens: float = Field(description="of all replicas, zombies included")
    replicas_started: int = Field(description="asked for by the scaler, the first ones included")
    replicas_lost: int = Field(
        default=0, description="with and without notice; the scaler's own drains do not count"
    )
    notices: int = Field(default=0, description="losses that were announced notice_s before")
    zombies: int = Field(
        default=0,
        description="losses after which the process went on, cut off from the coordinator",
    )
    zombie_commits: int = Field(default=0, description="commits tried by zombies")
    races: int = Field(
        default=0, description="zombie commits placed between a rival's data file and its marker"
    )
    commits_refused: int = Field(
        default=0, description="commits that found the shard committed by another"
    )
    coordinator_kills: int = Field(default=0, description="times it was rebuilt from the store")
    leases_granted: int = Field(description="by the last coordinator of the rollout")
    leases_expired: int = Field(
        description="by the last coordinator of the rollout, lost workers included"
    )
    round_s: float = Field(
        description="from the first request to the end of the evaluation: rollout, selection, two "
        "fits, evaluation"
    )
    replica_hours: float = Field(
        description="of the round: from a running node (engine start included) to its end, or to "
        "its idle timeout"
    )
    learner_machines: int = Field(description="that ran, the replaced ones included")
    learner_hours: float = Field(
        description="of the round: from a running machine to its end and idle timeout"
    )
    learner_idle_share: float = Field(
        description="learner_hours in which no fit ran / learner_hours; 0 if there are none"
    )
    engine_dollars: float = Field(description="replica_hours * price_per_hour")
    learner_dollars: float = Field(description="learner_hours * learner_price_per_hour")
    dollars_per_solved: float = Field(description="(engine_dollars + learner_dollars) / solved")
    wall_s: float = Field(description="real seconds this simulation took")


def print_simulation(
    report: SimulationReport, config: SimulationConfig, console: Console, *, curve: LatencyCurve
) -> None:
    """Figures with their definitions, then everything that was assumed."""
    table = Table(title=f"{config.num_problems:,} problems on {config.num_replicas:,} replicas")
    for column in ("figure", "value", "definition"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, info in SimulationReport.model_fields.items():
        value = getattr(report, name)
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name, shown, info.description)
    console.print(table)
    console.print("assumed:", markup=False)
    for name, info in SimulationConfig.model_fields.items():
        console.print(
            f"  {name} = {json.dumps(getattr(config, name))}: {info.description}",
            markup=False,
            highlight=False,
        )
    points = ", ".join(f"[{load:g}, {speed:g}]" for load, speed in curve.points)
    console.print(
        f"  curve = {points}: [requests in flight, tokens/s] of a replica",
        markup=False,
        highlight=False,
    )
