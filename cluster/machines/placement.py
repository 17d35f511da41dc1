"""Why a placement cannot be met, in words: what is asked, what the cluster has.

    (what is asked, the nodes' total and free resources) -> sentences, the cause first; none if all
                                                            of it fits into what is free now

Ray leaves an actor or placement group that fits nowhere "pending" for ever. These sentences tell
apart what will never fit (no node has such a resource, or enough of it), what does not fit beside
the rest of what is asked, and what only waits for others to give back what they hold.

Counting is first-fit, the largest bundle first, over whole nodes. Where it finds no room a cleverer
packing might; that is said by "by first fit".

Not covered: label selectors, node affinity, accelerator types other than as custom resources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ROUNDING = 1e-6
"""Ray counts in ten-thousandths; sums of fractions differ by less than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Like bundles that somebody wants placed."""

    name: str
    """For people: "policy replica"."""
    bundle: Mapping[str, float]
    """Resources of one, as {"GPU": 1, "CPU": 2}; zeros are ignored."""
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """A living node."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    """Not held by anybody now."""


def explain(asks: Sequence[Ask], nodes: Sequence[NodeResources]) -> list[str]:
    """Sentences that say why not all of `asks` can be placed now; empty if they can."""
    asks = [ask for ask in asks if ask.count > 0 and _needs(ask)]
    if not _place(asks, [node.free for node in nodes]):
        return []
    sentences = []
    impossible = set()
    for ask in asks:
        reason = _never(ask, nodes)
        if reason:
            impossible.add(ask.name)
            sentences.append(reason)
    possible = [ask for ask in asks if ask.name not in impossible]
    if missing := _place(possible, [node.total for node in nodes]):
        sentences += [
            f"{_asked(ask)}: {_fit(ask.count - num)} beside the rest of what is asked, by first "
            f"fit; {_has(ask.bundle, nodes)}."
            for ask, num in missing
        ]
    elif missing := _place(possible, [node.free for node in nodes]):
        sentences += [
            f"{_asked(ask)}: {num} of them wait until others give back what they hold; "
            f"{_has(ask.bundle, nodes, free=True)}."
            for ask, num in missing
        ]
    return sentences


def _needs(ask: Ask) -> dict[str, float]:
    return {name: amount for name, amount in ask.bundle.items() if amount > 0}


def _place(asks: Sequence[Ask], room: Sequence[Mapping[str, float]]) -> list[tuple[Ask, int]]:
    """First fit, the largest first; those that found no room and how many of each."""
    left_in = [dict(node) for node in room]
    total: Counter[str] = Counter()
    for node in left_in:
        total.update(node)
    # A GPU of four weighs more than two CPUs of sixty-four.
    order = sorted(
        range(len(asks)),
        key=lambda i: -max(n / (total[name] or 1) for name, n in _needs(asks[i]).items()),
    )
    missing: dict[int, int] = {}
    for position in order:
        bundle, left = _needs(asks[position]), asks[position].count
        for node in left_in:
            while left and _fits(bundle, node):
                for name, amount in bundle.items():
                    node[name] -= amount
                left -= 1
        if left:
            missing[position] = left
    return [(ask, missing[position]) for position, ask in enumerate(asks) if position in missing]


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + ROUNDING >= amount for name, amount in bundle.items())


def _never(ask: Ask, nodes: Sequence[NodeResources]) -> str:
    """Why even an empty cluster could not hold one of them; "" if it could."""
    bundle = _needs(ask)
    if any(_fits(bundle, node.total) for node in nodes):
        return ""
    if not nodes:
        return f"{_asked(ask)}: the cluster has no node."
    absent = [name for name in bundle if all(not node.total.get(name) for node in nodes)]
    if absent:
        known = sorted({name for node in nodes for name, amount in node.total.items() if amount})
        return (
            f"{_asked(ask)}: no node has {' or '.join(absent)}; "
            f"the cluster has {', '.join(name for name in known if ':' not in name)}."
        )
    largest = {name: max(nodes, key=lambda node: node.total.get(name, 0.0)) for name in bundle}
    short = [name for name in bundle if not _fits({name: bundle[name]}, largest[name].total)]
    if short:
        most = ", ".join(
            f"the node with most {name} has {_number(largest[name].total.get(name, 0.0))} "
            f"({largest[name].name})"
            for name in short
        )
        return f"{_asked(ask)}: {_amounts(bundle)} on one node is asked, {most}."
    return (
        f"{_asked(ask)}: {_amounts(bundle)} on one node is asked; each is there, but on no node "
        "together."
    )


def _asked(ask: Ask) -> str:
    times = f"{ask.count} x " if ask.count > 1 else ""
    return f"{ask.name} ({times}{_amounts(ask.bundle)})"


def _fit(count: int) -> str:
    return "none fits" if count == 0 else "only 1 fits" if count == 1 else f"only {count} fit"


def _has(bundle: Mapping[str, float], nodes: Sequence[NodeResources], *, free: bool = False) -> str:
    parts = []
    for name, amount in bundle.items():
        if amount <= 0:
            continue
        total = sum(node.total.get(name, 0.0) for node in nodes)
        part = f"{_number(total)} {name} on {len(nodes)} node{'s' * (len(nodes) != 1)}"
        if free:
            part += f", {_number(sum(node.free.get(name, 0.0) for node in nodes))} of them free"
        parts.append(part)
    return f"the cluster has {' and '.join(parts)}"


def _amounts(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{_number(amount)} {name}" for name, amount in bundle.items() if amount > 0)


def _number(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
