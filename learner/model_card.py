"""The README.md of a checkpoint: what it is, from what it was made, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_WHAT = {
    "policy": "A policy: writes solution steps with executable code.",
    "ppm": "A process preference model: tanh of its one logit at the last token of a partial "
    "solution is a value in (-1, 1).",
}


def write_model_card(directory: Path, kind: str, info: Mapping[str, Any]) -> None:
    """Put the card into a checkpoint directory that is being filled.

    Args:
        kind: "policy" or "ppm".
        info: what the checkpoint store keeps beside it: fit, base, config, seed, data_digest,
            data_counts, final_loss, metrics, versions.
    """
    head = {
        "library_name": "transformers",
        "base_model": Path(str(info["base"])).name,
        "pipeline_tag": "text-generation" if kind == "policy" else "text-classification",
        "tags": ["rstar-math", kind],
    }
    metrics = info["metrics"]
    rows = [
        f"| {name} | {value:.4f} |"
        for name, value in {"final_training_loss": info["final_loss"], **metrics}.items()
    ]
    card = "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {info['fit']}",
            "",
            f"{_WHAT[kind]} Made by self-evolution (rStar-Math, arXiv 2501.04519).",
            "",
            "## Made from",
            "",
            f"- {'base' if kind == 'policy' else 'trunk'}: `{info['base']}`",
            f"- data: sha256 `{info['data_digest']}`",
            *(f"  - {name}: {count}" for name, count in sorted(info["data_counts"].items())),
            f"- seed: {info['seed']}",
            *(f"- {name} {version}" for name, version in info["versions"].items()),
            "",
            "## Measured",
            "",
            "On held-out problems, but the training loss.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "## Config",
            "",
            "```yaml",
            yaml.safe_dump(info["config"], sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
