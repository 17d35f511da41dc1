from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from learner.dataset import (
    DatasetError,
    read_manifest,
    read_pairs,
    read_sft,
    read_valued_nodes,
)
from learner.plain import write_plain_dataset
from learner.select import DatasetConfig
from rollout.prompt import SHORT_TEMPLATE, render_question

ALL = DatasetConfig(validation_share=0.0)


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_and_responses_become_trajectories(tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"prompt": ["1+1?", "2+2?"], "response": ["2", "4"]}), path)
    write_plain_dataset("policy", path, tmp_path / "data", config=ALL)
    first, second = read_sft(tmp_path / "data", "train")
    assert [(s.text, s.trained) for s in first.segments] == [("1+1?", False), ("2", True)]
    assert second.problem_id != first.problem_id


def test_questions_are_rendered_if_a_template_is_named(tmp_path):
    path = jsonl(tmp_path / "set.jsonl", [{"prompt": "1+1?", "response": "2"}])
    data = tmp_path / "data"
    manifest = write_plain_dataset("policy", path, data, config=ALL, template=SHORT_TEMPLATE)
    assert manifest["template"] == SHORT_TEMPLATE.name
    (example,) = read_sft(data, "train")
    assert example.segments[0].text == render_question("1+1?", SHORT_TEMPLATE)


def test_pairs_of_one_prompt_share_a_node_and_its_weight(tmp_path):
    rows = [
        {"prompt": "q", "chosen": good, "rejected": bad}
        for good in ("2", "two")
        for bad in ("3", "4")
    ]
    other = {"prompt": "r", "chosen": "a", "rejected": "b"}
    path = jsonl(tmp_path / "set.jsonl", [*rows[:2], other, *rows[2:]])
    write_plain_dataset("ppm", path, tmp_path / "data", config=ALL)
    weights: dict[str, list[float]] = {}
    for pair in read_pairs(tmp_path / "data", "train"):
        weights.setdefault(pair.prefix, []).append(pair.weight)
    assert weights == {"q": [0.25] * 4, "r": [1.0]}
    # the pairs of a prompt stand together, wherever its rows were
    prefixes = [pair.prefix for pair in read_pairs(tmp_path / "data", "train")]
    assert prefixes in (["q"] * 4 + ["r"], ["r"] + ["q"] * 4)


def test_q_columns_are_what_the_regression_learns(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "2", "rejected": "3", "chosen_q": 0.4, "rejected_q": 0.0},
        {"prompt": "q", "chosen": "two", "rejected": "4", "chosen_q": 0.0, "rejected_q": None},
        {"prompt": "r", "chosen": "a", "rejected": "b"},
    ]
    data = tmp_path / "data"
    manifest = write_plain_dataset("ppm", jsonl(tmp_path / "s.jsonl", rows), data, config=ALL)
    pairs = [(p.chosen_q, p.rejected_q) for p in read_pairs(data, "train") if p.prefix == "q"]
    assert pairs == [(0.4, 0.0), (0.0, -1.0)]
    values = {
        node.prefix: {step.text: step.q for step in node.steps} for node in read_valued_nodes(data)
    }
    assert values == {
        "q": {"2": 0.4, "3": 0.0, "two": 0.0, "4": -1.0},
        "r": {"a": 1.0, "b": -1.0},
    }
    assert manifest["counts"]["all"]["steps_train"] == 6
    held = DatasetConfig(validation_share=0.999999)
    write_plain_dataset("ppm", tmp_path / "s.jsonl", data, config=held)
    assert list(read_valued_nodes(data)) == []


def test_rows_of_one_prompt_stay_on_one_side_of_the_split(tmp_path):
    rows = [{"prompt": f"q{n % 20}", "response": str(n)} for n in range(100)]
    data, config = tmp_path / "data", DatasetConfig(validation_share=0.3)
    write_plain_dataset("policy", jsonl(tmp_path / "s.jsonl", rows), data, config=config)
    train = {e.problem_id for e in read_sft(data, "train")}
    held = {e.problem_id for e in read_sft(data, "validation")}
    assert train and held and not train & held


def test_own_validation_file_is_the_held_out_set(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", [{"prompt": "a", "response": "1"}] * 3)
    held = jsonl(tmp_path / "v.jsonl", [{"prompt": "b", "response": "2"}])
    config = DatasetConfig(validation_share=0.5)
    manifest = write_plain_dataset(
        "policy", train, tmp_path / "data", validation=held, config=config
    )
    assert manifest["counts"]["all"] == {"sft_train": 3, "sft_validation": 1}


def test_rows_that_cannot_be_trained_on_are_left_out_and_counted(tmp_path, caplog):
    good = {"prompt": "a", "response": "b"}
    bad = [{"prompt": "c"}, {"prompt": "d", "response": 7}, {"prompt": "e", "response": "\udfff"}]
    path = jsonl(tmp_path / "set.jsonl", [*bad, good])
    held = jsonl(tmp_path / "held.jsonl", [good, bad[0]])
    manifest = write_plain_dataset("policy", path, tmp_path / "data", validation=held, config=ALL)
    assert manifest["counts"]["all"] == {"sft_train": 1, "sft_validation": 1}
    assert manifest["excluded"]["all"] == {"empty": 3, "unrenderable": 1}
    assert f"rows are left out. file={path} empty=2 unrenderable=1" in caplog.text

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, pair | {"rejected": "b"}, pair | {"rejected": "\ud800"}, pair | {"chosen": ""}]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    manifest = write_plain_dataset("ppm", path, tmp_path / "pairs", config=ALL)
    assert manifest["excluded"]["all"] == {"same_text": 1, "unrenderable": 1, "empty": 1}
    (kept,) = read_pairs(tmp_path / "pairs", "train")
    assert (kept.chosen, kept.rejected, kept.weight) == ("b", "c", 1.0)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("policy", [], "holds no rows"),
        ("policy", ["text"], "one JSON object"),
        ("ppm", [{"prompt": "a", "chosen": "b", "rejected": "c"}, 7], "one JSON object"),
        ("policy", [{"promt": "a", "response": "b"}], "no column 'prompt' .* is it 'promt'"),
        (
            "policy",
            [{"prompt": "\ud800", "response": "b"}, {"prompt": "c"}],
            "no row can be trained on: unrenderable=1 empty=1",
        ),
        ("ppm", [{"prompt": "a", "chosen": "b"}], "only chosen texts.* needs both classes"),
        ("ppm", [{"prompt": "a", "rejected": "b"}], "only rejected texts.* needs both classes"),
        ("ppm", [{"prompt": "a", "chosen": "b", "rejected": "b"}], "same text in all 1 rows"),
        (
            "ppm",
            [
                {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_q": -1},
                {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_q": 1.5},
            ],
            r"row 2: chosen_q must be a number in \[-1, 1\], got 1.5",
        ),
    ],
)
def test_bad_set_is_one_clear_error(tmp_path, kind, rows, message):
    path = jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(DatasetError, match=message):
        write_plain_dataset(kind, path, tmp_path / "data", config=ALL)
    assert read_manifest(tmp_path / "data") is None
    assert not list((tmp_path / "data").iterdir())


def test_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    with pytest.raises(
        DatasetError, match=r"set\.jsonl, line 2: no JSON \(Expecting ',' delimiter"
    ):
        write_plain_dataset("policy", path, tmp_path / "data", config=ALL)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no training file .*nowhere"):
        write_plain_dataset("policy", tmp_path / "nowhere.jsonl", tmp_path / "data", config=ALL)
