"""What the machines of a launch file cost an hour: least, most, and most if none were spot.

Prices of disks, traffic and shared file systems are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.machines.prices import Instance, PriceTable
from cluster.planning.launch_file import Launch, NodeType, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeCost:
    """What one node type may cost."""

    node: NodeType
    size: Instance | None
    """None: not in the table."""

    @property
    def price(self) -> float | None:
        """Dollars per hour of one, as it is bought: on demand where no spot price is known."""
        if self.size is None:
            return None
        return self.size.usd_per_hour("spot" if self.node.spot else "on-demand")

    def dollars(self, most: bool) -> float:
        """Per hour, with the least or the most machines of the type."""
        return (self.price or 0.0) * self.node.count[most]


def costs(launch: Launch, prices: PriceTable) -> list[TypeCost]:
    """A row for each node type, in the order of the file."""
    table = prices.instances.get(launch.provider, {})
    return [TypeCost(node=node, size=table.get(node.instance)) for node in launch.types]


def price_range(rows: Sequence[TypeCost], max_workers: int) -> tuple[float, float, float]:
    """Dollars per hour of the fewest machines, of the most, and of the most if none were spot.

    The most are bounded by `max_workers` of the whole file: the dearest then count.
    """

    def most(price: Callable[[TypeCost], float]) -> float:
        heads = sum(price(row) for row in rows if row.node.head)
        workers = [price(row) for row in rows for _ in range(row.node.max_workers)]
        return heads + sum(sorted(workers, reverse=True)[:max_workers])

    return (
        sum(row.dollars(most=False) for row in rows),
        most(lambda row: row.price or 0.0),
        most(lambda row: row.size.on_demand if row.size is not None else 0.0),
    )


def print_costs(launch: Launch, prices: PriceTable, console: Console, source: Path) -> None:
    """A table of the node types, and the range in a line.

    Args:
        source: the price table's file.
    """
    rows = costs(launch, prices)
    table = Table()
    columns = ("node type", "machine", "market", "machines", "offers", "$/h each", "$/h in all")
    for column in columns:
        table.add_column(column, justify="right" if "$" in column else "left")
    for row in rows:
        least, most = row.node.count
        offers = ", ".join(f"{amount:g} {name}" for name, amount in row.node.resources.items())
        table.add_row(
            row.node.name,
            row.node.instance or "?",
            "spot" if row.node.spot else "on demand",
            f"{least}" if least == most else f"{least} to {most}",
            offers,
            "?" if row.size is None else f"{row.price:,.2f}",
            "?" if row.size is None else f"{row.dollars(False):,.2f} to {row.dollars(True):,.2f}",
        )
    console.print(table)
    low, high, without_spot = price_range(rows, whole(launch.data.get("max_workers"), 0))
    known = "" if all(row.size is not None for row in rows) else " of the known ones"
    console.out(
        f"dollars per hour{known}: {low:,.2f} with the fewest machines, {high:,.2f} with the most "
        f"({without_spot:,.2f} if all were on demand); list prices of {prices.as_of}, "
        f"to be checked: {source}",
        highlight=False,
    )
