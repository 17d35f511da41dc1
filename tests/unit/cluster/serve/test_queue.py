from __future__ import annotations

import pytest

from cluster.serve.queue import FairQueue, QueueFullError, Ticket


def order(queue: FairQueue, count: int, tokens: float = 100) -> list[str]:
    """Users of the next searches, each of which ends before the next begins."""
    served = []
    for _ in range(count):
        ticket = queue.next()
        assert ticket is not None
        served.append(ticket.user[-1])
        queue.charge(ticket.user, tokens)
        queue.leave(ticket)
    return served


def test_searches_run_up_to_their_number_in_order_of_arrival() -> None:
    queue = FairQueue(max_running=2, max_waiting=3)
    tickets = queue.add(("a",), 3)
    assert [queue.next(), queue.next(), queue.next()] == [tickets[0], tickets[1], None]
    queue.leave(tickets[1])
    assert queue.next() is tickets[2]
    assert (queue.running, queue.waiting) == (2, 0)


def test_more_than_may_wait_are_refused_all_or_none() -> None:
    queue = FairQueue(max_running=1, max_waiting=2)
    queue.add(("a",), 2)
    with pytest.raises(QueueFullError, match="2 searches wait, 0 run"):
        queue.add(("b",), 2)
    assert queue.waiting == 2
    queue.add(("b",), 1)


def test_a_key_leaves_as_many_places_as_it_takes() -> None:
    queue = FairQueue(max_running=1, max_waiting=60)
    queue.add(("a", "x"))
    queue.next()

    def taken(key: str) -> int:
        for number in range(100):
            try:
                queue.add((key, f"user {number}"))
            except QueueFullError:
                return number
        raise AssertionError("never full")

    assert (taken("a"), taken("b"), taken("c"), taken("d")) == (30, 15, 8, 4)
    with pytest.raises(QueueFullError, match="30 searches of this key wait, of 57 in all, 1 run"):
        queue.add(("a", "y"))
    queue.add(("e",), 3)  # and still a new one finds room
    with pytest.raises(QueueFullError, match="60 searches wait, 1 run"):
        queue.add(("f",))


def test_a_user_with_few_requests_does_not_wait_for_one_with_many() -> None:
    queue = FairQueue(max_running=1, max_waiting=100)
    queue.add(("many",), 50)
    first = queue.next()
    assert first is not None
    queue.add(("few",), 2)
    queue.charge(first.user, 100)
    queue.leave(first)
    assert order(queue, 4) == ["few", "many", "few", "many"]


def test_fewest_running_come_before_fewest_tokens() -> None:
    queue = FairQueue(max_running=3, max_waiting=9)
    queue.add(("a",), 3)
    queue.add(("b",), 3)
    queue.charge(("b",), 1_000)
    running = [ticket for _ in range(3) if (ticket := queue.next())]
    assert [ticket.user for ticket in running] == [("a",), ("b",), ("a",)]


def test_tokens_served_make_up_for_dear_searches() -> None:
    queue = FairQueue(max_running=1, max_waiting=20)
    queue.add(("cheap",), 6)
    queue.add(("dear",), 3)
    served = []
    for _ in range(6):
        ticket = queue.next()
        assert ticket is not None
        served.append(ticket.user[0])
        queue.charge(ticket.user, 300 if ticket.user == ("dear",) else 100)
        queue.leave(ticket)
    assert served == ["cheap", "dear", "cheap", "cheap", "cheap", "dear"]


def test_a_key_that_names_many_users_gets_no_more_than_one_that_names_one() -> None:
    queue = FairQueue(max_running=1, max_waiting=50)
    for number in range(10):
        queue.add(("crowd", f"c{number}"))
    queue.add(("alone", "me"), 10)
    served = order(queue, 10)
    assert served.count("me") == 5
    assert len(set(served)) == 6


def test_who_was_away_has_no_credit_and_who_leaves_and_returns_gains_nothing() -> None:
    queue = FairQueue(max_running=1, max_waiting=50)
    queue.add(("busy",), 9)
    assert order(queue, 4) == ["busy"] * 4
    queue.add(("new",), 5)
    assert order(queue, 4) in (["busy", "new"] * 2, ["new", "busy"] * 2)
    queue.add(("greedy",), 1)
    queue.charge(("greedy",), 10_000)
    (ticket,) = list(queue._waiting[("greedy",)])
    queue.leave(ticket)
    queue.add(("greedy",), 1)
    assert "greedy" not in order(queue, 4)


def test_a_search_that_is_not_wanted_any_more_leaves_its_place() -> None:
    queue = FairQueue(max_running=1, max_waiting=1)
    first, second = queue.add(("a",), 2)
    assert queue.next() is first
    queue.leave(second)
    queue.leave(second)
    assert (queue.running, queue.waiting) == (1, 0)
    queue.leave(first)
    assert queue.next() is None and (queue.running, queue.waiting) == (0, 0)


def test_nothing_is_kept_of_users_who_are_gone() -> None:
    queue = FairQueue(max_running=4, max_waiting=1000)
    tickets: list[Ticket] = []
    for number in range(200):
        tickets += queue.add((f"key{number % 7}", f"user{number}"))
    while ticket := queue.next():
        queue.charge(ticket.user, 10 * ticket.number)
        queue.leave(ticket)
    assert queue._accounts == {} and queue._waiting == {}
