"""Units that convert, and quantities in their base units."""

from __future__ import annotations

from fractions import Fraction

from verifier.answer_tree import Mul, Number, Quantity

_UNITS = {
    unit: (base, Fraction(size))
    for base, sizes in {
        "mm": {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000},
        "in": {"in": 1, "ft": 12, "yd": 36, "mi": 63_360},
        "s": {"s": 1, "min": 60, "h": 3600, "day": 86_400, "week": 604_800},
        "mg": {"mg": 1, "g": 1000, "kg": 1_000_000},
        "ml": {"ml": 1, "l": 1000},
        "cent": {"cent": 1, "dollar": 100},
    }.items()
    for unit, size in sizes.items()
}
"""Units that convert: unit -> (base unit of its kind, factor to it)."""
DEGREES = (("degree", 1),)
RADIANS = (("radian", 1),)


def in_base_units(quantity: Quantity) -> Quantity | None:
    """The quantity in its dimension's base unit; None when a unit does not convert."""
    factor = Fraction(1)
    powers: dict[str, int] = {}
    for unit, power in quantity.unit:
        if unit not in _UNITS:
            if unit == "unit":
                continue
            return None
        dimension, size = _UNITS[unit]
        factor *= size**power
        powers[dimension] = powers.get(dimension, 0) + power
    return Quantity(Mul((quantity.number, Number(factor))), tuple(sorted(powers.items())))


def has_unit(quantity: Quantity) -> bool:
    """Whether the unit says something: "units" and "square units" do not."""
    return any(unit != "unit" for unit, _ in quantity.unit)


def in_one_unit(left: Quantity, right: Quantity) -> tuple[Quantity, Quantity] | None:
    """Both quantities as they are where their units agree or one says nothing, in base units
    where they convert; else None."""
    if left.unit == right.unit or not (has_unit(left) and has_unit(right)):
        return left, right
    one, two = in_base_units(left), in_base_units(right)
    return None if one is None or two is None or one.unit != two.unit else (one, two)
