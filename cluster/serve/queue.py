"""Who is served next: one bounded queue, fair between users. Plain data; time is nobody's business.

    add (QueueFullError beyond the bound) --> waiting --next--> running --leave--> gone
                                                  +-------------leave---------------^

A user is a path, as ("key of a team", "one of its people"). Next is the search whose key has the
fewest running, then whose key was served the fewest tokens; of one key, whose user; at last the one
that waits longest. So a user with a thousand requests delays another one's first by at most the
rest of a search, and a key that names many users gets no more than one that names none.

Of the places in the queue a key may take as many as it leaves free (dynamic thresholds, Choudhury
and Hahne 1998): half of them alone, a third beside another one that asks for all. So there is room
for whoever comes next, however much somebody asks for.

Whoever was away gets no credit for it: tokens served begin at the least of those that are here
(start-time fair queueing, Goyal et al. 1996).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

User = tuple[str, ...]


class QueueFullError(RuntimeError):
    """More searches wait than may."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One search that waits or runs."""

    user: User
    number: int
    """In the order of arrival."""
    running: bool = False
    gone: bool = False


@dataclass(slots=True)
class _Account:
    """What a key, or a user of a key, has here."""

    waiting: int = 0
    running: int = 0
    served: float = 0.0

    @property
    def here(self) -> bool:
        return self.waiting + self.running > 0


@dataclass(slots=True)
class FairQueue:
    """See the module."""

    max_running: int
    max_waiting: int
    _waiting: dict[User, deque[Ticket]] = field(default_factory=dict)
    _accounts: dict[User, _Account] = field(default_factory=dict)
    """Also of every beginning of a user's path."""
    _arrived: int = 0
    running: int = 0
    waiting: int = 0

    def add(self, user: User, count: int = 1) -> list[Ticket]:
        """Let so many searches of a user wait: all of them or none.

        Raises:
            QueueFullError: there is no room for all, or none for so many of one key.
        """
        free = self.max_running + self.max_waiting - self.running - self.waiting
        if count > free:
            raise QueueFullError(f"{self.waiting} searches wait, {self.running} run")
        own = self._accounts.get(user[:1], _Account()).waiting
        if own + count > free:
            raise QueueFullError(
                f"{own} searches of this key wait, of {self.waiting} in all, {self.running} run"
            )
        for path in _beginnings(user):
            account = self._accounts.setdefault(path, _Account())
            if not account.here:
                account.served = max(account.served, self._least_served(path))
            account.waiting += count
        tickets = []
        for _ in range(count):
            self._arrived += 1
            tickets.append(Ticket(user, self._arrived))
        self._waiting.setdefault(user, deque()).extend(tickets)
        self.waiting += count
        return tickets

    def next(self) -> Ticket | None:
        """Whose turn it is, who runs from now on; None: nobody waits, or enough run."""
        if self.running >= self.max_running or not self._waiting:
            return None
        user = min(self._waiting, key=self._turn)
        ticket = self._waiting[user].popleft()
        if not self._waiting[user]:
            del self._waiting[user]
        ticket.running = True
        self.waiting -= 1
        self.running += 1
        for path in _beginnings(user):
            self._accounts[path].waiting -= 1
            self._accounts[path].running += 1
        return ticket

    def charge(self, user: User, tokens: float) -> None:
        """Remember what a user who is here was served."""
        for path in _beginnings(user):
            self._accounts[path].served += tokens

    def leave(self, ticket: Ticket) -> None:
        """A search ended, or is not wanted any more; harmless a second time."""
        if ticket.gone:
            return
        ticket.gone = True
        if ticket.running:
            self.running -= 1
        else:
            self.waiting -= 1
            waiting = self._waiting[ticket.user]
            waiting.remove(ticket)
            if not waiting:
                del self._waiting[ticket.user]
        for path in _beginnings(ticket.user):
            account = self._accounts[path]
            if ticket.running:
                account.running -= 1
            else:
                account.waiting -= 1
        for path in _beginnings(ticket.user):
            if not self._accounts[path].here:
                self._forget(path)

    def _turn(self, user: User) -> tuple[float, ...]:
        """Less comes first."""
        found: list[float] = []
        for path in _beginnings(user):
            account = self._accounts[path]
            found += [account.running, account.served]
        return (*found, self._waiting[user][0].number)

    def _siblings(self, path: User) -> list[User]:
        return [p for p in self._accounts if len(p) == len(path) and p[:-1] == path[:-1]]

    def _least_served(self, path: User) -> float:
        here = (self._accounts[p] for p in self._siblings(path))
        return min((account.served for account in here if account.here), default=0.0)

    def _forget(self, path: User) -> None:
        """Drop accounts of who is away and would gain nothing by coming back."""
        siblings = self._siblings(path)
        least = min((a.served for p in siblings if (a := self._accounts[p]).here), default=None)
        for other in siblings:
            account = self._accounts[other]
            if not account.here and (least is None or account.served <= least):
                del self._accounts[other]


def _beginnings(user: User) -> Iterator[User]:
    for end in range(1, len(user) + 1):
        yield user[:end]
