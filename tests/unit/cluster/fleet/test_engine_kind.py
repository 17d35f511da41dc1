"""What a keeper knows of engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.engines.config import EngineConfig
from cluster.engines.lifecycle import ReplicaStats
from cluster.fleet.actors import PolicyKind
from cluster.fleet.config import ActorConfig


class Handle:
    """A replica that has one long request in hand."""

    def __init__(self) -> None:
        self.said = ReplicaStats(name="p", version="v", healthy=True, running_requests=1)
        self.stats = SimpleNamespace(remote=self._stats)

    async def _stats(self) -> ReplicaStats:
        return self.said


async def test_an_engine_that_makes_steps_is_no_stalled_one_however_long_a_request() -> None:
    kind, handle = PolicyKind(ActorConfig(), EngineConfig()), Handle()
    before = await kind.look("policy-0", handle)
    assert await kind.look("policy-0", handle) == before  # hung: nothing moves
    handle.said.steps += 1
    after = await kind.look("policy-0", handle)
    assert after.done > before.done and after.open == before.open == 1


def test_replicas_are_given_what_stages_their_weights(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    for folder in (None, tmp_path):
        kind = PolicyKind(ActorConfig(), EngineConfig(), stage_weights=folder)
        actor = SimpleNamespace(remote=lambda *_, **options: made.append(options))
        kind.actor = SimpleNamespace(options=lambda actor=actor, **_: actor)
        kind.start("policy-0")
    assert "stage" not in made[0]
    assert made[1]["stage"].folder == tmp_path
