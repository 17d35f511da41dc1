"""The shipped policy of sandbox machines in force: moto judges each request by it.

moto looks at actions and resources and does not know `s3:if-none-match`: conditions are left out.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from rollout.open_trees import OpenTreeStore
from rollout.run_store import RunStore, StoreError
from rollout.store import TrajectoryStore
from rollout.stored_problems import StoredProblems
from rollout.table import trees_to_table
from tests.builders import make_problem, make_tree

POLICY = Path(__file__).parents[2] / "deploy" / "policies" / "aws_sandbox.json"


def enforce(server: str, after: str) -> None:
    text = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{server}/moto-api/reset-auth", after.encode(), text)
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture
def sandbox_root(server: str, root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run on a bucket, of which this process now holds the sandbox machines' key only."""
    bucket = root.removeprefix("s3://").partition("/")[0]
    run = RunStore(f"s3://{bucket}/runs/one")
    run.identify()
    run.put("config.yaml", b"seed: 0")
    run.put("checkpoints/round=1/policy/CURRENT.json", b"{}")
    StoredProblems.write(run, [make_problem("p0")])
    policy = json.loads(POLICY.read_text(encoding="utf-8").replace("EDIT-bucket", bucket))
    for statement in policy["Statement"]:
        statement.pop("Condition", None)
    iam = boto3.client("iam", endpoint_url=server)
    iam.create_user(UserName=bucket)
    iam.put_user_policy(UserName=bucket, PolicyName="p", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=bucket)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    S3FileSystem.clear_instance_cache()
    enforce(server, "0")
    yield run.root
    enforce(server, "inf")
    S3FileSystem.clear_instance_cache()


def test_key_of_the_sandboxes_does_all_that_a_worker_does(sandbox_root: str) -> None:
    store = RunStore(sandbox_root)
    assert store.read("run.id")
    trajectories = TrajectoryStore(store, 1)
    tree = make_tree()
    assert trajectories.commit("s1", [tree], attempt="a")
    assert trajectories.commit("s1", [tree], attempt="a"), "the marker is its own"
    assert not trajectories.commit("s1", [tree], attempt="b"), "another one was first"
    open_trees = OpenTreeStore(store, 1)
    assert open_trees.load("j") == []
    for _ in range(2):
        open_trees.save("j", trees_to_table([tree]))
    assert len(open_trees.load("j")) == 1
    open_trees.remove("j")
    assert open_trees.load("j") == []
    store.put("logs/worker-0.jsonl", b"{}\n")


def test_key_of_the_sandboxes_does_nothing_else(sandbox_root: str) -> None:
    store = RunStore(sandbox_root, backoff_s=0.01)
    trajectories = TrajectoryStore(store, 1)
    assert trajectories.commit("s1", [make_tree()])
    (marker,) = store.files("trajectories/round=1/commits")
    for forbidden in (
        lambda: store.put("config.yaml", b"seed: 1"),
        lambda: store.put("checkpoints/round=1/policy/CURRENT.json", b"{}"),
        lambda: store.create("checkpoints/round=2/policy/CURRENT.json", b"{}"),
        lambda: store.read("checkpoints/round=1/policy/CURRENT.json"),
        lambda: store.create("drivers/00001.json", b"{}"),
        lambda: store.delete(marker),
        lambda: store.delete("run.id"),
        lambda: store.put("problem_blocks/x", b""),
        lambda: RunStore(sandbox_root.rpartition("/runs/")[0], backoff_s=0.01).read("models/x"),
    ):
        with pytest.raises(StoreError, match=r"permission|denied|Forbidden"):
            forbidden()
    assert store.read(marker)
