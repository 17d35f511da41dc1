from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import learner_group
from cluster.fleet.config import ActorConfig
from cluster.fleet.learner_group import (
    LearnerGroup,
    LearnerLostError,
    Mailbox,
    Outcome,
    _find_store,
)
from learner.fit import FitProgress, FitRequest, LearnerError, PolicyTrainConfig
from rollout.store import RunStore


def request(name: str = "round=1/policy") -> FitRequest:
    return FitRequest(
        fit_id=name,
        kind="policy",
        round=1,
        base="base",
        data="data",
        checkpoints="checkpoints",
        config=PolicyTrainConfig(),
    )


def at_step(step: int) -> FitProgress:
    return FitProgress(fit_id="f", step=step, num_steps=9, loss=1.0, tokens_per_s=1.0)


def test_rank_on_a_machine_without_the_runs_store_trains_nothing(tmp_path: Path):
    run_id = RunStore(tmp_path / "run").identify()
    _find_store(RunStore(tmp_path / "run", run_id=run_id))
    with pytest.raises(LearnerError, match=r"elsewhere is not there on machine .*mount"):
        _find_store(RunStore(tmp_path / "elsewhere", run_id=run_id))
    assert not (tmp_path / "elsewhere").exists()


async def test_rank_waits_until_a_request_comes():
    mailbox = Mailbox(max_attempts=3)
    waiting = asyncio.create_task(mailbox.take("a", done=0, timeout_s=5.0))
    await asyncio.sleep(0)
    assert not waiting.done()

    number = await mailbox.put(request())
    ticket = await waiting
    assert (ticket.number, ticket.attempt, ticket.request) == (number, 1, request())


async def test_every_rank_of_a_group_gets_the_request_once():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    tickets = [await mailbox.take("a", done=0, timeout_s=1.0) for _ in range(2)]
    assert [t.attempt for t in tickets] == [1, 1]
    assert await mailbox.take("a", done=number, timeout_s=0.01) is None


async def test_answered_request_is_not_given_to_a_group_started_anew():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    await mailbox.take("a", done=0, timeout_s=1.0)
    await mailbox.finish(number, Outcome(error="loss is nan"))
    assert await mailbox.take("b", done=0, timeout_s=0.01) is None
    assert (await mailbox.watch(number, None, 1.0))[1] == Outcome(error="loss is nan")


async def test_group_started_anew_finds_the_open_request_again():
    mailbox = Mailbox(max_attempts=2)
    await mailbox.put(request())
    await mailbox.take("a", done=0, timeout_s=1.0)
    again = await mailbox.take("b", done=0, timeout_s=1.0)
    assert again.attempt == 2


async def test_who_waits_is_told_why_each_earlier_incarnation_ended():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    for incarnation in "abc":
        await mailbox.take(incarnation, done=0, timeout_s=1.0)
    await mailbox.note_failure("b", "rank 1: connection reset by peer")
    _, _, ended = await mailbox.watch(number, None, 0.01)
    assert ended == ["a worker process died", "rank 1: connection reset by peer"]


async def test_request_that_cost_too_many_groups_fails_with_the_last_cause():
    mailbox = Mailbox(max_attempts=2)
    number = await mailbox.put(request())
    for incarnation in ("a", "b"):
        await mailbox.take(incarnation, done=0, timeout_s=1.0)
        await mailbox.note_failure(incarnation, f"rank 1: {incarnation} broke")
        await mailbox.note_failure(incarnation, "rank 0: connection reset by peer")

    # Neither rank of the third group gets it.
    assert await mailbox.take("c", done=0, timeout_s=0.01) is None
    assert await mailbox.take("c", done=0, timeout_s=0.01) is None
    _, outcome, _ = await mailbox.watch(number, None, 1.0)
    assert outcome.error.startswith(
        "fit 'round=1/policy' failed 2 times, at last: rank 1: b broke. What is finished is kept"
    )


