"""What a run on a bucket costs in requests and time, on moto's S3 server, which is no cloud.

    python -m bench.store [--json FILE] [--shards N] [--trees-per-shard N] [--upload-mib N]

The server is a process of its own on this machine: what is measured is the client, the layout and
moto, which answers one request at a time, some hundred a second. A cloud answers many at once, with
10 to 100 ms each, so `requests` carry over to it and seconds do not.

* commit: 20 shards of `--trees-per-shard` small trees, committed as a worker does it, one thread;
  `requests_per_tree` counts every HTTP request the client sent.
* markers: the rest of `--shards` (10,000 shards of 75 trees are 747k problems) as markers alone,
  written straight away, not measured.
* `list_s`: names of all markers. `gather_s`: all of them read one by one and gathered into files of
  128, which a coordinator does as they come. `status_s`: `rstar status` of the round, which is not
  sealed. `seal_s`: reads all of them and writes the manifest. `status_sealed_s`: status again; with
  `requests` of each.
* `upload_mib_s`: a folder of four random files uploaded as a checkpoint is. Beside it `disk_mib_s`,
  the same files written and synced here, and `loopback_mib_s`, a plain socket.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RunConfig
from cluster.watch.status import read_status
from rollout.commits import Commit, TreeKey
from rollout.problem import Level, Problem
from rollout.run_store import RunStore
from rollout.store import TrajectoryStore
from rollout.tree import Node, Tree

COMMITS = 20
GOALS = {"requests_per_tree": "<= 0.5", "status_s": "<= 5"}
BUCKET = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--trees-per-shard", type=int, default=75)
    parser.add_argument("--upload-mib", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = _serve()
        try:
            figures = measure(
                f"s3://{BUCKET}/run",
                Path(scratch),
                shards=options.shards,
                trees=options.trees_per_shard,
                upload_mib=options.upload_mib,
            )
        finally:
            server.terminate()
            server.wait()
    for name, value in figures.items():
        print(f"{name:28} {value:12,.3f} {GOALS.get(name, '')}")
    text = json.dumps(figures)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)


def measure(
    root: str, scratch: Path, *, shards: int, trees: int, upload_mib: int
) -> dict[str, float]:
    """All figures of the module's docstring."""
    count = Requests()
    folder = RunFolder(root)
    store = folder.store
    store.self_check()
    config = {
        "name": "bench",
        "run_dir": root,
        "problems": {"miniature": {}},
        "rounds": [{"preference": False}],
    }
    folder.keep_config(RunConfig.model_validate(config))
    problems = [_problem(number) for number in range(shards * trees)]
    folder.write_problems(problems)
    round_ = TrajectoryStore(store, 1)
    figures: dict[str, float] = {"trees": len(problems), "shards": shards}

    own = min(COMMITS, shards)
    made = [[_tree(p) for p in problems[n * trees : (n + 1) * trees]] for n in range(own)]
    with count:
        for number, some in enumerate(made):
            assert round_.commit(_shard(number), some)
    figures["requests_per_tree"] = count.number / (own * trees)

    first = round_.read_commit(_shard(0))

    def mark(number: int) -> None:
        held = problems[number * trees : (number + 1) * trees]
        keys = [TreeKey(problem_id=p.id, index=0, solved=True) for p in held]
        commit = replace(first, shard=_shard(number), trees=tuple(keys))
        assert store.create(f"{round_.prefix}/commits/{_shard(number)}.json", commit.to_json())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(mark, range(own, shards)))

    def timed(name: str, work: Callable[[], Any]) -> None:
        began_s = time.monotonic()
        with count:
            work()
        figures[f"{name}_s"] = time.monotonic() - began_s
        figures[f"{name}_requests"] = count.number

    timed("list", lambda: store.files(f"{round_.prefix}/commits"))
    timed("gather", lambda: list(round_.each_commit(trees=False, gather=True)))
    timed("status", lambda: read_status(root, now_unix_s=time.time()))
    timed("seal", round_.seal)
    commits: dict[str, Commit] = round_.commits()
    folder.record_stage(
        1, "rollout", 1.0, searched_by_level={"all": len(commits)}, solved_by_level={"all": 0}
    )
    timed("status_sealed", lambda: read_status(root, now_unix_s=time.time()))
    return figures | upload_figures(store, scratch, upload_mib)


def upload_figures(store: RunStore, scratch: Path, mib: int) -> dict[str, float]:
    """MiB/s of an upload, of the disk and of the loopback."""
    source = scratch / "model"
    source.mkdir()
    began_s = time.monotonic()
    for number in range(4):
        with (source / f"{number}.safetensors").open("wb") as file:
            for _ in range(mib // 4):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
    disk_s = time.monotonic() - began_s
    began_s = time.monotonic()
    store.upload(source, "checkpoints/round=1/policy/0")
    upload_s = time.monotonic() - began_s
    return {
        "upload_mib_s": mib / upload_s,
        "disk_mib_s": mib / disk_s,
        "loopback_mib_s": mib / _loopback_s(mib),
    }


def _loopback_s(mib: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = socket.create_connection(listening.getsockname())
        receiver, _ = listening.accept()

        def send() -> None:
            block = bytes(1 << 20)
            for _ in range(mib):
                sender.sendall(block)
            sender.close()

        began_s = time.monotonic()
        thread = threading.Thread(target=send)
        thread.start()
        while receiver.recv(1 << 20):
            pass
        thread.join()
        receiver.close()
        return time.monotonic() - began_s


class Requests:
    """How many HTTP requests the client sends while it is entered."""

    def __init__(self) -> None:
        self.number = 0
        self._lock = threading.Lock()
        self._client: Any = importlib.import_module("aiobotocore.endpoint").AioEndpoint
        self._send = self._client._send

    def __enter__(self) -> None:
        self.number = 0
        send = self._send

        async def counted(own: Any, request: Any) -> Any:
            with self._lock:
                self.number += 1
            return await send(own, request)

        self._client._send = counted

    def __exit__(self, *error: object) -> None:
        self._client._send = self._send


def _serve() -> subprocess.Popen[bytes]:
    """moto's server, and the environment that leads to its bucket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3

    give_up_s = time.monotonic() + 60
    while True:
        try:
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            return server
        except Exception:
            if time.monotonic() > give_up_s or server.poll() is not None:
                server.terminate()
                raise
            time.sleep(0.2)


def _shard(number: int) -> str:
    return f"r1-base-{number:06d}"


def _problem(number: int) -> Problem:
    return Problem(id=f"p{number:07d}", text="1 + 1?", answer="2", level=Level.MATH, source="bench")


def _tree(problem: Problem) -> Tree:
    root = Node(id=0, parent=-1, depth=0, step=None, visit_count=1)
    return Tree(problem=problem, round=1, nodes=[root])


if __name__ == "__main__":
    main()
