from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.fleet.given_models import with_prompt_template
from cluster.folder.config_file import ConfigError
from cluster.runs.config import RolloutConfig
from learner.checkpoint import write_prompt_template


def config(policy: Path, **search: Any) -> RolloutConfig:
    return RolloutConfig.model_validate(
        {"problems": "p.jsonl", "policy": policy, "run_dir": "runs/x", "search": search}
    )


def test_policy_is_asked_with_the_template_it_was_trained_with(tmp_path: Path) -> None:
    write_prompt_template(tmp_path, "short")
    assert with_prompt_template(config(tmp_path)).search.template == "short"


def test_template_asked_for_wins_over_the_checkpoint(tmp_path: Path) -> None:
    write_prompt_template(tmp_path, "short")
    assert with_prompt_template(config(tmp_path, template="rstar")).search.template == "rstar"


def test_checkpoint_trained_elsewhere_gets_the_default(tmp_path: Path) -> None:
    assert with_prompt_template(config(tmp_path)).search.template == "rstar"


def test_unknown_template_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    write_prompt_template(tmp_path, "chatty")
    with pytest.raises(ConfigError, match="trained with prompt template 'chatty', expected"):
        with_prompt_template(config(tmp_path))
