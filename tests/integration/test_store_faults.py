"""S3 behind a line that drops, delays, refuses and loses answers, or that is gone for a while."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from cluster.jobs.audit import audit_round
from cluster.jobs.queue import Job, StagePlan, plan_jobs
from rollout import run_store
from rollout.store import RunStore, StoreError, TrajectoryStore
from tests.builders import answered, code, make_problem, make_tree

COMMITS = 1000
FAULTS = {"drop": 0.04, "lose answer": 0.04, "503": 0.05, "delay": 0.05}
"""Share of requests each happens to."""


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, or does what the line's troubles do."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = urlsplit(server).netloc
        self.rng = random.Random(0)
        self.done: Counter[str] = Counter()

    def next_fault(self) -> str:
        [fault] = self.rng.choices([*FAULTS, ""], [*FAULTS.values(), 1 - sum(FAULTS.values())])
        self.done[fault] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is what this is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one(self) -> None:
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "503":
            self.answer(503, b"<Error><Code>SlowDown</Code></Error>", {})
            return
        if fault == "delay":
            time.sleep(0.05)
        line = http.client.HTTPConnection(self.server.behind)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        line.request(self.command, self.path, body, headers)
        reply = line.getresponse()
        data = reply.read()
        line.close()
        if fault == "lose answer":
            self.close_connection = True
            return
        self.answer(reply.status, data, dict(reply.getheaders()))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    proxy = Proxy(server)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.slow
def test_a_thousand_commits_over_a_bad_line_lose_and_double_nothing(
    root: str, server: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
    S3FileSystem.clear_instance_cache()
    worker = TrajectoryStore(RunStore(root, backoff_s=0.01), 2)
    plan = StagePlan(
        round=2,
        stage="base",
        tree_index=0,
        problem_ids=tuple(f"p{number}" for number in range(COMMITS)),
        shard_size=1,
        seed=1,
    )
    worker.create_plan(plan.stage, plan.to_json())
    won: list[str] = []  # what threads may append to

    def commit(job: Job, attempt: str) -> None:
        """As a rollout worker: again with the same attempt until it is known."""
        steps = code("x = 1", answered("7", correct=True))
        trees = [make_tree(steps, problem=make_problem(job.problem_ids[0]), round=2)]
        while True:
            with contextlib.suppress(StoreError):
                if worker.commit(job.id, trees, attempt=attempt):
                    won.append(job.id)
                return

    jobs = plan_jobs(plan)
    # Every tenth shard is finished by two workers, one of whom lost its lease.
    work = [(job, f"a{n}") for n, job in enumerate(jobs)]
    work += [(job, f"z{n}") for n, job in enumerate(jobs[::10])]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda one: commit(*one), work))

    assert all(proxy.done[fault] > COMMITS / 50 for fault in FAULTS), proxy.done
    assert sorted(won) == sorted(job.id for job in jobs)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    S3FileSystem.clear_instance_cache()
    audit = audit_round(TrajectoryStore(RunStore(root), 2), reported=COMMITS)
    assert audit.clean and audit.committed == audit.expected == COMMITS


def test_s3_that_cannot_be_reached_for_a_while_is_tried_again(
    server: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint's port answers nothing, then a server comes back there."""
    away = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    away.start()
    host, port = away.get_host_and_port()
    away.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    S3FileSystem.clear_instance_cache()
    options = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(run_store, "NUM_ATTEMPTS", 2)
    impatient = RunStore(root, backoff_s=0.01)
    with pytest.raises(StoreError, match=r"cannot create k of s3.* after 2 tries: .*[Cc]onnect"):
        impatient.create("k", b"")
    back = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
    timer = threading.Timer(0.5, back.start)
    timer.start()
    try:
        monkeypatch.setattr(run_store, "NUM_ATTEMPTS", 12)
        patient = RunStore(root, backoff_s=0.05)
        assert patient.create("k", b"here")
        assert patient.read("k") == b"here"
    finally:
        timer.join()
        back.stop()
