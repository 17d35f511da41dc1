"""The `rstar` command: wiring only.

Every error a user can do something about ends in one line on stderr and exit status 1 (2 for a
wrong command line, 130 after Ctrl-C).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from cluster.errors import one_line, quiet_logging
from cluster.folder.config_file import table
from cluster.telemetry.progress import say
from rollout.methods import Method
from rollout.problem import DecontaminationRule, Level

if TYPE_CHECKING:
    from cluster.telemetry.progress import ProgressView

T = TypeVar("T")

SAME_S = 1.0
"""Two signals within so long are one request to stop."""

GPU_KINDS = table("gpus.yaml")
MACHINE_PRICES = table("prices.yaml")


class TrainKind(StrEnum):
    """What `rstar train` trains."""

    POLICY = "policy"
    PPM = "ppm"


app = typer.Typer(
    name="rstar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-evolving small math reasoners on a Ray cluster (rStar-Math, arXiv 2501.04519).",
)

cluster_app = typer.Typer(no_args_is_help=True, help="The machines a run lives on.")
app.add_typer(cluster_app, name="cluster")

job_app = typer.Typer(no_args_is_help=True, help="Runs on a cluster's job server (rstar submit).")
app.add_typer(job_app, name="job")

problems_app = typer.Typer(no_args_is_help=True, help="Problem sets: import, count, check.")
app.add_typer(problems_app, name="problems")

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config value, as search.top_p=0.9."
    ),
]

Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the cluster [RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265]."
    ),
]
Job = Annotated[str, typer.Argument(help="As `rstar submit` names it.")]


@app.command()
def evolve(
    config: Annotated[
        Path, typer.Argument(help="Run config, YAML, or the name of one: demo, one_gpu, paper, ...")
    ],
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option(help="Promote checkpoints that the gate holds back.")
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Start it again so often in a row when it dies or fails."),
    ] = 0,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and the engines.")] = False,
) -> None:
    """Run all rounds of self-evolution; run it again to go on where it stopped."""
    quiet_logging(verbose)
    if restarts:
        _start_again(restarts)
    from cluster.folder.config_file import load_config
    from cluster.folder.machine import command_line
    from cluster.planning.planner import estimate_run
    from cluster.reports.run_report import show_report
    from cluster.runs.config import RunConfig
    from cluster.runs.evolve import Evolution
    from cluster.telemetry.progress import ProgressView

    settings = load_config(config, overrides or (), kind=RunConfig)
    console = Console()
    view = ProgressView(console)
    evolution = Evolution(settings, view, force=force, estimate=estimate_run)
    _run(evolution.run(), again=command_line(), view=view)
    run = evolution.folder.store.root
    show_report(settings.run_dir, console)
    say(console, f"all of it in {run}")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="Run config, YAML, or the name of one.")],
    address: Address = None,
    overrides: Overrides = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="For every process; without a value, as here."),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Starts of a driver that dies or fails, in a row.")
    ] = 5,
    code: Annotated[
        bool, typer.Option(help="Upload this code, to run in place of what is installed there.")
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Promote checkpoints that the gate holds back.")
    ] = False,
) -> None:
    """Have a Ray cluster do `rstar evolve`: nothing here needs to stay open."""
    from cluster.runs.submit import submit

    submit(
        config,
        overrides or (),
        Console(),
        address=address,
        env=env or (),
        restarts=restarts,
        code=code,
        force=force,
    )


@job_app.command("list")
def job_list(address: Address = None) -> None:
    """Show the runs that were submitted to a cluster."""
    from cluster.runs.submit import show_jobs

    show_jobs(Console(), address=address)


@job_app.command("status")
def job_status(job: Job, address: Address = None) -> None:
    """Show how a submitted run stands, as its cluster knows it."""
    from cluster.runs.submit import show_job

    show_job(job, Console(), address=address)


@job_app.command("logs")
def job_logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="Go on until it ends.")] = False,
) -> None:
    """Show what the driver of a submitted run has printed."""
    from cluster.runs.submit import show_job_logs

    with _interruptible():
        show_job_logs(job, Console(), address=address, follow=follow)


@job_app.command("stop")
def job_stop(
    job: Job,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Until it has ended.")] = True,
) -> None:
    """Have a submitted run drain and end; `rstar submit` goes on with it."""
    from cluster.runs.submit import stop_job

    with _interruptible():
        stop_job(job, Console(), address=address, wait=wait)


@app.command()
def rollout(
    problems: Annotated[Path, typer.Option(help="Problem file: Parquet, JSONL, JSON or CSV.")],
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face checkpoint directory of the policy; without it: the endpoint of the "
            "config (docs/endpoints.md)."
        ),
    ] = None,
    ppm: Annotated[
        Path | None, typer.Option(help="Checkpoint of the PPM; without it: terminal-guided.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the trees go [runs/rollout-PROBLEMS].")
    ] = None,
    config: Annotated[Path, typer.Option(help="Rollout config, or the name of one.")] = Path(
        "rollout"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and the engines.")] = False,
) -> None:
    """Search the problems of one file with given models and commit the trees."""
    quiet_logging(verbose)
    from cluster.folder.config_file import load_config
    from cluster.folder.machine import command_line
    from cluster.runs.config import RolloutConfig
    from cluster.runs.rollout import RolloutRun, print_rollout_report
    from cluster.telemetry.progress import ProgressView

    given: dict[str, Any] = {"problems": problems, "ppm": ppm, "limit": limit}
    if policy is not None:
        given["policy"] = policy
    given["run_dir"] = run_dir or Path("runs") / f"rollout-{problems.stem}"
    settings = load_config(config, overrides or (), kind=RolloutConfig, given=given)
    console = Console()
    view = ProgressView(console)
    run = RolloutRun(settings, view)
    outcome = _run(run.run(), again=command_line(), view=view)
    print_rollout_report(outcome, console)
    say(console, f"trees in {run.folder.store.root}")


@app.command()
def solve(
    problem: Annotated[
        str | None,
        typer.Argument(help="The problem; - for standard input, @FILE for a text file."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Checkpoint directory of the policy.")] = None,
    ppm: Annotated[Path | None, typer.Option(help="Checkpoint directory of the PPM.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run whose last finished round is asked.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="How the answer is found [mcts].")] = None,
    trajectories: Annotated[int | None, typer.Option(min=1, help="Solutions to find [64].")] = None,
    config: Annotated[Path | None, typer.Option(help="Solve config, YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option(help="Instead of one problem: requests, JSONL (docs/serve.md)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Answers of --batch; run it again to go on.")
    ] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and the engines.")] = False,
) -> None:
    """Think about one problem with the trained pair, and show how; or about a batch of them."""
    if (problem is None) == (batch is None) or (batch is None) != (out is None):
        raise typer.BadParameter("give a problem, or --batch FILE with --out FILE")
    quiet_logging(verbose)
    given: dict[str, Any] = {
        "policy": policy,
        "ppm": ppm,
        "run": run,
        "method": method,
        "trajectories": trajectories,
        "config": config,
        "overrides": overrides or (),
    }
    if batch is not None and out is not None:
        from cluster.folder.machine import command_line
        from cluster.serve.batch import run_batch

        _run(run_batch(batch, out, Console(), **given), again=command_line())
    elif problem is not None:
        from cluster.runs.solve import run_solve

        _run(run_solve(problem, as_json=as_json, **given), again="")


@app.command()
def serve(
    policy: Annotated[Path | None, typer.Option(help="Checkpoint directory of the policy.")] = None,
    ppm: Annotated[Path | None, typer.Option(help="Checkpoint directory of the PPM.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run whose last finished round is served.")
    ] = None,
    follow: Annotated[
        Path | None, typer.Option(help="The same, and each newer one as it is promoted.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="Of the model `rstar` [mcts].")] = None,
    trajectories: Annotated[int | None, typer.Option(min=1, help="Likewise [64].")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address; any but the loopback needs API keys [127.0.0.1].")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free [8400].")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys [those in RSTAR_API_KEYS].")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Serve config, YAML.")] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and the engines.")] = False,
) -> None:
    """Answer problems on an OpenAI-compatible HTTP API, and on a page for people."""
    quiet_logging(verbose)
    from cluster.serve.command import run_serve

    serving = run_serve(
        Console(),
        policy=policy,
        ppm=ppm,
        run=run,
        follow=follow,
        method=method,
        trajectories=trajectories,
        host=host,
        port=port,
        keys=keys,
        config=config,
        overrides=overrides or (),
    )
    _run(serving, again="")


@app.command()
def tree(
    run: Annotated[str, typer.Argument(help="Folder of a run, as runs/demo.")],
    problem: Annotated[str, typer.Argument(help="Problem id, or the beginning of just one.")],
    round: Annotated[int | None, typer.Option(help="Round [the last that searched it].")] = None,
    index: Annotated[
        int | None, typer.Option("--tree", help="Tree of the round [the first that solved it].")
    ] = None,
    node: Annotated[int | None, typer.Option(help="Print one node in full.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Fold deeper nodes.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Fold nothing; show candidates left out too.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page instead.")
    ] = None,
) -> None:
    """Show a search tree: Q-values, visits, chosen trajectories and preference pairs."""
    from cluster.reports.tree_view import show_tree

    show_tree(
        run,
        problem,
        Console(),
        round=round,
        tree=index,
        node=node,
        depth=depth,
        everything=everything,
        page=page,
    )


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    watch: Annotated[bool, typer.Option(help="Again and again, until the run ends.")] = False,
) -> None:
    """Show how a run stands, from any shell or machine that sees its folder."""
    from cluster.watch.status_view import show_status

    with _interruptible():
        show_status(run, Console(), as_json=as_json, watch=watch)


@app.command("set")
def set_(
    run: Annotated[Path, typer.Argument(help="A run: a folder, or s3://, gs://, az://.")],
    assignments: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE...", help="As cluster.policy.replicas=8.")
    ],
) -> None:
    """Change a run while it goes on: pool sizes, priorities, prices, budget, log level."""
    from cluster.runs.change import set_run

    with _interruptible():
        set_run(run, assignments, Console())


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    problem: Annotated[
        str | None,
        typer.Option(help="This problem (an id or its beginning), and what became of it."),
    ] = None,
    job: Annotated[str | None, typer.Option(help="Only about this job.")] = None,
    lease: Annotated[str | None, typer.Option(help="Only about this lease.")] = None,
    process: Annotated[
        str | None, typer.Option(help="Only of processes whose name begins so, as worker.")
    ] = None,
    level: Annotated[str, typer.Option(help="debug, info, warning or error, and above.")] = "info",
    since: Annotated[str | None, typer.Option(help="Not older than this, as 10m.")] = None,
    last: Annotated[int | None, typer.Option("-n", min=1, help="Only the last N lines.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on with lines as they come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show what the processes of a run logged, and what became of a problem."""
    from cluster.watch.log_view import show_logs

    with _interruptible():
        show_logs(
            run,
            Console(),
            problem=problem,
            job=job,
            lease=lease,
            process=process,
            level=level,
            since=since,
            last=last,
            follow=follow,
            as_json=as_json,
        )


