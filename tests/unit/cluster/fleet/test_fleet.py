from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import fleet as fleet_module
from cluster.fleet import pools as pools_module
from cluster.fleet.fleet import Fleet
from cluster.fleet.keeper import PoolLostError
from cluster.fleet.left_over import LeftActor
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from rollout.engine import EngineError


def test_dashboard_port_in_use_is_named_before_ray_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = RolloutConfig.model_validate(
            {
                "problems": "p.jsonl",
                "policy": "x",
                "run_dir": tmp_path,
                "cluster": {"dashboard_port": port},
            }
        )
        fleet = Fleet(config, RunFolder(tmp_path))
        with pytest.raises(EngineError, match=f"port {port} of cluster.dashboard_port is in use"):
            asyncio.run(fleet.start(tmp_path))


class Starts:
    """A fleet whose pools start, or fail to, as they are told."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        config = RolloutConfig.model_validate(
            {
                "run_dir": root,
                "problems": "p.jsonl",
                "policy": "x",
                "cluster": {"address": address, "stage_weights": None},
            }
        )
        self.fleet = Fleet(config, RunFolder(root))
        self.asked: list[str] = []
        self.notes: list[str] = []
        self.fleet.note = self.notes.append
        self.failures = 0
        monkeypatch.setattr(self.fleet, "_start_ray", lambda namespace: None)
        monkeypatch.setattr(self.fleet.meter, "start", lambda: None)
        monkeypatch.setattr(self.fleet.pools, "keep", self.keep)
        monkeypatch.setattr(self.fleet.pools, "find_left", self.nothing_left)
        monkeypatch.setattr(self.fleet.pools, "judge_left", self.nothing_left)
        monkeypatch.setattr(fleet_module, "Minder", lambda *given, **named: None)

    async def serve(self) -> None:
        pass

    async def nothing_left(self, *kinds: Any) -> None:
        pass

    async def keep(self, name: str, kind: Any, size: int) -> Any:
        self.asked.append(name)
        if name == "policy" and self.failures:
            self.failures -= 1
            raise PoolLostError("0 of 4 policy replicas serve; 4 wait for a place")
        made = SimpleNamespace(hopeless=False, serve=self.serve)
        self.fleet.pools.keepers[name] = made  # type: ignore[assignment]

    async def start(self) -> None:
        await self.fleet.start(Path("x"), version="r0", learner=False)


async def test_pool_that_does_not_start_is_tried_again_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Starts(tmp_path, monkeypatch, "auto")
    at.failures = 1
    await at.start()
    assert at.asked == ["watchman", "coordinator", "sandbox", "policy", "policy"]
    reason = "start, 1 of 3: 0 of 4 policy replicas serve; 4 wait for a place"
    assert at.notes == [f"done again: {reason}"]
    assert at.fleet.attempts.reasons == [reason]


async def test_pool_that_never_starts_ends_the_run_with_the_reason_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Starts(tmp_path, monkeypatch, "auto")
    at.failures = 9
    with pytest.raises(
        PoolLostError,
        match=r"start failed 3 times .*, at last: 0 of 4 .* start the same command again",
    ):
        await at.start()
    assert at.asked.count("policy") == 3


@pytest.mark.parametrize("learner", [True, False])
async def test_engines_that_are_taken_over_serve_on_what_they_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: bool
) -> None:
    at = Starts(tmp_path, monkeypatch, "auto")
    at.fleet.pools.left = {"policy": [LeftActor(name="policy-0-aa", handle=None, mark=None)]}
    served: list[tuple[str, str]] = []

    async def ask(handles: Any, answer_s: float) -> tuple[str, str]:
        return "checkpoints/policy", "policy-r2"

    async def serve() -> None:
        served.append((at.fleet._policy_kind.path, at.fleet._policy_kind.version))

    monkeypatch.setattr(at.fleet._policy_kind, "served", ask)
    at.serve = serve
    await at.fleet.start(Path("x"), version="r0", learner=learner)
    assert at.asked == ["watchman", "policy", "coordinator", "sandbox"]
    # A run that makes its models says later what it needs; one that was given them says so now.
    assert served == ([] if learner else [("x", "r0")])
    assert at.fleet._policy_kind.version == ("policy-r2" if learner else "r0")


@pytest.mark.parametrize("taken", [False, True])
async def test_driver_whose_run_was_taken_leaves_the_actors_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    fleet = Starts(tmp_path, monkeypatch, "auto").fleet
    killed: list[str] = []
    told: list[str] = []
    monkeypatch.setattr(RunFolder, "is_taken", taken)
    monkeypatch.setattr(fleet_module, "end_all", killed.extend)
    monkeypatch.setattr(fleet_module, "remove_groups", lambda namespace: killed.append("groups"))
    monkeypatch.setattr(pools_module, "end_all", killed.extend)
    monkeypatch.setattr(pools_module, "end_left_over", lambda *given: killed.extend(given[2]))
    monkeypatch.setattr(fleet_module.ray, "shutdown", lambda: None)

    def keeper(name: str) -> Any:
        async def stop() -> dict[str, Any]:
            return {name: handle}

        async def shut() -> None:
            told.append(name)

        async def count(hand_over: Any) -> None:
            told.append(f"last counts of {name}")

        def remote(method: Any) -> Any:
            return SimpleNamespace(remote=method)

        said = remote(lambda: told.append("leaving"))
        handle = SimpleNamespace(leaving=said, shutdown=remote(shut), __ray_call__=remote(count))
        kind = SimpleNamespace(kind="x", lost=lambda name: None)
        return SimpleNamespace(stop=stop, handles={name: handle}, kind=kind)

    fleet.pools.keepers |= {name: keeper(name) for name in ("watchman", "policy", "coordinator")}
    fleet.pools.left = {"ppm": [LeftActor(name="ppm-0-aa", handle=None, mark=None)]}
    fleet.pools.home = SimpleNamespace(namespace="rstar-1")  # type: ignore[assignment]
    fleet._ray_started = True
    await fleet.stop()
    ended = {"policy", "ppm-0-aa", "watchman", "coordinator", "groups"}
    assert set(killed) == (set() if taken else ended)
    assert told == ([] if taken else ["leaving", "policy", "last counts of policy"])


async def test_embedded_ray_whose_machine_stays_what_it_is_starts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Starts(tmp_path, monkeypatch, "local")
    at.failures = 1
    with pytest.raises(PoolLostError, match=r"^0 of 4 policy replicas serve"):
        await at.start()
    assert at.asked == ["coordinator", "sandbox", "policy"]
