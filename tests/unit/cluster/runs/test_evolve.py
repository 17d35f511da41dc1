"""What a run of self-evolution refuses before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.folder.config_file import ConfigError
from cluster.runs.config import RunConfig
from cluster.runs.evolve import Evolution
from cluster.telemetry.progress import ProgressView

GENERAL, MARKED = Path("general"), Path("run/base_with_markers")


def evolution(tmp_path: Path, *templates: str, base: Path = MARKED, **own: Any) -> Evolution:
    data = {
        "name": "x",
        "run_dir": tmp_path / "run",
        "problems": {"train": ["p.jsonl"], "demonstrations": "d.jsonl"},
        "models": {"base_model": GENERAL},
        "rounds": [{"preference": False, "template": template} for template in templates],
    }
    made = Evolution(RunConfig.model_validate(data | own), ProgressView(Console(quiet=True)))
    made.untrained, made.base_model = GENERAL, base
    return made


def test_a_general_model_is_bootstrapped_or_gets_a_cold_start(tmp_path: Path) -> None:
    evolution(tmp_path, "bootstrap", "rstar")._check_templates()
    evolution(tmp_path, "rstar", "rstar", cold_start={})._check_templates()
    with pytest.raises(ConfigError, match=r"rounds.0.template: general was never fine-tuned"):
        evolution(tmp_path, "rstar")._check_templates()


def test_a_base_whose_tokenizer_has_the_markers_needs_no_worked_examples(tmp_path: Path) -> None:
    evolution(tmp_path, "rstar", base=GENERAL)._check_templates()
    with pytest.raises(ConfigError, match=r"bootstrap, but the tokenizer of general holds"):
        evolution(tmp_path, "bootstrap", base=GENERAL)._check_templates()


def test_worked_examples_are_for_the_first_round_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds.1.template: bootstrap .* round 2"):
        evolution(tmp_path, "bootstrap", "bootstrap")._check_templates()
    with pytest.raises(ConfigError, match=r"rounds.0.template: bootstrap .* round 1"):
        evolution(tmp_path, "bootstrap", cold_start={})._check_templates()