@app.command()
def top(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Watch a run's speed, replicas and waits in the terminal."""
    from cluster.watch.top import show_top

    with _interruptible():
        show_top(run, Console(), once=once)


@app.command()
def why(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, whole stacks.")] = False,
    offline: Annotated[
        bool, typer.Option(help="Do not ask Ray; the run's folder has to do.")
    ] = False,
) -> None:
    """Say why a run does not move: who waits for whom, the slowest, their stacks."""
    from cluster.watch.why import show_why

    with _interruptible():
        show_why(run, Console(), as_json=as_json, offline=offline)


@app.command()
def dashboard(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8300,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the loopback needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(envvar="RSTAR_DASHBOARD_TOKEN", help="Asked of visitors [made if needed]."),
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Address of a Prometheus [the run's own samples].")
    ] = None,
) -> None:
    """Serve the run's dashboards as a web page, without Grafana."""
    from cluster.watch.dashboard import serve_dashboard

    serving = serve_dashboard(
        run, Console(), host=host, port=port, token=token, prometheus=prometheus
    )
    _run(serving, again="")


@app.command()
def train(
    kind: Annotated[TrainKind, typer.Argument(help="Which model.")],
    config: Annotated[Path, typer.Argument(help="Train config, YAML.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="Promote what the gate holds back.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show the logs.")] = False,
) -> None:
    """Train one model on a committed round or on plain files."""
    quiet_logging(verbose)
    from cluster.folder.machine import command_line
    from cluster.runs.train import print_train_report, run_train

    console = Console()
    training = run_train(kind.value, config, overrides or (), force, console)
    print_train_report(_run(training, again=command_line()), console)


@app.command()
def regrade(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
) -> None:
    """Judge every stored answer again with this version's grader, and say what changed."""
    from cluster.runs.regrade import run_regrade

    with _interruptible(f"stopped; to go on where it stopped: rstar regrade {run}"):
        run_regrade(run, Console())


@app.command()
def copy(
    run: Annotated[Path, typer.Argument(help="A run: a folder, or s3://, gs://, az://.")],
    to: Annotated[Path, typer.Argument(help="Where its copy goes, likewise.")],
) -> None:
    """Copy a run to another store, checking digests; run it again to go on after a break."""
    from rich.progress import Progress

    from cluster.folder.run_folder import RunFolder
    from cluster.runs.copy import copy_run

    target = RunFolder(to)
    with _interruptible(f"stopped; to go on: rstar copy {run} {to}"), Progress() as bar:
        task = bar.add_task("bytes", total=None)
        copied = copy_run(
            RunFolder(run),
            target,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    say(
        Console(),
        f"{copied.files:,} files copied, {copied.there:,} were there, "
        f"{copied.bytes / 2**20:,.1f} MiB in {target.store.root}",
    )


@app.command()
def track(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo.")],
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACKER", help="tensorboard, mlflow or wandb [as its config says]."),
    ] = None,
) -> None:
    """Tell experiment trackers of a run that is over, or what they missed."""
    from cluster.telemetry.tracking import track
    from cluster.watch.status import run_folder

    folder = run_folder(run)
    console = Console()
    trackers = to or (folder.config() or {}).get("tracking", [])
    if not track(folder, trackers, partial(say, console)):
        raise typer.Exit(1)


@app.command()
def simulate(
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As num_replicas=64, lost_per_hour=0.2."),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option("--latency-curve", help="JSON of `python -m bench.search` [a built-in one]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a round of modelled engines through the real coordinator, at virtual time."""
    from cluster.folder.config_file import make_config
    from cluster.planning.latency import DEFAULT_CURVE, LatencyCurve
    from cluster.planning.simulate import Simulation
    from cluster.planning.simulation_figures import SimulationConfig, print_simulation

    settings = make_config({}, overrides or (), kind=SimulationConfig, source="simulate")
    known = LatencyCurve.read(curve) if curve is not None else DEFAULT_CURVE
    result = Simulation(settings, known).run()
    if as_json:
        typer.echo(json.dumps(result.model_dump()))
    else:
        print_simulation(result, settings, Console(), curve=known)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="Run config, or the name of one: the whole run.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="To search; with a config.")] = 747_000,
    gpus: Annotated[int | None, typer.Option(min=1, help="Instead: one round on so many.")] = None,
    gpu_kind: Annotated[str, typer.Option(help="A row of the table of GPU kinds.")] = "",
    on_demand: Annotated[bool, typer.Option(help="At the on-demand price, nothing lost.")] = False,
    kinds: Annotated[Path, typer.Option(help="Table of GPU kinds, YAML; edit it.")] = GPU_KINDS,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As problems=100000, price_per_hour=2."),
    ] = None,
) -> None:
    """Say how many days and dollars a run, or one round of it, would take."""
    from cluster.folder.config_file import ConfigError, load_config, make_config
    from cluster.planning.planner import (
        PlanConfig,
        estimate_run,
        make_plan,
        print_estimate,
        print_plan,
        read_gpu_kinds,
    )

    if (config is None) == (gpus is None):
        raise typer.BadParameter("give a config, or --gpus and --gpu-kind")
    if config is not None:
        from cluster.runs.config import RunConfig

        run = load_config(config, overrides or (), kind=RunConfig)
        print_estimate(estimate_run(run, problems), Console())
        return
    table = read_gpu_kinds(kinds)
    if gpu_kind not in table:
        raise ConfigError(f"{kinds}: no GPU kind {gpu_kind!r}; there are {', '.join(table)}")
    kind = table[gpu_kind]
    data = {
        "gpus": gpus,
        "tokens_per_s": kind.tokens_per_s,
        "price_per_hour": kind.on_demand_price if on_demand else kind.spot_price,
        "lost_per_hour": 0.0 if on_demand else kind.lost_per_hour,
    }
    settings = make_config(data, overrides or (), kind=PlanConfig, source="plan")
    print_plan(make_plan(settings), settings, Console())


@app.command()
def evaluate(
    what: Annotated[
        Path | None, typer.Argument(help="Folder of a run, or a model's directory.")
    ] = None,
    benchmarks: Annotated[
        str, typer.Option(help="Names of files in --data, or paths: math500,aime2024,...")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="Folder with the problem files.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Some of greedy, majority, best-of-n, weighted-majority, beam, mcts; by default "
            "greedy."
        ),
    ] = "",
    trajectories: Annotated[
        str, typer.Option(help="Budgets, as 1,2,4,8,16,32,64; by default 1,2,4,8.")
    ] = "",
    policy: Annotated[Path | None, typer.Option(help="Directory of the policy.")] = None,
    ppm: Annotated[Path | None, typer.Option(help="Directory of the PPM.")] = None,
    round: Annotated[int | None, typer.Option(help="Of a run; by default its last.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First N problems of each.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for it; by default runs/evaluate-NAME.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Evaluation config, YAML.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two finished evaluations instead."),
    ] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and the engines.")] = False,
) -> None:
    """Measure a model with several methods and budgets on benchmarks; run it again to go on."""
    quiet_logging(verbose)
    from cluster.evaluation.asked import evaluate_config
    from cluster.evaluation.benchmarks import EvaluationRun
    from cluster.folder.machine import command_line
    from cluster.reports.evaluation_page import print_evaluation, write_evaluation
    from cluster.telemetry.progress import ProgressView

    console = Console()
    if compare is not None:
        from cluster.evaluation.compare import show_comparison

        show_comparison(*compare, console)
        return
    settings = evaluate_config(
        what=what,
        policy=policy,
        ppm=ppm,
        round=round,
        benchmarks=benchmarks,
        data=data,
        methods=method,
        trajectories=trajectories,
        limit=limit,
        out=out,
        config=config,
        overrides=overrides or (),
    )
    view = ProgressView(console)
    run = EvaluationRun(settings, view)
    found = _run(run.run(), again=command_line(), view=view)
    write_evaluation(run.folder, found)
    print_evaluation(found, console)
    say(console, f"answers, results, tables and report.html in {run.folder.store.root}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or an evaluation.")],
    page: Annotated[
        Path | None, typer.Option("--html", help="Where the page goes; by default RUN/report.html.")
    ] = None,
) -> None:
    """Print what a run or an evaluation showed, and write its page."""
    from cluster.reports.run_report import show_report

    show_report(run, Console(), page=page)


@cluster_app.command("check")
def check_cluster(
    file: Annotated[Path, typer.Argument(help="Launch file for `ray up`, as ray_cluster.yaml.")],
    config: Annotated[
        Path | None, typer.Option(help="Run config, or the name of one, whose actors must fit.")
    ] = None,
    prices: Annotated[Path, typer.Option(help="Price table, YAML; edit it.")] = MACHINE_PRICES,
) -> None:
    """Check a launch file offline and print what its machines cost per hour."""
    from cluster.planning.launch_check import run_check

    if not run_check(file, Console(), config=config, prices=prices):
        raise typer.Exit(1)


@problems_app.command("import")
def problems_import(
    files: Annotated[
        list[str], typer.Argument(help="Files, folders, or hf://owner/name:split@config.")
    ],
    out: Annotated[Path, typer.Option(help="The problems table; its report lies beside it.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Benchmark file or folder to stay clear of; may be repeated."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="One of those in docs/problems.md; else told from the columns."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=COLUMN,...", help="As problem=body+question,answer=label.value."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Read as if it were not there; may be repeated."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Source of every row.")] = None,
    level: Annotated[Level | None, typer.Option(help="Level of every row.")] = None,
    subsets: Annotated[
        str | None,
        typer.Option(help="Subsets of NuminaMath to keep: all, or names; else the paper's."),
    ] = None,
    rule: Annotated[
        DecontaminationRule,
        typer.Option(help="Which rows with a hit on a benchmark are removed."),
    ] = DecontaminationRule.ANY,
    exact_only: Annotated[bool, typer.Option(help="Keep near-duplicates.")] = False,
    solutions: Annotated[bool, typer.Option(help="Keep the solutions too.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Read problem files into one table without duplicates and benchmark problems."""
    from cluster.runs.problems import run_import
    from rollout.problems.formats import PAPER_SUBSETS, parse_columns
    from rollout.problems.import_report import ImportSettings, report_folder

    kept = PAPER_SUBSETS if subsets is None else tuple(subsets.replace(" ", "").split(","))
    settings = ImportSettings(
        inputs=tuple(files),
        against=tuple(against or ()),
        format=format,
        columns=parse_columns(columns) if columns else None,
        drop=tuple(drop or ()),
        source=source,
        level=level,
        subsets=None if kept == ("all",) else kept,
        rule=rule,
        near_duplicates=not exact_only,
        keep_solutions=solutions,
    )
    console = Console()
    with _interruptible("stopped; nothing was written"):
        report = run_import(settings, out, console, force=force)
    say(console, f"{report.total('kept'):,} problems in {out} after {report.seconds:.0f} s")
    say(console, f"every other row, and why: {report_folder(out) / 'report.md'}")


@problems_app.command("stats")
def problems_stats(
    file: Annotated[str, typer.Argument(help="Problem file of any known format.")],
) -> None:
    """Count what a problem file holds: sources, levels, kinds of answers."""
    from cluster.runs.problems import run_stats

    run_stats(file, Console())


@problems_app.command("check")
def problems_check(
    file: Annotated[str, typer.Argument(help="Problem file of any known format.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Benchmark file or folder to stay clear of; may be repeated."),
    ] = None,
) -> None:
    """Say what is wrong with a problem file; exit status 1 when anything is."""
    from cluster.runs.problems import run_check

    if not run_check(file, tuple(against or ()), Console()):
        raise typer.Exit(1)


@problems_app.command("synthesize")
def problems_synthesize(
    config: Annotated[Path | None, typer.Argument(help="Synthesis config, YAML.")] = None,
    seeds: Annotated[
        list[Path] | None, typer.Option(help="Problems to write new ones after; may be repeated.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, as https://api.example.com/v1")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As the server names it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The problems table; its journal lies beside it.")
    ] = None,
    number: Annotated[int | None, typer.Option("-n", min=1, help="Problems to keep.")] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs.")] = False,
) -> None:
    """Have a model write new problems, and keep those on whose answer its solutions agree."""
    quiet_logging(verbose)
    from cluster.folder.machine import command_line
    from cluster.runs.synthesize import run_synthesize, synthesize_config

    settings = synthesize_config(
        config,
        overrides or (),
        seeds=seeds or (),
        endpoint=endpoint,
        model=model,
        out=out,
        num_problems=number,
    )
    _run(run_synthesize(settings, Console()), again=command_line())


@contextmanager
def _interruptible(said: str = "") -> Iterator[None]:
    """Ctrl-C ends the command quietly, or with a line that says what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        if said:
            typer.echo(said, err=True)
        raise typer.Exit(130) from None


def _start_again(restarts: int) -> None:
    """Have this command done in a process of its own, again when it fails; in that, nothing."""
    from cluster.runs.restarts import VARIABLE, run_again

    if VARIABLE in os.environ:
        return
    command = [sys.executable, "-m", "cluster", *sys.argv[1:]]
    status = run_again(command, restarts=restarts, tell=partial(typer.echo, err=True))
    raise typer.Exit(status)


def _run(coroutine: Coroutine[Any, Any, T], again: str, view: ProgressView | None = None) -> T:
    """Run to the end; Ctrl-C cancels once politely, and says how to go on.

    SIGTERM and SIGHUP do the same. But what can be gone on with needs no terminal: where SIGHUP
    says that there is none any more, it goes on without.

    Args:
        again: the command that goes on; "" if nothing is kept.
        view: told that the run is to stop; None: a line says so.
    """

    async def main() -> T:
        task = asyncio.ensure_future(coroutine)
        loop = asyncio.get_running_loop()
        interrupts = 0
        last_s = -SAME_S

        def interrupt() -> None:
            nonlocal interrupts, last_s
            # A terminal, or Ray, tells this process and who started it, and that one passes it on.
            again_s, last_s = loop.time() - last_s, loop.time()
            if again_s < SAME_S:
                return
            interrupts += 1
            if interrupts == 1:
                if view is not None:
                    view.stop_requested()
                else:
                    typer.echo("\nstopping (Ctrl-C again stops at once)", err=True)
                task.cancel()
            else:
                loop.remove_signal_handler(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        def stop() -> None:
            if not interrupts:  # a second one is no person who is in a hurry
                interrupt()

        def hang_up() -> None:
            if again and _left_terminal(terminal):
                said = f"the terminal is gone; this goes on, until kill {os.getpid()}"
                view.note(said) if view is not None else logging.getLogger(__name__).warning(said)
            else:
                stop()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        loop.add_signal_handler(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            loop.add_signal_handler(signal.SIGHUP, hang_up)
        return await task

    terminal = [number for number in range(3) if os.isatty(number)]

    try:
        return asyncio.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        hint = f"; to go on where it stopped: {again}" if again else ""
        typer.echo(f"stopped{hint}", err=True)
        raise typer.Exit(130) from None


def _left_terminal(terminal: Sequence[int]) -> bool:
    """Have streams that were a terminal's be nobody's, if it is gone; False if it is there."""
    if not terminal or any(map(os.isatty, terminal)):
        return False
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in terminal:
        os.dup2(nowhere, number)
    os.close(nowhere)
    return True


def main() -> None:
    """Entry point of `rstar`."""
    # A shell starts the background jobs of a script with SIGINT ignored; `kill -INT` is how a
    # person asks such a run to stop in good order.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with one_line("rstar"):
        app()
