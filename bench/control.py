"""The demos-only control of a run: how much of its gain is just more training?

    python -m bench.control runs/demo [--json FILE]

Trains the base model on the demonstrations alone, through the same learner code, settings and seed,
for as many SFT tokens as the policy of the last round had seen, and measures held-out greedy pass@1
with the run's own evaluation. Prints it beside the run's cold start and last round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.errors import one_line, quiet_logging
from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import evaluate
from cluster.evaluation.shares import COLUMNS, percent
from cluster.fleet.fleet import Fleet
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RunConfig
from learner.checkpoint import CheckpointStore
from learner.fit import FitRequest, FitResult
from rollout.problems.reader import read_problems
from rollout.seeds import derive_seed

CONTROL_ROUND = 1


async def run_control(config: RunConfig, run: RunFolder, padded_tokens: int) -> dict[str, Any]:
    """Train and evaluate the control of a finished run; returns its held-out shares."""
    folder = RunFolder(run.root / "control")
    folder.root.mkdir(exist_ok=True)
    base = config.models.base_model or run.base_model
    store = CheckpointStore(folder.checkpoints)
    test, _ = read_problems(_test_file(config, run), default_level=config.problems.default_level)
    fleet = Fleet(config, folder)
    try:
        await fleet.start(base)
        result: FitResult | None = None
        if store.current("policy", CONTROL_ROUND) is None:
            result = await fleet.fit(
                FitRequest(
                    fit_id="control",
                    kind="policy",
                    round=CONTROL_ROUND,
                    base=str(base),
                    data=str(run.dataset(0)),
                    checkpoints=str(folder.checkpoints),
                    config=config.train_policy.model_copy(update={"total_tokens": padded_tokens}),
                    seed=derive_seed(config.seed, "fit", "control"),
                ),
                lambda progress: None,
            )
        checkpoint = store.current("policy", CONTROL_ROUND)
        await fleet.serve_policy(base, checkpoint)
        evaluation, _ = await evaluate(
            fleet,
            test,
            config=EvaluationConfig(
                num_problems=config.evaluation.num_problems,
                max_solution_tokens=config.evaluation.max_solution_tokens,
            ),
            search=config.search,
            round=CONTROL_ROUND,
            seed=config.seed,
            preference=False,
            on_progress=lambda done, total, facts: None,
        )
    finally:
        await fleet.stop()
    return {
        "greedy": evaluation.shares("greedy"),
        "padded_tokens": padded_tokens,
        "final_loss": result.final_loss if result is not None else None,
    }


def _test_file(config: RunConfig, run: RunFolder) -> Path:
    return config.problems.test or run.problems / "test.parquet"


def sft_tokens(run: RunFolder, config: RunConfig) -> int:
    """Padded SFT tokens the policy of the last round had seen, those of its ancestors included."""
    last = len(config.rounds)
    rounds = range(last + 1) if config.models.policy_init == "previous" else [last]
    return sum(run.stage(number, "train_policy").get("padded_tokens", 0) for number in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, as runs/demo")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    quiet_logging(verbose=False)
    run = RunFolder(arguments.run)
    report = run.read("report.json")
    if report is None:
        raise SystemExit(f"{run.root}: no report.json; finish the run with `rstar evolve` first")
    data = yaml.safe_load((run.root / "config.yaml").read_text(encoding="utf-8"))
    config = RunConfig.model_validate(data)
    with one_line("bench.control"):
        control = asyncio.run(run_control(config, run, sft_tokens(run, config)))
    cold, last = report["cold_start"]["greedy"], report["rounds"][-1]["greedy"]
    table = Table(title="held-out greedy pass@1, %", box=box.SIMPLE)
    for column in ("", *COLUMNS):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "cold start": cold,
        f"control: demonstrations only, {control['padded_tokens']:,} tokens": control["greedy"],
        f"round {len(config.rounds)}": last,
    }
    for name, shares in rows.items():
        table.add_row(name, *(percent(shares[column]) for column in COLUMNS))
    Console().print(table)
    figures = {
        "cold_start": cold,
        "control": control,
        "last_round": last,
        "gain_over_cold_start": last["all"] - cold["all"],
        "gain_over_control": last["all"] - control["greedy"]["all"],
        "seed": config.seed,
        "hardware": hardware(),
        "versions": versions(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
