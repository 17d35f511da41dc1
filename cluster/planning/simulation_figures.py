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
    price_per_hour: float = Field(default=1.5, ge=0, description="dollars per replica-hour")
    seed: int = Field(default=0, description="of every random choice")

    @model_validator(mode="after")
    def _bounds(self) -> SimulationConfig:
        if self.min_replicas is not None and self.min_replicas > self.num_replicas:
            raise ValueError(
                f"min_replicas must be <= num_replicas, got {self.min_replicas} > "
                f"{self.num_replicas}"
            )
        return self


class SimulationReport(Config):
    """What came of it."""

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
    leases_granted: int = Field(description="by the last coordinator")
    leases_expired: int = Field(description="by the last coordinator, lost workers included")
    replica_hours: float = Field(
        description="from a running node (engine start included) to its end"
    )
    dollars: float = Field(description="replica_hours * price_per_hour")
    dollars_per_solved: float = Field(description="dollars / solved")
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
