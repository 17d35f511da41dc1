from __future__ import annotations

import pytest

from cluster.fleet.membership import Losses, Membership, SupervisionConfig
from cluster.machines.scaler import MemberState

CONFIG = SupervisionConfig(max_failures=2, window_s=100, backoff_s=2, max_backoff_s=10)


def pool(size: int = 2, version: str = "v1") -> Membership:
    return Membership("policy replica", size, CONFIG, version)


def bring_up(members: Membership, *names: str, now_s: float = 0.0, version: str = "v1") -> None:
    for name in names:
        members.add(name, now_s)
        members.started(name)
        assert members.synced(name, version, now_s)


def test_member_is_given_work_only_when_it_serves_the_wanted_version() -> None:
    members = pool()
    members.add("a", 0)
    assert (members.state("a"), members.ready()) == (MemberState.STARTING, [])
    assert not members.synced("a", "v1", 1)
    members.started("a")
    assert (members.state("a"), members.ready()) == (MemberState.SYNCING, [])
    assert not members.synced("a", "v0", 2)
    assert members.synced("a", "v1", 3)
    assert members.ready() == ["a"]


def test_new_version_takes_everybody_out_until_synced() -> None:
    members = pool()
    bring_up(members, "a", "b")
    members.want("v2")
    assert members.ready() == []
    members.synced("b", "v2", 6)
    assert members.ready() == ["b"]
    members.want("v2")
    assert members.ready() == ["b"]


def test_member_that_started_with_an_old_version_has_to_sync() -> None:
    members = pool()
    members.add("a", 0)
    members.want("v2")
    members.started("a")
    assert not members.synced("a", "v1", 2)
    assert members.synced("a", "v2", 3)


def test_missing_members_are_due_the_first_at_once_the_next_after_pauses() -> None:
    members = pool()
    assert members.due(0) == 2
    bring_up(members, "a", "b")
    assert members.due(0) == 0
    assert members.lost("a", "killed", 10)
    assert members.due(10) == 1
    members.add("c", 10)
    members.lost("c", "out of memory", 11)
    assert (members.due(11), members.due(12.9), members.due(13)) == (0, 0, 1)
    members.add("d", 13)
    members.lost("d", "out of memory", 13)
    assert (members.due(16.9), members.due(17)) == (0, 1)


def test_members_that_die_together_are_all_replaced_at_once() -> None:
    members = pool(size=4)
    bring_up(members, *"abcd")
    for place, name in enumerate("abcd"):
        members.lost(name, "its node died", 50 + place)
    assert members.due(53) == 4
    # Only replacements that die as well make the next ones wait.
    members.add("e", 53)
    members.lost("e", "no memory", 54)
    assert (members.due(55), members.due(56)) == (0, 4)


def test_pauses_are_bounded_and_forgotten() -> None:
    members = pool(size=1)
    for number in range(6):
        members.add(f"m{number}", number)
        members.lost(f"m{number}", "killed", number)
    assert (members.due(14.9), members.due(15)) == (0, 1)
    members.add("late", 200)
    members.lost("late", "killed", 200)
    assert members.due(200) == 1


def test_too_many_deaths_within_the_window_are_hopeless_and_name_the_last_cause() -> None:
    members = pool(size=2)
    for number in range(5):
        assert members.hopeless(number) == ""
        members.add(f"m{number}", number)
        members.lost(f"m{number}", f"cause {number}", number)
    assert members.hopeless(5) == (
        "5 deaths of a policy replica within 100 s, 4 are allowed (cluster.supervision); "
        "the last one: m4: cause 4"
    )
    assert members.hopeless(101) == ""
    assert members.due(5) == 0
    members.forgive()
    assert (members.hopeless(5), members.due(5)) == ("", 2)


def test_drained_member_is_replaced_but_its_end_is_no_failure() -> None:
    members = pool()
    bring_up(members, "a", "b")
    members.drain("a")
    assert (members.ready(), members.due(1)) == (["b"], 1)
    assert not members.lost("a", "ended", 2)
    assert members.losses(2) == Losses()
    assert not members.lost("never heard of", "?", 3)


def test_smaller_pool_asks_for_nobody() -> None:
    members = pool()
    bring_up(members, "a", "b")
    members.resize(1)
    assert members.due(0) == 0
    members.drain("b")
    members.lost("b", "ended", 2)
    assert members.due(2) == 0


def test_time_lost_is_counted_from_each_death_to_the_next_ready_member() -> None:
    members = pool()
    bring_up(members, "a", "b")
    members.lost("a", "killed", 10)
    members.lost("b", "killed", 12)
    members.add("c", 12)
    # Dying while starting leaves the same places empty.
    members.lost("c", "killed", 13)
    assert members.losses(20).away_s == (20 - 10) + (20 - 12)
    bring_up(members, "d", now_s=20)
    bring_up(members, "e", now_s=25)
    assert members.losses(99) == Losses(
        deaths=3, restarts=2, away_s=10 + 13, last_reason="c: killed"
    )


def test_first_start_is_no_loss() -> None:
    members = pool()
    members.add("a", 0)
    members.started("a")
    members.synced("a", "v1", 60)
    assert members.losses(100) == Losses()


def test_losses_since_an_earlier_look() -> None:
    before = Losses(deaths=1, restarts=1, away_s=3.0, last_reason="a: killed")
    after = Losses(deaths=2, restarts=2, away_s=5.5, last_reason="b: killed")
    assert after.since(before) == Losses(deaths=1, restarts=1, away_s=2.5, last_reason="b: killed")
    assert before.since(before) == Losses()


def test_name_is_given_once() -> None:
    members = pool()
    members.add("a", 0)
    with pytest.raises(ValueError, match="policy replica a is a member already"):
        members.add("a", 1)


@pytest.mark.parametrize(
    ("size", "share", "needed"),
    [(1, 0.5, 1), (1, 1.0, 1), (2, 0.5, 1), (3, 0.5, 2), (16, 0.5, 8), (30, 0.1, 3), (0, 0.5, 0)],
)
def test_a_share_of_the_size_is_enough(size: int, share: float, needed: int) -> None:
    members = Membership("policy replica", size, CONFIG, "v1", min_ready=share)
    assert (members.needed, members.spare) == (needed, size - needed)
    for number in range(needed):
        assert not members.enough
        bring_up(members, f"m{number}")
    assert members.enough


def test_member_whose_weights_are_in_doubt_is_given_no_work() -> None:
    members = pool()
    bring_up(members, "a", "b")
    members.doubt("a")
    assert (members.ready(), members.due(1)) == (["b"], 0)
    members.synced("a", "v1", 2)
    assert members.ready() == ["a", "b"]
    members.drain("b")
    members.doubt("b")
    assert members.state("b") is MemberState.DRAINING
