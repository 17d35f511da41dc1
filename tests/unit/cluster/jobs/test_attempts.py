"""A stage that loses machines is done again, and not for ever."""

from __future__ import annotations

import pytest

from cluster.fleet.keeper import PoolLostError
from cluster.fleet.learner_group import LearnerLostError
from cluster.jobs.attempts import Attempts
from learner.fit import LearnerError
from rollout.engine import EngineError


class Stage:
    """Fails as it is told, then returns what is left."""

    def __init__(self, *script: Exception | str) -> None:
        self.script = list(script)
        self.events: list[str] = []

    async def __call__(self) -> str:
        self.events.append("done")
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def attempts(self, limit: int = 3) -> Attempts:
        return Attempts(
            limit,
            mend=lambda: self.events.append("mended"),
            note=lambda text: self.events.append(text),
        )


async def test_lost_machines_cost_another_attempt_and_the_reason_is_told() -> None:
    stage = Stage(PoolLostError("9 deaths of a policy replica"), "sealed")
    attempts = stage.attempts()
    assert await attempts("round 1: rollout", stage) == "sealed"
    reason = "round 1: rollout, 1 of 3: 9 deaths of a policy replica"
    assert stage.events == ["done", f"done again: {reason}", "mended", "done"]
    assert attempts.reasons == [reason]
    # Those of the next stage are its own.
    await attempts("round 1: evaluate", Stage("fine"))
    assert attempts.reasons == []


async def test_after_the_last_attempt_one_error_says_what_to_do() -> None:
    stage = Stage(*(LearnerLostError(f"node {n} is gone") for n in range(3)))
    with pytest.raises(
        LearnerLostError,
        match=r"round 2: train ppm failed 2 times \(cluster.stage_attempts\), at last: node 1 is "
        r"gone.* start the same command again",
    ):
        await stage.attempts(2)("round 2: train ppm", stage)
    assert stage.events.count("done") == 2


@pytest.mark.parametrize(
    "error", [LearnerError("loss is nan"), EngineError("no key"), ValueError()]
)
async def test_what_would_come_again_is_not_tried_again(error: Exception) -> None:
    stage = Stage(error, "never")
    with pytest.raises(type(error)):
        await stage.attempts()("round 1: rollout", stage)
    assert stage.events == ["done"]
