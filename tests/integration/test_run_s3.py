"""A run's folder on S3: records, lease, datasets, checkpoints, states of a fit, logs."""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.folder import lease, staging
from cluster.folder.config_file import load_config
from cluster.folder.lineage import record_start
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.folder.staging import Stager, staged_request
from cluster.runs.config import RunConfig
from cluster.runs.evolve import Evolution
from cluster.telemetry import lines, logs
from cluster.telemetry.lines import Lines
from cluster.telemetry.live import LiveFile, Snapshot, read_live
from cluster.telemetry.progress import ProgressView
from cluster.telemetry.samples import Samples, SampleWriter
from cluster.watch.log_view import show_logs
from cluster.watch.status import read_status
from learner.checkpoint import (
    CheckpointError,
    CheckpointStore,
    checkpoint_directory,
    read_prompt_template,
    recorded_digest,
    write_prompt_template,
)
from learner.dataset import MANIFEST, SFTExample, read_manifest, read_sft, writing_dataset
from learner.fit import FitRequest, PolicyTrainConfig
from learner.resume import FitState, ResumeFolder, fingerprint
from learner.signals import MetricsLog
from rollout.prompt import Segment
from rollout.run_store import RunStore, StoreError, address_of
from tests.builders import make_problem
from tests.unit.cluster.folder.test_run_folder import config

S3_SERVERS = ("moto", "localbucket")


@pytest.fixture
def folder(root: str) -> RunFolder:
    return RunFolder(root)


@pytest.fixture
def stager(root: str, monkeypatch: pytest.MonkeyPatch) -> Stager:
    monkeypatch.setattr(staging, "_of_process", None)
    return Stager(None)


def write_model(folder: Path, weights: bytes = b"w" * 5000) -> None:
    (folder / "sub").mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "sub" / "tokenizer.json").write_text("{}")
    write_prompt_template(folder, "short")


def test_records_and_tables_are_read_back(folder: RunFolder) -> None:
    assert folder.read("report.json") is None and folder.read_lines("x.jsonl") == []
    folder.keep_config(config())
    folder.keep_config(config())
    with pytest.raises(ValueError, match="other values of seed"):
        folder.keep_config(config(seed=1))
    folder.record_stage(1, "rollout", 1.5, lost=0)
    assert folder.stages() == {(1, "rollout"): {"seconds": 1.5, "lost": 0}}
    folder.write_problems([make_problem("a"), make_problem("b")])
    assert set(folder.problem_levels()) == {"a", "b"}
    folder.write_lines("suspects/round=1.jsonl", [{"problem_id": "a"}, {"problem_id": "b"}])
    assert [row["problem_id"] for row in folder.read_lines("suspects/round=1.jsonl")] == ["a", "b"]
    status = read_status(folder.store.root, now_unix_s=time.time())
    assert status.name == "t" and status.problems["all"] == 2


def test_second_driver_on_the_bucket_is_told_who_holds_the_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    with (
        folder.locked(),
        pytest.raises(RunFolderError, match="in use by process"),
        RunFolder(folder.store.root).locked(),
    ):
        pass
    elsewhere = json.loads(folder.store.read("drivers/00001.json"))
    elsewhere |= {"machine": "another", "released": False}
    folder.write("drivers/00001.json", elsewhere)
    with folder.locked():  # nobody has renewed it
        assert folder.store.files("drivers")[-1] == "drivers/00002.json"


def test_of_many_drivers_at_once_one_gets_the_bucket(root: str) -> None:
    got: list[lease.RunLease] = []
    barrier = threading.Barrier(6)

    def take() -> None:
        mine = lease.RunLease(RunStore(root))
        barrier.wait()
        try:
            mine.take()
        except lease.LeaseHeldError:
            return
        got.append(mine)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_checkpoint_is_published_held_released_and_staged_by_its_digest(
    folder: RunFolder, stager: Stager
) -> None:
    store = CheckpointStore(folder.checkpoints)
    assert store.current("policy", 1) is None and store.latest("policy") is None
    first = store.publish("policy", 1, write_model, {"loss": 1.0})
    assert first.path.startswith(f"{folder.store.root}/checkpoints/round=1/policy/")
    again = store.publish("policy", 1, lambda folder: write_model(folder, b"other"))
    assert again == first == store.current("policy", 1) == store.latest("policy")
    assert len(folder.store.folders("checkpoints/round=1/policy")) == 1
    place = folder.place("checkpoints/round=1/policy")
    assert address_of(checkpoint_directory(place)) == first.path
    assert recorded_digest(Path(first.path)) == first.digest
    assert read_prompt_template(Path(first.path)) == "short"

    staged = stager(first.path)
    assert Path(staged.path).name == f"{first.digest}.copy"
    assert (Path(staged.path) / "sub" / "tokenizer.json").read_text() == "{}"
    held = store.hold(
        *("policy", 2, first.path, "worse"),
        lambda folder: write_model(folder, b"second"),
        previous_here=Path(staged.path),
    )
    assert (held.path, held.digest) == (first.path, first.digest)
    assert store.held("policy", 2) == "worse"
    released = store.release("policy", 2)
    assert released.path != first.path and store.latest("policy") == released
    assert Path(stager(released.path).path, "model.safetensors").read_bytes() == b"second"


