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
    same_node: bool = False
    """True: all of them on one node (STRICT_PACK, as tensor parallelism wants it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """A living node, or one that the autoscaler could add."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    """Not held by anybody now."""


def explain(
    asks: Sequence[Ask],
    nodes: Sequence[NodeResources],
    *,
    addable: Sequence[tuple[NodeResources, int]] = (),
) -> list[str]:
    """Sentences that say why not all of `asks` can be placed now; empty if they can.

    Args:
        addable: node types the autoscaler may add and how many more of each; `free` is ignored.
    """
    units = [(ask, bundle, number) for ask in asks for bundle, number in _units(ask)]
    if not units or _place(units, [dict(node.free) for node in nodes]) == {}:
        return []
    coming = [kind for kind, number in addable for _ in range(number)]
    everything = [*nodes, *coming]
    sentences = []
    impossible = set()
    for ask, bundle, _ in units:
        reason = _never(ask, bundle, everything)
        if reason:
            impossible.add(ask.name)
            sentences.append(reason)
    possible = [unit for unit in units if unit[0].name not in impossible]
    if missing := _place(possible, [dict(node.total) for node in everything]):
        sentences += [
            f"{_asked(ask)}: {_fit(ask.count - num)} beside the rest of what is asked, by first "
            f"fit; {_has(ask.bundle, everything)}."
            for ask, num in _missing(possible, missing)
        ]
    elif missing := _place(possible, [dict(node.total) for node in nodes]):
        kinds = ", ".join(f"{number} x {kind.name}" for kind, number in addable)
        sentences += [
            f"{_asked(ask)}: {num} of them wait for new nodes; the autoscaler may add {kinds}."
            for ask, num in _missing(possible, missing)
        ]
    elif missing := _place(possible, [dict(node.free) for node in nodes]):
        sentences += [
            f"{_asked(ask)}: {num} of them wait until others give back what they hold; "
            f"{_has(ask.bundle, nodes, free=True)}."
            for ask, num in _missing(possible, missing)
        ]
    return sentences


Unit = tuple[Ask, Mapping[str, float], int]
"""What must lie on one node, how often, and for whom."""


def _units(ask: Ask) -> list[tuple[Mapping[str, float], int]]:
    bundle = {name: amount for name, amount in ask.bundle.items() if amount > 0}
    if not bundle or ask.count < 1:
        return []
    if ask.same_node:
        return [({name: amount * ask.count for name, amount in bundle.items()}, 1)]
    return [(bundle, ask.count)]


def _place(units: Sequence[Unit], room: list[dict[str, float]]) -> dict[int, int]:
    """First fit, the largest first; how many of each unit (by position) found no room."""
    missing: dict[int, int] = {}
    total: Counter[str] = Counter()
    for node in room:
        total.update(node)
    # A GPU of four weighs more than two CPUs of sixty-four.
    order = sorted(
        range(len(units)),
        key=lambda i: -max(amount / (total[name] or 1) for name, amount in units[i][1].items()),
    )
    for position in order:
        _, bundle, number = units[position]
        left = number
        for node in room:
            while left and _fits(bundle, node):
                for name, amount in bundle.items():
                    node[name] -= amount
                left -= 1
        if left:
            missing[position] = left
    return missing


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + ROUNDING >= amount for name, amount in bundle.items())


def _missing(units: Sequence[Unit], missing: Mapping[int, int]) -> list[tuple[Ask, int]]:
    return [
        (unit[0], unit[0].count if unit[0].same_node else missing[position])
        for position, unit in enumerate(units)
        if position in missing
    ]


def _never(ask: Ask, bundle: Mapping[str, float], nodes: Sequence[NodeResources]) -> str:
    """Why even an empty cluster could not hold one of them; "" if it could."""
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
    whole = "all of them on one node, " if ask.same_node and ask.count > 1 else ""
    largest = {name: max(nodes, key=lambda node: node.total.get(name, 0.0)) for name in bundle}
    short = [name for name in bundle if not _fits({name: bundle[name]}, largest[name].total)]
    if short:
        most = ", ".join(
            f"the node with most {name} has {_number(largest[name].total.get(name, 0.0))} "
            f"({largest[name].name})"
            for name in short
        )
        return f"{_asked(ask)}: {whole}{_amounts(bundle)} on one node is asked, {most}."
    return (
        f"{_asked(ask)}: {whole}{_amounts(bundle)} on one node is asked; each is there, but on no "
        f"node together."
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
