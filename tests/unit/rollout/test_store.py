"""Trees in the store: commits that happen once, sealed rounds."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rollout import store as store_module
from rollout.commits import Manifest, Totals
from rollout.run_store import RunStore, StoreError
from rollout.store import TrajectoryStore, stored_rounds
from rollout.tree import Tree
from tests.builders import answered, code, make_problem, make_tree
from tests.clock import set_clock


def trees(*ids: str, solved: bool = True) -> list[Tree]:
    return [
        make_tree(code("x = 1", answered("7", correct=solved)), problem=make_problem(id_), round=2)
        for id_ in ids
    ]


# -- commits


def test_a_commit_whose_answer_was_lost_is_still_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path, backoff_s=0)
    create = RunStore._create
    lost = [True]

    def answer_is_lost(self: RunStore, path: str, data: bytes) -> bool:
        created = create(self, path, data)
        if lost:
            lost.pop()
            raise TimeoutError("no answer")
        return created

    monkeypatch.setattr(RunStore, "_create", answer_is_lost)
    round_ = TrajectoryStore(store, 2)
    assert round_.commit("s1", trees("a"))
    assert len(store.files("trajectories/round=2/data")) == 1


def test_a_commit_that_is_tried_again_finds_its_own_marker(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker was created, and nothing more was heard of the store for a while."""
    read = RunStore.read
    cut_off = [True]

    def away(self: RunStore, path: str) -> bytes:
        if cut_off and path.endswith("s1.json"):
            raise StoreError("the store is away")
        return read(self, path)

    create = RunStore.create
    monkeypatch.setattr(RunStore, "create", lambda *given: create(*given) and not cut_off)
    monkeypatch.setattr(RunStore, "read", away)
    round_ = TrajectoryStore(store, 2)
    with pytest.raises(StoreError, match="away"):
        round_.commit("s1", trees("a"), attempt="mine")
    cut_off.clear()
    assert round_.commit("s1", trees("a"), attempt="mine")
    assert not round_.commit("s1", trees("a"), attempt="other")
    assert not round_.commit("s1", trees("a"))
    assert len(store.files("trajectories/round=2/data")) == 1
    assert store.exists(round_.read_commit("s1").path)


