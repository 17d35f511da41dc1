"""Errors of other processes in words."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.jobs.ray_errors import cause, describe, plain
from rollout.engine import EngineError


def from_an_actor(error: Exception) -> Exception:
    """As Ray raises it where the actor's answer is awaited."""
    return RayTaskError("evaluate", "Traceback ...", error).as_instanceof_cause()


def test_an_error_of_an_actor_is_told_without_its_traceback() -> None:
    inner = EngineError("out of memory")
    assert plain(from_an_actor(inner)) is inner
    assert describe(from_an_actor(inner)) == describe(inner) == "EngineError: out of memory"
    assert cause(from_an_actor(inner)) == "EngineError: out of memory"


IN_CREATION = """ray::worker.__init__() (pid=7)
  File "worker.py", line 7, in __init__
    found = open()
rollout.store.StoreError: the store
is not there"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EngineError("not ready after 3 s"), "not ready after 3 s"),
        (EngineError("Traceback ...\n  here\nit broke\n"), "it broke"),
        (EngineError(), "EngineError"),
        (
            ActorDiedError(RayTaskError("__init__", IN_CREATION, EngineError())),
            "rollout.store.StoreError: the store is not there",
        ),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
    ],
)
def test_cause_is_the_last_line_of_an_error_of_ones_own_and_ray_s_reason_of_a_death(
    error: Exception, words: str
) -> None:
    assert cause(error) == words
