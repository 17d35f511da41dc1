from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from learner.checkpoint import (
    CheckpointError,
    CheckpointStore,
    checkpoint_directory,
    directory_digest,
    read_prompt_template,
    write_prompt_template,
)


def writer(content: str):
    def write(directory):
        (directory / "model.safetensors").write_text(content)

    return write


def test_published_checkpoint_is_found_again_with_its_info(tmp_path):
    store = CheckpointStore(tmp_path)
    made = store.publish("policy", 2, writer("weights"), {"loss": 0.5})

    assert CheckpointStore(tmp_path).current("policy", 2) == made
    assert store.info("policy", 2) == {"loss": 0.5}
    assert made.version == f"policy-r2-{made.digest[:8]}"
    assert directory_digest(Path(made.path)) == made.digest


def test_round_without_checkpoint_has_none(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.current("ppm", 1) is None
    assert store.latest("ppm") is None
    assert store.info("ppm", 1) == {}


def test_latest_is_the_highest_round_of_the_kind(tmp_path):
    store = CheckpointStore(tmp_path)
    for round in (0, 2, 10):
        store.publish("policy", round, writer(str(round)))
    store.publish("ppm", 11, writer("ppm"))
    assert store.latest("policy").round == 10


def test_failed_write_leaves_nothing_behind(tmp_path):
    store = CheckpointStore(tmp_path)

    def write(directory):
        (directory / "half").write_text("half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        store.publish("policy", 0, write)
    assert store.current("policy", 0) is None
    assert list((tmp_path / "round=0" / "policy").iterdir()) == []


def test_empty_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="empty"):
        CheckpointStore(tmp_path).publish("policy", 0, lambda directory: None)


def test_second_writer_of_a_round_takes_the_first_ones_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    first = []

    def write_while_another_publishes(directory):
        writer("second")(directory)
        first.append(CheckpointStore(tmp_path).publish("policy", 1, writer("first")))

    assert store.publish("policy", 1, write_while_another_publishes) == first[0]
    folders = [p for p in (tmp_path / "round=1" / "policy").iterdir() if p.is_dir()]
    assert [str(p) for p in folders] == [first[0].path]


def test_writer_that_died_before_naming_its_folder_does_not_count(tmp_path):
    orphan = tmp_path / "round=1" / "policy" / "0123"
    orphan.mkdir(parents=True)
    (orphan / "model.safetensors").write_text("orphan")
    store = CheckpointStore(tmp_path)

    assert store.current("policy", 1) is None
    made = store.publish("policy", 1, writer("whole"))
    assert made.path != str(orphan)


def test_record_of_a_lost_folder_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path)
    store.publish("policy", 1, writer("weights"))
    record = tmp_path / "round=1" / "policy" / "CURRENT.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"path": "gone"}))
    with pytest.raises(CheckpointError, match="is gone"):
        store.current("policy", 1)
    record.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.current("policy", 1)


@pytest.mark.parametrize(("kind", "round"), [("policy", -1), ("critic", 0)])
def test_impossible_kind_or_round_is_refused(tmp_path, kind, round):
    with pytest.raises(ValueError, match="checkpoint"):
        CheckpointStore(tmp_path).publish(kind, round, writer("x"))


def test_checkpoint_names_the_prompt_template_it_was_trained_with(tmp_path: Path) -> None:
    assert read_prompt_template(tmp_path) is None
    write_prompt_template(tmp_path, "short")
    assert read_prompt_template(tmp_path) == "short"
    (tmp_path / "rstar.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"rstar\.json cannot be read"):
        read_prompt_template(tmp_path)


def test_folder_of_a_round_means_the_checkpoint_published_there(tmp_path: Path) -> None:
    checkpoint = CheckpointStore(tmp_path).publish("policy", 4, writer("weights"))
    assert checkpoint_directory(tmp_path / "round=4" / "policy") == Path(checkpoint.path)
    assert checkpoint_directory(checkpoint.path) == Path(checkpoint.path)
    assert checkpoint_directory(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_checkpoint_held_back_leaves_the_earlier_one_current_until_it_is_released(tmp_path):
    store = CheckpointStore(tmp_path)
    first = store.publish("policy", 1, writer("first"))
    held = store.hold("policy", 2, first.path, "worse", writer("second"), {"loss": 9.0})

    assert held == store.current("policy", 2)
    assert (held.round, held.path, held.digest) == (2, first.path, first.digest)
    assert checkpoint_directory(tmp_path / "round=2" / "policy").resolve() == Path(first.path)
    assert store.held("policy", 2) == "worse"
    assert store.held("policy", 1) is None

    released = store.release("policy", 2)
    assert (Path(released.path) / "model.safetensors").read_text() == "second"
    assert store.held("policy", 2) is None
    assert store.info("policy", 2) == {"loss": 9.0}
    assert directory_digest(Path(released.path)) == released.digest


def test_checkpoint_held_back_without_weights_cannot_be_released(tmp_path):
    store = CheckpointStore(tmp_path)
    first = store.publish("ppm", 1, writer("first"))
    store.hold("ppm", 2, first.path, "not finite", None)
    with pytest.raises(CheckpointError, match="held back with its weights"):
        store.release("ppm", 2)
    with pytest.raises(CheckpointError, match="held back with its weights"):
        store.release("ppm", 1)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["os", "safetensors"],
)
def test_full_disk_is_one_error_that_names_the_path_and_spares_the_earlier_one(tmp_path, error):
    store = CheckpointStore(tmp_path)
    earlier = store.publish("policy", 1, lambda folder: (folder / "w").write_text("1") and None)

    def write(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(CheckpointError, match=r"round 2: cannot write .*round=2/policy.*GiB free"):
        store.publish("policy", 2, write)
    assert not list((tmp_path / "round=2" / "policy").iterdir())
    assert store.latest("policy") == earlier
    assert directory_digest(Path(earlier.path)) == earlier.digest
