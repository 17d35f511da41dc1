"""The store on S3: fsspec's own client (s3fs) against two servers, found by the environment.

What is shown is that our store, s3fs and S3's conditional writes (`If-None-Match: *`) fit together.
Not shown: real S3, its latency and throttling; GCS (gcsfs) and Azure (adlfs) have not been tried.
"""

from __future__ import annotations

import threading
from typing import Any

import fsspec
import pytest
from s3fs import S3FileSystem

from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import Coordinator
from cluster.jobs.queue import QueueConfig, StagePlan
from rollout.open_trees import OpenTreeStore
from rollout.store import RunStore, StoreError, TrajectoryStore, stored_rounds
from rollout.table import trees_to_table
from rollout.tree import Tree
from tests.builders import answered, code, make_problem, make_tree

S3_SERVERS = ("moto", "localbucket")


class OverwritingS3(S3FileSystem):
    """A client or gateway that does not know conditional writes: the condition is left out."""

    protocol = "overwritings3"

    async def _pipe_file(self, path: str, data: bytes, **other: Any) -> Any:
        return await super()._pipe_file(path, data, **(other | {"mode": "overwrite"}))


fsspec.register_implementation("overwritings3", OverwritingS3, clobber=True)


@pytest.fixture
def store(root: str) -> RunStore:
    return RunStore(root, backoff_s=0)


def trees(*ids: str, solved: bool = True) -> list[Tree]:
    return [
        make_tree(code("x = 1", answered("7", correct=solved)), problem=make_problem(id_), round=2)
        for id_ in ids
    ]


def test_what_is_put_on_s3_is_read_listed_and_deleted(store: RunStore) -> None:
    assert store.files("a") == [] and store.folders("a") == []
    for path in ("a/1", "a/2", "a/b/3"):
        store.put(path, path.encode())
    store.put("a/1", b"new")
    assert store.files("a") == ["a/1", "a/2"] and store.folders("a") == ["b"]
    assert store.read("a/1") == b"new"
    assert store.read_many(["a/2", "a/b/3"]) == {"a/2": b"a/2", "a/b/3": b"a/b/3"}
    assert store.modified_unix_s("a/1") > 1e9
    store.delete("a/1")
    store.delete("a/1")
    assert not store.exists("a/1")
    with pytest.raises(FileNotFoundError):
        store.read("a/1")


def test_s3_is_accepted_and_the_check_leaves_nothing(store: RunStore) -> None:
    store.self_check()
    assert store.folders("") == [] and store.files(".self-check") == []


def test_one_of_many_threads_creates_a_key_of_s3(store: RunStore) -> None:
    barrier, wins = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        if store.create("k", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and store.read("k") == str(wins[0]).encode()


def test_s3_whose_second_create_succeeds_is_refused(root: str) -> None:
    OverwritingS3.clear_instance_cache()  # of another server
    overwriting = root.replace("s3://", "overwritings3://")
    with pytest.raises(StoreError, match="lets a key be created twice"):
        RunStore(overwriting, backoff_s=0).self_check()
    with pytest.raises(StoreError, match="lets a key be created twice"):
        Coordinator(overwriting)


def test_bucket_that_is_not_there_is_one_clear_error(root: str) -> None:
    with pytest.raises(
        StoreError, match=r"no such bucket.* cannot create .* of s3://no-such-bucket/run"
    ):
        RunStore("s3://no-such-bucket/run").self_check()


def test_zombie_between_data_and_marker_on_s3_leaves_one_shard(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie, worker = TrajectoryStore(store, 2), TrajectoryStore(store, 2)
    put = RunStore.put_new

    def put_then_zombie(self: RunStore, path: str, data: bytes) -> None:
        put(self, path, data)
        monkeypatch.setattr(RunStore, "put_new", put)
        assert zombie.commit("s1", trees("a", solved=False))

    monkeypatch.setattr(RunStore, "put_new", put_then_zombie)
    assert not worker.commit("s1", trees("a"))
    assert store.files("trajectories/round=2/data") == [worker.read_commit("s1").path]


def test_round_on_s3_outlives_its_coordinator(root: str, store: RunStore) -> None:
    plan = StagePlan(
        round=2, stage="base", tree_index=0, problem_ids=tuple("abcd"), shard_size=2, seed=1
    )
    first = Coordinator(root, QueueConfig())
    first.plan(plan)
    lease = first.grant("w1")
    assert lease is not None
    round_ = TrajectoryStore(store, 2)
    done, *rest = lease.job.problem_ids
    OpenTreeStore(store, 2).save(lease.job.child(rest).id, trees_to_table(trees(*rest)))
    assert round_.commit(lease.job.id, trees(done), remaining=[rest])
    del first  # before it is told

    second = Coordinator(root, QueueConfig())
    while (lease := second.grant("w2")) is not None:
        kept = [tree.problem.id for tree in OpenTreeStore(store, 2).load(lease.job.id)]
        assert kept in ([], rest)
        assert round_.commit(lease.job.id, trees(*lease.job.problem_ids))
        second.complete(lease.job.id, lease.id)
    OpenTreeStore(store, 2).remove_all()
    manifest = second.seal(2)
    assert manifest.totals.trees == 4 and len(manifest.files) == 3
    audit = audit_round(TrajectoryStore(RunStore(root), 2), reported=4)
    assert audit.clean and audit.committed == 4
    assert stored_rounds(store) == [2]
    left = "trajectories/round=2/data/s1-dead.parquet"
    store.put(left, b"half a shard")
    now_s = store.modified_unix_s(left) + 61.0
    assert round_.remove_orphans(older_than_s=60.0, now_unix_s=now_s) == [left]
