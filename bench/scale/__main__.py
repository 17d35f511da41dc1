"""Figures of a round of 747,000 problems, extrapolated from what one machine can hold.

    python -m bench.scale [--only PART ...] [--trees N] [--tokenizer DIR] [--json FILE]

Parts, each a module that says what it measures: selection, tokenise, worker, staging. Times are CPU
seconds unless a name says wall, so that a busy machine changes them little. Prints a table, then
one JSON object with the keys of all parts on the last line.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.folder.machine import hardware

PARTS = ("selection", "tokenise", "worker", "staging")

GOALS = {
    "commit_extra_ms_per_tree": "<= 5",
    "select_s_747k": "<= 900",
    "tokenise_s_per_1m_texts": "<= 700",
    "worker_mib_747k": "<= 150",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="parts to run [all]")
    parser.add_argument("--trees", type=int, default=50_000, help="trees to select from")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="folder of a real tokenizer",
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    given: dict[str, dict[str, Any]] = {
        "selection": {"num_trees": options.trees},
        "tokenise": {"tokenizer": options.tokenizer},
    }
    figures: dict[str, Any] = {}
    for part in options.only or PARTS:
        if find_spec(f"bench.scale.{part}") is None:
            continue
        found = import_module(f"bench.scale.{part}").measure(**given.get(part, {}))
        for name, value in found.items():
            print(f"{part:10} {name:34} {value:14,.2f}   {GOALS.get(name, '')}", flush=True)
        figures |= found
    figures["hardware"] = hardware()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