async def test_watch_returns_progress_as_soon_as_it_is_news():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    await mailbox.report(number, at_step(1))
    assert await mailbox.watch(number, None, 5.0) == (at_step(1), None, [])

    waiting = asyncio.create_task(mailbox.watch(number, at_step(1), 5.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await mailbox.report(number, at_step(2))
    assert await waiting == (at_step(2), None, [])
    assert await mailbox.watch(number, at_step(2), 0.01) == (at_step(2), None, [])


async def test_late_report_or_answer_to_an_earlier_request_is_ignored():
    mailbox = Mailbox(max_attempts=3)
    first = await mailbox.put(request("first"))
    await mailbox.finish(first, Outcome(error="bad"))
    second = await mailbox.put(request("second"))
    await mailbox.report(first, at_step(7))
    await mailbox.finish(first, Outcome(error="worse"))
    assert await mailbox.watch(second, None, 0.01) == (None, None, [])


async def test_second_request_while_one_is_open_is_refused():
    mailbox = Mailbox(max_attempts=3)
    await mailbox.put(request("first"))
    with pytest.raises(ValueError, match="'first' is still running"):
        await mailbox.put(request("second"))


async def test_stop_ends_the_wait_of_every_rank():
    mailbox = Mailbox(max_attempts=3)
    waiting = [asyncio.create_task(mailbox.take("a", 0, 5.0)) for _ in range(2)]
    await asyncio.sleep(0)
    await mailbox.stop()
    assert await asyncio.gather(*waiting) == ["stop", "stop"]


# -- the group around it


class Call:
    """A method of an actor: `.remote` calls it here and now."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class FakeActor:
    """An actor that is an object here."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        for name, answer in answers.items():
            setattr(self, name, Call(answer))


class Scene:
    """A group without Ray: what its mailbox knows, and whether its ranks have a place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.joined = 0
        self.pending = True
        self.coming = False
        self.ends: list[threading.Event] = []
        """One for each life: set, its Ray Train run is over."""
        self.killed: list[Any] = []
        self.notes: list[str] = []
        scene = self

        class Actor:
            @staticmethod
            def options(**placed: Any) -> Call:
                return Call(lambda attempts: scene.mailbox())

        monkeypatch.setattr(learner_group, "MailboxActor", Actor)
        monkeypatch.setattr(learner_group.ray, "get", lambda answer: answer)
        monkeypatch.setattr(learner_group.ray, "kill", self.kill)
        monkeypatch.setattr(learner_group.nodes, "near_driver", lambda soft: {})
        monkeypatch.setattr(
            learner_group.nodes, "groups_made_by", lambda controller: {"group": self.pending}
        )
        monkeypatch.setattr(learner_group.nodes, "remove_group", self.killed.append)
        monkeypatch.setattr(learner_group, "LOOK_S", 0.01)
        monkeypatch.setattr(learner_group, "PLACEMENT_S", 0.0)
        monkeypatch.setattr(LearnerGroup, "_run", self.run)

    def mailbox(self) -> FakeActor:
        return FakeActor(
            joined=lambda: self.joined,
            controller=lambda: "controller",
            stop=lambda: None,
        )

    def run(self, life: Any) -> None:
        self.ends.append(threading.Event())
        self.ends[-1].wait(10.0)
        life.ended = "it was shut down"

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def group(self, **settings: Any) -> LearnerGroup:
        return LearnerGroup(
            ActorConfig(replicas=2),
            "unused",
            why_pending=lambda: "the engines hold the GPU.",
            coming=lambda: self.coming,
            note=self.notes.append,
            **settings,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + 10.0
        while not condition():
            assert time.monotonic() < give_up_s
            time.sleep(0.01)


def test_group_without_a_place_says_so_before_anybody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)
    group = scene.group(start_timeout_s=0.3)
    group.start()
    scene.until(lambda: bool(scene.notes))
    assert scene.notes == ["the learner waits for a place: the engines hold the GPU."]
    # The time-out is that of a fit, not of the rollout before it.
    time.sleep(0.4)
    began_s = time.monotonic()
    with pytest.raises(LearnerLostError, match=r"find a place within 0 s.*hold the GPU"):
        group.fit(request())
    assert time.monotonic() - began_s >= 0.3
    assert len(scene.notes) == 1
    # What was asked of Ray is taken back.
    assert scene.killed[:2] == ["controller", "group"]


def test_group_in_its_place_that_does_not_come_to_life_has_another_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)
    scene.pending = False
    with pytest.raises(LearnerLostError, match="it has its place, so the machine may be too slow"):
        scene.group(start_timeout_s=0.1).fit(request())
    assert scene.notes == []


def test_node_on_its_way_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.coming = True
    began_s = time.monotonic()
    with pytest.raises(LearnerLostError, match="did not find a place"):
        scene.group(start_timeout_s=0.2).fit(request())
    assert time.monotonic() - began_s >= 0.2 * learner_group.MAX_WAITS


def test_late_end_of_a_group_does_not_end_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.pending = False
    group = scene.group()
    group.start()
    scene.until(lambda: len(scene.ends) == 1)
    group.shutdown(0.01)
    group.start()
    scene.until(lambda: len(scene.ends) == 2)
    life = group._life
    assert life is not None
    scene.ends[0].set()  # only now the first one is over
    time.sleep(0.05)
    life.check()
    scene.ends[1].set()
    scene.until(lambda: life.ended is not None)
    with pytest.raises(LearnerLostError, match="learner group ended: it was shut down"):
        life.check()


def test_fit_after_a_group_was_lost_starts_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.pending = False
    group = scene.group()
    group.start()
    scene.until(lambda: len(scene.ends) == 1)
    scene.ends[0].set()
    first = group._life
    scene.until(lambda: first is not None and first.ended is not None)
    group.start()
    assert group._life is not first
    scene.until(lambda: len(scene.ends) == 2)
    with pytest.raises(LearnerError, match="machine may be too slow"):
        group._start_timeout_s = 0.1
        group.fit(request())
