from __future__ import annotations

from pathlib import Path
from typing import Literal

from tools.config_reference import PATH, reference, type_text


def test_page_is_up_to_date() -> None:
    message = "run python -m tools.config_reference"
    assert PATH.read_text(encoding="utf-8") == reference(), message


def test_every_key_has_a_description() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    bare = [row for row in rows if row.rstrip(" |").count(" | ") < 2]
    assert len(rows) > 150
    assert not bare


def test_sections_defaults_and_bounds_are_told() -> None:
    page = reference()
    assert "### `policy_engine`, `ppm_engine`" in page
    assert "### `rounds.N`" in page
    assert "| `top_p` | float, > 0, <= 1 | `1.0` | nucleus sampling mass |" in page
    assert "| `run_dir` | path | required |" in page
    assert "| `wall_s` | float | `10.0` | Seconds from the start of the step" in page


def test_types_read_like_prose() -> None:
    assert type_text(int | None) == "int or null"
    assert type_text(list[Path]) == "list of path"
    assert type_text(dict[str, float]) == "mapping to float"
    assert type_text(tuple[float, float]) == "2 x float"
    assert type_text(Literal["a", "b"] | None) == "a, b or null"
