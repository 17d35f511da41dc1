from __future__ import annotations

import json

import pytest

from learner.dataset import (
    FILES,
    MANIFEST,
    DatasetError,
    read_demonstrations,
    read_manifest,
    read_pairs,
    read_sft,
    read_valued_nodes,
    writing_dataset,
)
from learner.select import DatasetConfig
from tests.builders import answered, code, failed, make_problem, make_tree
from tests.datasets import selected


def test_written_dataset_reads_back_equal(tmp_path):
    trees = [
        make_tree(
            code("a = 1", answered("7", correct=True)),
            code("b = 2", answered("8", correct=False)),
            failed(),
            problem=make_problem(f"p{i}"),
        )
        for i in range(40)
    ]
    dataset = selected(trees, config=DatasetConfig(validation_share=0.3), valued_steps=True)

    def write(folder):
        with writing_dataset(folder) as writer:
            for name in FILES:
                for row in getattr(dataset, name):
                    writer.add(name, row)
            return writer.commit(template=None, counts={}, excluded={}, info={"round": 1})

    manifest = write(tmp_path)
    assert list(read_sft(tmp_path, "train")) == dataset.sft_train
    assert list(read_sft(tmp_path, "validation")) == dataset.sft_validation
    assert list(read_pairs(tmp_path, "train")) == dataset.pairs_train
    assert list(read_pairs(tmp_path, "validation")) == dataset.pairs_validation
    assert list(read_valued_nodes(tmp_path)) == dataset.steps_train != []
    assert read_manifest(tmp_path) == json.loads(json.dumps(manifest))
    assert manifest["files"]["sft_train"]["rows"] == len(dataset.sft_train)
    assert write(tmp_path / "again")["digest"] == manifest["digest"]
    assert dataset.manifest["digest"] == manifest["digest"]


def test_dataset_without_manifest_is_not_read(tmp_path):
    with writing_dataset(tmp_path) as writer:
        writer.commit(template=None, counts={}, excluded={})
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(DatasetError, match="no complete training data"):
        next(read_sft(tmp_path, "train"))


SOLUTION = (
    "<code>\na = 7\n<end_of_step>\nprint(a)\n<end_of_code>\n<output>7<end_of_output>\n"
    "<answer>It is \\boxed{7}<end_of_answer>"
)


def demonstration_file(path, **changes):
    row = {"id": "d1", "problem": "Seven?", "solution": SOLUTION, "level": "gsm"} | changes
    path.write_text(json.dumps(row) + "\n")
    return path


def test_demonstrations_are_read_as_steps(tmp_path):
    (found,) = read_demonstrations(demonstration_file(tmp_path / "demos.jsonl"))
    assert (found.id, found.level, found.problem) == ("d1", "gsm", "Seven?")
    assert "".join(step.rendered for step in found.steps) == SOLUTION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solution": "<code>\na = 7\n"}, r"row 1 \(id 'd1'\): solution ends without"),
        ({"problem": ""}, "row 1: no problem"),
        ({"solution": None}, "row 1: no solution"),
    ],
)
def test_unreadable_demonstration_is_named(tmp_path, changes, message):
    path = demonstration_file(tmp_path / "demos.jsonl", **changes)
    with pytest.raises(DatasetError, match=message):
        read_demonstrations(path)


def test_missing_or_empty_demonstration_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match="no demonstration file"):
        read_demonstrations(tmp_path / "none.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DatasetError, match="holds no demonstration"):
        read_demonstrations(tmp_path / "empty.jsonl")
