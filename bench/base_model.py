"""What a general model finds in a first round, asked with worked examples.

    python -m bench.base_model (--model DIR | --endpoint URL --model NAME) --problems FILE
        [--limit N] [--run-dir DIR] [--set KEY=VALUE]

Searches the first N problems as round 1 of a run does (template bootstrap: the model is served as
it is, on a replica or behind a vLLM endpoint, and step markers are plain text), with 4 candidates x
2 rollouts at temperature 0.7 unless told otherwise, into a temporary folder unless one is named,
and prints how the steps ended and what they came to.

- `ended_in_step_share`: candidates that end in a step marker, of all that were generated
- `answered_share`: problems for which some rollout reached an answer
- `solved_share`: problems whose answer was right in some rollout
- `tokens_per_s`: generated tokens over the seconds of the rollout, engine start excluded
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.errors import one_line, quiet_logging
from cluster.folder.config_file import load_config
from cluster.folder.machine import hardware, versions
from cluster.runs.config import RolloutConfig
from cluster.runs.rollout import ROUND, RolloutRun, print_rollout_report
from cluster.telemetry.progress import ProgressView
from rollout.store import RunStore, TrajectoryStore
from rollout.tree import Discard, Tree

SETTINGS = (
    "search.template=bootstrap",
    "search.num_candidates=4",
    "search.num_rollouts=2",
    "search.temperature=0.7",
    "search.max_step_tokens=200",
    "policy_engine.max_model_len=4096",
    "policy_engine.kv_cache_gib=2",
    "cluster.start_timeout_s=900",
    "cluster.min_step_share=0",
)


def step_outcomes(trees: list[Tree]) -> Counter[str]:
    """How all candidates ended: the reason they were left out, or the kind of step."""
    outcomes: Counter[str] = Counter()
    for tree in trees:
        for node in tree.nodes[1:]:
            assert node.step is not None
            name = node.discard.value if node.discard is not None else node.step.kind.value
            outcomes[name] += node.multiplicity
    return outcomes


def measure(
    policy: dict[str, Any],
    problems: Path,
    limit: int | None,
    run_dir: Path | None,
    overrides: list[str],
) -> dict[str, Any]:
    """Search and count; `policy` is the key `policy` or `endpoint` of a rollout's config."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="rstar-base-model-") as scratch:
        folder = run_dir or Path(scratch)
        config = load_config(
            "rollout",
            [*SETTINGS, *overrides],
            kind=RolloutConfig,
            given={**policy, "problems": problems, "limit": limit, "run_dir": folder},
        )
        run = RolloutRun(config, ProgressView(console))
        report = asyncio.run(run.run())
        print_rollout_report(report, console)
        trees = list(TrajectoryStore(RunStore(str(folder)), ROUND).trees())
    outcomes = step_outcomes(trees)
    candidates = outcomes.total()
    return {
        "ended_in_step_share": 1.0 - outcomes[Discard.UNFINISHED.value] / max(candidates, 1),
        "answered_share": sum(any(n.visit_count for n in tree.answers()) for tree in trees)
        / max(len(trees), 1),
        "solved_share": report["solved"]["all"],
        "tokens_per_s": report["generated_tokens_per_s"],
        "problems": len(trees),
        "candidates": candidates,
        "generated_tokens": report["generated_tokens"],
        "outcomes": dict(outcomes.most_common()),
        "seconds": report["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", required=True, help="Hugging Face directory, or the model's name at the endpoint"
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="vLLM server, up to and with /v1 [a replica]"
    )
    parser.add_argument("--problems", type=Path, required=True, help="problem file")
    parser.add_argument("--limit", type=int, help="first N problems [all]")
    parser.add_argument("--run-dir", type=Path, help="keep the run there [a temporary folder]")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    quiet_logging(verbose=False)
    policy = (
        {"policy": Path(options.model)}
        if options.endpoint is None
        else {"endpoint": {"base_url": options.endpoint, "model": options.model, "dialect": "vllm"}}
    )
    with one_line("bench.base_model"):
        figures = measure(
            policy, options.problems, options.limit, options.run_dir, options.overrides
        )
    figures |= {"hardware": hardware(), "versions": versions()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