def test_checkpoint_whose_bytes_changed_on_the_bucket_is_not_used(
    folder: RunFolder, stager: Stager
) -> None:
    made = CheckpointStore(folder.checkpoints).publish("ppm", 1, write_model)
    RunStore(made.path).put("model.safetensors", b"x" * 5000)
    with pytest.raises(CheckpointError, match=r"s3://.* not what its record says"):
        stager(made.path)
    with pytest.raises(CheckpointError, match=r"s3://.*nowhere cannot be had: .*missing"):
        stager(f"{folder.store.root}/nowhere")


def test_dataset_is_uploaded_whole_and_staged(folder: RunFolder, stager: Stager) -> None:
    def write(text: str) -> None:
        filling = folder.filling("datasets/round=1", last=MANIFEST)
        with filling as directory, writing_dataset(directory) as writer:
            segment = Segment(text=text, trained=True)
            example = {"problem_id": "p", "level": "math", "origin": "tree", "round": 1}
            writer.add("sft_train", SFTExample(**example, mean_q=1.0, segments=(segment,)))
            writer.commit(template="rstar", counts={}, excluded={})

    assert folder.dataset_manifest(1) is None
    for text in ("first", "second"):
        write(text)
        manifest = folder.dataset_manifest(1)
        assert manifest is not None and manifest == read_manifest(folder.dataset(1))
        here = stager(str(folder.dataset(1))).path
        assert [e.segments[0].text for e in read_sft(here, "train")] == [text]
    assert folder.rounds("datasets") == [1]
    folder.store.put("datasets/round=1/sft_train.parquet", b"x")
    with pytest.raises(CheckpointError, match="not what its record says"):
        Stager(Path(here).parent.parent / "other")(str(folder.dataset(1)))


def test_filling_that_fails_leaves_no_dataset(folder: RunFolder) -> None:
    with pytest.raises(KeyError), folder.filling("datasets/round=1", last=MANIFEST) as directory:
        (directory / MANIFEST).write_text("{}")
        raise KeyError
    assert folder.store.folders("datasets") == []


def test_single_file_is_staged_under_its_name(folder: RunFolder, stager: Stager) -> None:
    folder.store.put("problems/train.jsonl", b"{}")
    place = folder.place("problems/train.jsonl")
    assert staging.at_hand(place).name == "train.jsonl"
    assert staging.at_hand(place).read_bytes() == b"{}"
    folder.store.put("problems/train.jsonl", b"[]")
    assert staging.at_hand(place).read_bytes() == b"[]"