def test_the_data_of_a_try_that_was_overtaken_goes(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = TrajectoryStore(store, 2)
    create = RunStore.create

    def fails(*given: object) -> bool:
        raise StoreError("the store is away")

    monkeypatch.setattr(RunStore, "create", fails)
    with pytest.raises(StoreError, match="away"):
        round_.commit("s1", trees("a"), attempt="late")
    monkeypatch.setattr(RunStore, "create", create)
    assert round_.commit("s1", trees("a", solved=False), attempt="first")
    assert not round_.commit("s1", trees("a"), attempt="late")
    assert store.files("trajectories/round=2/data") == [round_.read_commit("s1").path]


@pytest.mark.parametrize(
    "path",
    [
        "run.id",
        "../other/trajectories/round=2/data/s1-x.parquet",
        "trajectories/round=1/data/s1-x.parquet",
        "trajectories/round=2/data/../../../secret.parquet",
        "/trajectories/round=2/data/s1-x.parquet",
    ],
)
def test_a_marker_that_names_a_file_elsewhere_is_refused(store: RunStore, path: str) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    marker = "trajectories/round=2/commits/s1.json"
    store.put(marker, replace(round_.read_commit("s1"), path=path).to_json())
    for read in (round_.commits, round_.seal, lambda: round_.read_commit("s1")):
        with pytest.raises(StoreError, match=r"s1\.json .* no data file of round 2"):
            read()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    manifest = round_.seal()
    wrong = replace(manifest, files=(replace(manifest.files[0], path="../x.parquet"),))
    store.put("trajectories/round=2/manifest.json", wrong.to_json())
    with pytest.raises(StoreError, match=r"manifest\.json .* no data file of round 2"):
        list(round_.trees())


def test_markers_can_be_read_without_the_names_of_their_trees(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a", "b"), failed={"c": "error"}, remaining=[["d"]])
    whole, light = round_.commits()["s1"], round_.commits(trees=False)["s1"]
    assert len(whole.trees) == 2 and light.trees == ()
    assert replace(whole, trees=()) == light


def test_a_committed_shard_reads_back_exactly(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    written = trees("a", "b")
    assert round_.commit("s1", written, info={"stage": "base"})
    commit = round_.commits()["s1"]
    assert commit == round_.read_commit("s1")
    assert commit.info == {"stage": "base"}
    assert [(t.problem_id, t.index, t.solved) for t in commit.trees] == [
        ("a", 0, True),
        ("b", 0, True),
    ]
    assert commit.totals == Totals.of(written)
    assert commit.totals.solved_by_level == {"gsm": 2}
    round_.seal()
    assert list(round_.trees()) == written


def test_the_second_committer_loses_and_removes_its_data(store: RunStore) -> None:
    first, second = TrajectoryStore(store, 2), TrajectoryStore(store, 2)
    assert first.commit("s1", trees("a"))
    assert not second.commit("s1", trees("a", solved=False))
    assert len(store.files("trajectories/round=2/data")) == 1
    assert first.read_commit("s1").trees[0].solved


def test_of_two_racing_committers_one_wins(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zombie's case: both have written their data before either claims the shard."""
    zombie, worker = TrajectoryStore(store, 2), TrajectoryStore(store, 2)
    exists = RunStore.exists
    put = RunStore.put_new

    def put_then_zombie(self: RunStore, path: str, data: bytes) -> None:
        put(self, path, data)
        monkeypatch.setattr(RunStore, "put_new", put)
        assert zombie.commit("s1", trees("a", solved=False))

    monkeypatch.setattr(RunStore, "put_new", put_then_zombie)
    assert not worker.commit("s1", trees("a"))
    assert exists(store, worker.read_commit("s1").path)
    assert len(store.files("trajectories/round=2/data")) == 1


def test_what_a_late_zombie_derived_is_never_read(store: RunStore) -> None:
    worker, zombie = TrajectoryStore(store, 2), TrajectoryStore(store, 2)
    create = store.create

    def late(path: str, data: bytes) -> bool:
        """The zombie has written all of its files before the worker claims the shard."""
        if not path.endswith(".json"):
            return create(path, data)
        store.create = create  # type: ignore[method-assign]
        assert worker.commit("s1", trees("a"), derived={"made": b"worker"})
        assert len(store.files("trajectories/round=2/derived/made")) == 2
        return create(path, data)

    store.create = late  # type: ignore[method-assign]
    assert not zombie.commit("s1", trees("a"), derived={"made": b"zombie"})
    (file,) = worker.seal().files
    assert worker.read_derived(file, "made") == b"worker"
    assert worker.read_derived(file, "other") is None
    assert len(store.files("trajectories/round=2/derived/made")) == 1


def test_what_a_killed_worker_derived_is_removed_and_the_committed_stays(tmp_path: Path) -> None:
    round_ = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 2)
    round_.commit("s1", trees("a"), derived={"made": b"mine"})
    (mine,) = round_.store.files("trajectories/round=2/derived/made")
    left = f"{mine[:-1]}{'0' if mine[-1] != '0' else '1'}"
    round_.store.put(left, b"left")
    round_.seal()
    assert round_.remove_orphans(older_than_s=-1e10, now_unix_s=0.0) == [left]
    assert round_.store.read(mine) == b"mine"


def test_a_part_names_what_it_hands_back_and_what_failed(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"), failed={"b": "ValueError: \udc80"}, remaining=[["c", "d"]])
    commit = round_.read_commit("s1")
    assert commit.remaining == (("c", "d"),)
    assert commit.failed == {"b": "ValueError: \udc80"}
    assert round_.solved() == {"a"}


def test_a_shard_without_trees_can_be_committed(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    assert round_.commit("s1", [], failed={"a": "gone"})
    assert round_.seal().failed == {"a": "gone"}
    assert list(round_.trees()) == []


# -- sealing


def test_the_first_seal_stands(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    assert round_.manifest() is None
    round_.commit("s1", trees("a"))
    sealed = round_.seal(["s1"])
    round_.commit("s2", trees("b"))
    assert round_.seal(["s1", "s2"]) == sealed == round_.manifest()
    assert [t.problem.id for t in round_.trees()] == ["a"]
    assert Manifest.from_json(sealed.to_json()) == sealed
    assert sealed.totals.trees == 1


def test_sealing_uncommitted_shards_is_refused(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.store.LISTING_S", 0.0)
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    with pytest.raises(StoreError, match="1 of 2 shards are not committed, the first is s2"):
        round_.seal(["s1", "s2"])


def old_listings(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Listings without the files of this name, as of a client that holds on to old ones."""
    files = RunStore.files
    monkeypatch.setattr(
        RunStore,
        "files",
        lambda self, prefix: [path for path in files(self, prefix) if missing not in path],
    )


def test_shards_that_a_listing_lacks_are_sealed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = TrajectoryStore(store, 2)
    for name in ("s1", "s2", "s3"):
        round_.commit(name, trees(f"problem-{name}"))
    old_listings(monkeypatch, "s2")
    assert [file.shard for file in round_.seal(["s1", "s2", "s3"]).files] == ["s1", "s2", "s3"]
    # From here on what is read goes by the manifest.
    assert sorted(round_.commits()) == ["s1", "s2", "s3"]
    assert round_.solved() == {"problem-s1", "problem-s2", "problem-s3"}
    assert round_.remove_orphans(older_than_s=-1e9, now_unix_s=2e9) == []
    assert len(list(round_.trees())) == 3


def test_shards_that_a_listing_lacks_are_read_by_name(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = TrajectoryStore(store, 2)
    for name in ("s1", "s2", "s3"):
        round_.commit(name, trees(f"problem-{name}"))
    old_listings(monkeypatch, "s2")
    assert sorted(round_.commits()) == ["s1", "s3"]
    assert sorted(round_.named_commits(["s1", "s2"])) == ["s1", "s2"]
    monkeypatch.setattr("rollout.store.LISTING_S", 0.0)
    with pytest.raises(StoreError, match=r"1 commit markers of round 2 .*missing.*commits/s4.json"):
        round_.named_commits(["s1", "s2", "s4"])


def test_a_shard_that_appears_late_is_waited_for(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    old_listings(monkeypatch, "s2")
    pauses: list[float] = []

    def appears(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            round_.commit("s2", trees("b"))

    set_clock(monkeypatch, store_module, sleep=appears)
    assert round_.seal(["s1", "s2"]).totals.trees == 2
    assert len(pauses) == 3


def test_regraded_shards_that_a_listing_lacks_are_sealed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = TrajectoryStore(store, 2)
    for name in ("s1", "s2"):
        round_.commit(name, trees(name))
    manifest = round_.seal()
    generation = round_.begin_regrade("answers-2")
    for file in manifest.files:
        commit = round_.read_commit(file.shard)
        assert round_.commit_regrade(generation, commit, round_.read_table(file))
    old_listings(monkeypatch, "commits/s2")
    assert len(round_.seal_regrade(generation).files) == 2


def test_a_marker_that_went_after_the_seal_is_named(tmp_path: Path) -> None:
    round_ = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 2)
    round_.commit("s1", trees("a"))
    round_.seal()
    (tmp_path / "trajectories/round=2/commits/s1.json").unlink()
    with pytest.raises(StoreError, match=r"marker of round 2 .* is missing: .*s1\.json"):
        round_.commits()


def test_gathered_markers_are_read_in_place_of_their_own(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.store.GATHERED", 3)
    worker, reader = TrajectoryStore(store, 2), TrajectoryStore(store, 2)
    shards = [f"s{n}" for n in range(8)]
    for name in shards:
        worker.commit(name, trees(name), failed={f"{name}-b": "gone"})
    plain = reader.commits()
    for name in shards[:4]:
        assert reader.gathered_commit(name) == replace(plain[name], trees=())
    assert len(store.files("trajectories/round=2/gathered")) == 1
    # Another process gathers what this one has not, and some once more.
    later = TrajectoryStore(store, 2)
    assert {c.shard for c in later.each_commit(trees=False, gather=True)} == set(shards)
    for name in shards[1:4]:
        later.gathered_commit(name)
    gathered = store.files("trajectories/round=2/gathered")
    assert len(gathered) == 3
    read: list[str] = []
    read_many = RunStore.read_many

    def noted(self: RunStore, paths: Sequence[str]) -> dict[str, bytes]:
        read.extend(paths)
        return read_many(self, paths)

    monkeypatch.setattr(RunStore, "read_many", noted)
    fresh = TrajectoryStore(store, 2)
    assert fresh.commits() == plain and len(plain) == 8
    assert read == gathered
    assert {file.shard for file in fresh.seal(shards[:5]).files} == set(shards[:5])
    assert sorted(fresh.commits(trees=False)) == shards[:5]


def test_a_broken_gathered_file_is_named(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.store.GATHERED", 1)
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    round_.gathered_commit("s1")
    (path,) = store.files("trajectories/round=2/gathered")
    store.put(path, b"no gzip")
    with pytest.raises(StoreError, match=rf"{path} cannot be read"):
        round_.commits()


def test_sealing_the_same_tree_twice_is_refused(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a", "b"))
    round_.commit("s2", trees("b"))
    with pytest.raises(StoreError, match="tree 0 of problem b is in shards s1 and s2"):
        round_.seal()


def test_an_unsealed_round_has_no_readers(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    with pytest.raises(StoreError, match=r"round 2 .* has no manifest"):
        list(round_.trees())


def test_columns_are_read_without_the_others(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    round_.seal()
    tables = list(round_.tables(["problem_id", "value_sum"]))
    assert tables[0].column_names == ["problem_id", "value_sum"]


def test_rounds_are_found(store: RunStore) -> None:
    assert stored_rounds(store) == []
    for number in (10, 2):
        TrajectoryStore(store, number).commit("s1", trees("a"))
    assert stored_rounds(store) == [2, 10]


def test_the_first_plan_stands(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    assert round_.create_plan("base", b"one") == b"one"
    assert round_.create_plan("base", b"two") == b"one"
    assert round_.plans() == {"base": b"one"}


# -- what killed workers left


def orphan(round_: TrajectoryStore) -> str:
    """A data file whose writer died before it made the marker."""
    path = "trajectories/round=2/data/s1-dead.parquet"
    round_.store.put(path, b"half a shard")
    return path


def test_data_files_without_a_marker_are_removed_from_a_sealed_round(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    left = orphan(round_)
    round_.seal()
    later_s = store.modified_unix_s(left) + 61.0
    assert round_.remove_orphans(older_than_s=60.0, now_unix_s=later_s) == [left]
    assert not store.exists(left)
    assert [tree.problem.id for tree in round_.trees()] == ["a"]


def test_data_files_without_a_marker_stay_while_a_zombie_may_still_write(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", trees("a"))
    left = orphan(round_)
    written_s = store.modified_unix_s(left)
    assert round_.remove_orphans(older_than_s=60.0, now_unix_s=written_s + 900.0) == []  # no seal
    round_.seal()
    assert round_.remove_orphans(older_than_s=60.0, now_unix_s=written_s + 59.0) == []
    assert store.exists(left)


def test_half_written_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    round_ = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 2)
    round_.commit("s1", trees("a"))
    round_.seal()
    hidden = f".x.{uuid.uuid4().hex}"
    half = [tmp_path / f"trajectories/round=2/{folder}/{hidden}" for folder in ("data", "commits")]
    for path in half:
        path.write_bytes(b"")
    now_s = half[0].stat().st_mtime + 100.0
    assert len(round_.remove_orphans(older_than_s=60.0, now_unix_s=now_s)) == 2
    assert not any(path.exists() for path in half)


def test_files_of_quarantined_and_handed_back_shards_are_no_orphans(store: RunStore) -> None:
    round_ = TrajectoryStore(store, 2)
    round_.commit("s1", [], failed={"a": "boom"})
    round_.commit("s2", trees("b"), remaining=[["c"]])
    round_.commit("s3", trees("c"))
    round_.seal()
    assert round_.remove_orphans(older_than_s=-1e9, now_unix_s=0.0) == []


# -- damage


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[TrajectoryStore, Path]:
    round_ = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 2)
    round_.commit("s1", trees("a"))
    round_.seal()
    return round_, tmp_path / round_.read_commit("s1").path


def test_a_truncated_data_file_is_named(sealed: tuple[TrajectoryStore, Path]) -> None:
    round_, file = sealed
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(StoreError, match=rf"{file.name} .* bytes, .* were written"):
        list(round_.trees())


def test_a_changed_data_file_is_named(sealed: tuple[TrajectoryStore, Path]) -> None:
    round_, file = sealed
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{file.name} .* has changed"):
        list(round_.trees())


def test_a_missing_data_file_is_named(sealed: tuple[TrajectoryStore, Path]) -> None:
    round_, file = sealed
    file.unlink()
    with pytest.raises(StoreError, match=rf"{file.name} .* is missing"):
        list(round_.trees())


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"shard": "s1"}', b"\xff"])
def test_a_broken_marker_is_named(tmp_path: Path, content: bytes) -> None:
    round_ = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 2)
    round_.commit("s1", trees("a"))
    (tmp_path / "trajectories/round=2/commits/s1.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"commits/s1\.json cannot be read"):
        round_.commits()


def test_new_file_on_a_bucket_is_created_and_put_only_over_another(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    real = RunStore.put

    def noted(self: RunStore, path: str, data: bytes) -> None:
        put.append(path)
        real(self, path, data)

    monkeypatch.setattr(RunStore, "put", noted)
    for data in (b"1", b"1", b"2"):  # the second as after an answer that was lost
        store.put_new("a/x", data)
        assert store.read("a/x") == data
    assert len(put) == (3 if store.local is not None else 1)