def test_state_of_a_fit_is_found_by_another_machine(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = CheckpointStore(folder.checkpoints).home("policy", 1)

    def machine(name: str) -> ResumeFolder:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
        return ResumeFolder(home, "f" * 64, world_size=1)

    one = machine("one")
    assert one.read() is None
    for step in (3, 6):
        (one.path / f"step={step}").mkdir(parents=True)
        (one.path / f"step={step}" / "rank_0.pt").write_bytes(str(step).encode())
        one.keep(f"step={step}")
        one.commit(FitState(step=step, losses=[1.0], grad_norms=[], seconds=1.0))
    assert [path.name for path in one.path.iterdir()] == ["step=6"]

    other = machine("other")
    state = other.read()
    assert state is not None and state.step == 6
    other.fetch(state.tag)
    assert (other.path / "step=6" / "rank_0.pt").read_bytes() == b"6"
    other.clear()
    other.leave()
    assert one.read() is None and not other.path.exists()


def test_log_of_a_fit_goes_on_from_the_bucket(folder: RunFolder, tmp_path: Path) -> None:
    home = CheckpointStore(folder.checkpoints).home("policy", 1)
    for number, resumed_from in ((1, 0), (2, 1)):
        log = MetricsLog(home, tmp_path / str(number), resumed_from=resumed_from)
        log.step(number, {"loss": 1.0})
        log.close()
    steps = [json.loads(line)["step"] for line in folder.training_log("policy", 1).splitlines()]
    assert steps == [1, 2]


def test_what_grows_is_written_by_parts_and_read_whole(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "PAUSE_S", 0.01)
    monkeypatch.setattr(lines, "PART_BYTES", 100)
    monkeypatch.setattr(lines, "PARTS_KEPT", 3)
    file = Lines(folder.store, "logs/worker-0.jsonl")
    for number in range(6):
        file.add(f"{number} {'x' * 120}\n")
        while len(folder.store.files("logs")) < min(number + 1, 3):
            time.sleep(0.01)
        time.sleep(0.1)
    file.close()
    kept = [folder.store.read(path)[:1] for path in folder.store.files("logs")]
    assert kept == [b"3", b"4", b"5"]


def test_logs_samples_and_the_account_are_read_from_the_bucket(folder: RunFolder) -> None:
    folder.keep_config(config())
    logs.begin(folder.store, "worker-0")
    logging.getLogger("cluster.x").warning("A lease expired job=j1")
    logs.end()
    output = io.StringIO()
    show_logs(Path(folder.store.root), Console(file=output, width=100), job="j1")
    assert "A lease expired job=j1" in output.getvalue()
    writer = SampleWriter(folder.store)
    writer.write(100.0, {("rstar_open_trees", ()): 3.0})
    writer.write(110.0, {("rstar_open_trees", ()): 4.0})
    writer.close()
    assert Samples.read(folder.store).times == [100.0, 110.0]
    with LiveFile(folder.store, Snapshot):
        live = read_live(pickle.loads(pickle.dumps(folder.store)))
        assert live is not None and live.state == "running"
    status = read_status(Path(folder.store.root), now_unix_s=time.time())
    assert status.explanation.startswith("stopped") or status.state == "stopped"


def test_options_reach_every_process_that_is_handed_the_store(
    root: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    folder = RunFolder(root, storage={"endpoint_url": server})
    folder.write("a.json", {"a": 1})
    handed = pickle.dumps(folder.store)
    monkeypatch.setattr(fsspec.config, "conf", {})
    assert pickle.loads(handed).read("a.json")
    assert RunFolder(root).read("a.json") == {"a": 1}


def test_bucket_that_is_not_there_and_keys_that_are_wrong_are_one_clear_error(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunFolderError, match="no such bucket"):
        RunFolder("s3://no-such-bucket/run").write("x.json", {})

    def denied(*args: object, **more: object) -> None:
        raise PermissionError("The provided token has expired.")

    folder = RunFolder(root)
    monkeypatch.setattr(folder.store._fs, "pipe_file", denied)
    with pytest.raises(StoreError, match=r"credentials are missing, wrong or expired.*start again"):
        folder.store.put("x", b"")


def test_what_a_run_starts_from_is_made_once_and_found_by_another_machine(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = Path(__file__).parents[2] / "deploy" / "configs" / "smoke.yaml"
    settings = load_config(smoke, [f"run_dir={root}"], kind=RunConfig)

    def prepared(machine: str) -> Evolution:
        monkeypatch.setenv("RSTAR_STAGE", str(tmp_path / machine))
        monkeypatch.setattr(staging, "_of_process", None)
        evolution = Evolution(settings, ProgressView(Console(quiet=True)))
        evolution._prepare()
        return evolution

    one = prepared("one")
    base = one.folder.store.below("base")
    before = {name: base.stamp(name) for name in base.below_all("")}
    assert address_of(one.base_model) == f"{root}/base" and len(one.train) == 36
    record_start(one.folder, [p for p in one.inputs if p is not None])
    [start] = (one.folder.read("versions.json") or {})["starts"]
    assert {entry["path"] for entry in start["inputs"]} >= {f"{root}/problems/train.parquet"}

    other = prepared("other")
    assert [p.id for p in other.train] == [p.id for p in one.train]
    assert {name: base.stamp(name) for name in base.below_all("")} == before
    request = FitRequest(
        fit_id="round=0/policy",
        kind="policy",
        round=0,
        base=str(other.base_model),
        data=str(other.folder.dataset(0)),
        checkpoints=str(other.folder.checkpoints),
        config=PolicyTrainConfig(),
    )
    filling = other.folder.filling("datasets/round=0", last=MANIFEST)
    with filling as directory, writing_dataset(directory) as writer:
        writer.commit(template="short", counts={"all": {}}, excluded={})
    staged = staged_request(request, Stager(tmp_path / "rank"))
    assert read_manifest(staged.data) is not None
    assert (Path(staged.base) / "config.json").is_file()
    again = staged_request(request, Stager(tmp_path / "another rank"))
    assert again.base != staged.base
    assert fingerprint(again, "d") == fingerprint(staged, "d") == fingerprint(request, "d")
