r"""Are two parsed answers the same mathematical object?

Types first, then members. Each question goes down this ladder and stops at the first rung that
knows:

    same tree -> structure (sets, tuples, intervals, relations, units) -> exact rationals
    -> 60 digits (closed) or fixed test points (letters) -> sympy in another process

The rungs of numbers are `numeric_equality`; before the first, both answers are brought into one
form (`normal_forms`). Comparison is symmetric and deterministic: budgets count work, not time.

Conventions. Lists and sets ignore order, and a member that is written twice counts once: in a set,
and in a list of points, of values of one letter, or of different numbers (`2, 2` may be a pair, and
is not 2; square brackets count). Tuples, intervals and matrices keep order and repeats; a bare `a,
b` matches `(a, b)` in that order; a list of one is its member. `x =` and other names
(`definitions`) are dropped when the other side names nothing. Units, currency, degree and percent
signs may be dropped on one side; two different units are converted or differ. A percentage also
equals its hundredth, and degrees the radians they are, where those are written with pi.

A decimal is the number it says, alone and in a tuple, an interval, a set or a matrix alike: 0.6 is
3/5, 2.6667 is not 8/3. Only a printed double (15 digits or more), and seven digits or more against
an irrational value, stand for what they round (`numeric_equality`).

A ratio with a zero side equals only itself. What may be a time of day, an hour up to 24 and two
digits below 60 behind the colon, equals only the same time: 12:00 is no 1:0, and 10:30 no 1:3. A
time that does not say its half of the day agrees with both. A bare number is no time.

Not covered: solution sets of equations that are not written out, bound letters of sums under other
names, piecewise functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from verifier.answer_tree import (
    MINUS_ONE,
    ZERO,
    BaseNumeral,
    Call,
    Clock,
    Constant,
    Interval,
    Label,
    Matrix,
    Mul,
    Node,
    Power,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    children,
    holds,
    is_expression,
    symbols,
)
from verifier.answer_words import UNIT_OF
from verifier.definitions import (
    Definition,
    as_ratio,
    definition,
    in_alphabetical_order,
    values_of_one_name,
)
from verifier.evaluation import BeyondBudget, NotExact
from verifier.finding import SAME, Finding, Reason, different, equal, weakest
from verifier.normal_forms import as_matrix, difference, half_spaces, prepare
from verifier.numeric_equality import (
    closed_values,
    common_logs,
    constant_ratio_sign,
    exact_key,
    far_apart,
    has_plain_log,
    logarithms_equal,
    open_values,
    rough,
)
from verifier.real_sets import RealSet, real_set
from verifier.units import DEGREES, RADIANS, has_unit, in_one_unit

MAX_COMPARISONS = 400
MAX_UNMATCHED = 12

SymbolicJudge = Callable[[Node, Node], bool | None]


def compare_readings(
    lefts: Iterable[Node], rights: Iterable[Node], symbolic: SymbolicJudge | None = None
) -> Finding:
    """Compare every reading of one answer with every reading of the other; equal when any pair is.

    Args:
        symbolic: judge of last resort, True or False or None for "cannot tell"; None leaves such
        pairs undecided.
    """
    worst: Finding | None = None
    rights = tuple(rights)
    for left in lefts:
        for right in rights:
            finding = _Comparison(symbolic).run(left, right)
            if finding.equal:
                return finding
            if worst is None or worst.reason is Reason.DIFFERENT:
                worst = finding
    return worst or different("unparsed")


class _Comparison:
    """One pair of trees and the work budget spent on it."""

    def __init__(self, symbolic: SymbolicJudge | None) -> None:
        self.symbolic = symbolic
        self.remaining = MAX_COMPARISONS

    def run(self, left: Node, right: Node) -> Finding:
        try:
            return self.compare(prepare(left), prepare(right))
        except BeyondBudget:
            return Finding(False, Reason.LIMIT, "budget")

    def compare(self, left: Node, right: Node) -> Finding:
        self.remaining -= 1
        if self.remaining < 0:
            raise BeyondBudget
        if left == right:
            return SAME
        either = {type(left), type(right)}
        if Relation in either:
            return self.relations(left, right)
        if Label in either:
            return different("label")
        if Clock in either:
            return self.times(left, right)
        if BaseNumeral in either:
            return different("base")
        if is_expression(left) and is_expression(right):
            return self.expressions(left, right)
        if Quantity in either:
            return self.quantities(left, right)
        if Ratio in either:
            return self.ratios(left, right)
        if Interval in either or SetOperation in either:
            return self.real_sets(real_set(left), real_set(right))
        if Matrix in either:
            return self.matrices(left, right)
        if isinstance(left, Sequence) and isinstance(right, Sequence):
            return self.sequences(left, right)
        if isinstance(left, Sequence):
            return self.all_members(left, right)
        return self.all_members(right, left) if isinstance(right, Sequence) else different("type")

    # Relations

    def relations(self, left: Node, right: Node) -> Finding:
        if not (isinstance(left, Relation) and isinstance(right, Relation)):
            relation, other = (left, right) if isinstance(left, Relation) else (right, left)
            assert isinstance(relation, Relation)
            return self.relation_and_value(relation, other)
        first, second = definition(left), definition(right)
        if first is not None and second is not None:
            values = values_of_one_name(first, second)
            if values is not None:
                return self.compare(*values)
        if set(left.operators) == {"="} == set(right.operators):
            return self.equations(left, right)
        one, two = real_set(left), real_set(right)
        if one is not None and two is not None:
            if one.letter != two.letter:
                return different("letter")
            return self.real_sets(one, two)
        return self.inequalities(left, right)

    def relation_and_value(self, relation: Relation, other: Node) -> Finding:
        defined = definition(relation)
        if defined is not None:
            return self.value(relation, defined, other)
        if relation.operators == ("in",):
            return self.compare(relation.operands[1], other)
        own = real_set(relation)
        return self.real_sets(own, real_set(other)) if own is not None else different("relation")

    def value(self, relation: Relation, defined: Definition, other: Node) -> Finding:
        name, value = defined
        one_by_one = isinstance(name, Sequence) and name.kind == "list"
        if one_by_one and isinstance(other, Sequence) and other.kind == "tuple":
            value = in_alphabetical_order(defined)
        finding = self.compare(value, other)
        if one_by_one and not finding.equal and relation.operands[0] != name:
            return self.compare(relation.operands[-1], other)
        return finding

    def equations(self, left: Relation, right: Relation) -> Finding:
        if len(left.operands) != len(right.operands):
            return different("equation")
        sides = (*left.operands, *right.operands)
        if len(sides) != 4 or not all(map(is_expression, sides)):
            return self.in_order(left.operands, right.operands, "equation")
        ratio = self.ratio_sign(difference(left), difference(right))
        return equal(Reason.NUMERIC, "equation") if ratio is not None else different("equation")

    def inequalities(self, left: Relation, right: Relation) -> Finding:
        first, second = half_spaces(left), half_spaces(right)
        if first is None or second is None or len(first) != len(second):
            return different("inequality")
        unmatched = list(second)
        for operator, tree in first:
            for place, (other_operator, other) in enumerate(unmatched):
                if operator != other_operator:
                    continue
                ratio = self.ratio_sign(tree, other)
                if ratio is not None and (ratio > 0 or operator == "!="):
                    del unmatched[place]
                    break
            else:
                return different("inequality")
        return equal(Reason.NUMERIC, "inequality")

    def ratio_sign(self, left: Node, right: Node) -> int | None:
        self.remaining -= 1
        return constant_ratio_sign(left, right)

    # Sets of reals

    def real_sets(self, left: RealSet | None, right: RealSet | None) -> Finding:
        if left is None or right is None:
            return different("type")
        if len(left.pieces) != len(right.pieces):
            return different("interval")
        findings = []
        for one, two in zip(left.pieces, right.pieces, strict=True):
            if (one.low_open, one.high_open) != (two.low_open, two.high_open):
                return different("interval ends")
            findings.append(self.in_order((one.low, one.high), (two.low, two.high), "interval"))
            if not findings[-1].equal:
                return findings[-1]
        return weakest(findings, "interval")

    # Collections

    def sequences(self, left: Sequence, right: Sequence) -> Finding:
        kinds = {left.kind, right.kind}
        matrices = as_matrix(left), as_matrix(right)
        if matrices[0] is not None and matrices[1] is not None and kinds == {"bracket"}:
            return self.matrices(matrices[0], matrices[1])
        if ("set" in kinds and "tuple" not in kinds) or kinds == {"list"}:
            return self.without_repetition(list(left.items), list(right.items))
        if "tuple" in kinds and kinds & {"list", "set"}:
            members, one = (right, left) if left.kind == "tuple" else (left, right)
            nested = [
                {isinstance(item, Sequence) for item in node.items} for node in (members, one)
            ]
            if nested == [{True}, {False}]:
                return self.all_members(members, one)
        if len(left.items) != len(right.items):
            return different("length")
        if "tuple" in kinds and (kinds & {"set", "bracket"} or "or" in (left.joiner, right.joiner)):
            return different("brackets")
        if "tuple" in kinds or (kinds == {"bracket"} and len(left.items) == 2):
            return self.in_order(left.items, right.items, "tuple")
        return self.in_any_order(list(left.items), list(right.items))

    def all_members(self, members: Sequence, one: Node) -> Finding:
        """A set of one thing, or a list of one point, written more than once, or one thing `or` the
        same; `2, 2` may as well be a pair."""
        points = members.kind == "list" and all(isinstance(one, Sequence) for one in members.items)
        if not members.items or not (points or members.kind == "set" or members.joiner == "or"):
            return different("type")
        findings = []
        for member in members.items:
            findings.append(self.compare(member, one))
            if not findings[-1].equal:
                return findings[-1]
        return weakest(findings, "list")

    def without_repetition(self, left: list[Node], right: list[Node]) -> Finding:
        """Whether each member of either side is one of the other's."""
        keys = [[exact_key(node) for node in nodes] for nodes in (left, right)]
        sizes = [[rough(node) for node in nodes] for nodes in (left, right)]
        found: list[Finding] = []
        matched: set[int] = set()
        both = ((left, right), (right, left))
        for side, (nodes, others) in enumerate(both):
            known = set(keys[1 - side]) - {None}
            open_places = [
                place
                for place, key in enumerate(keys[side])
                if key not in known and not (side and place in matched)
            ]
            if len(open_places) > MAX_UNMATCHED and None in (*sizes[0], *sizes[1]):
                raise BeyondBudget
            for place in open_places:
                for other, node in enumerate(others):
                    if far_apart(sizes[side][place], sizes[1 - side][other]):
                        continue
                    finding = self.compare(nodes[place], node)
                    if finding.equal:
                        found.append(finding)
                        if not side:
                            matched.add(other)
                        break
                else:
                    return different("list")
        return weakest(found, "list")

    def in_order(self, left: Iterable[Node], right: Iterable[Node], path: str) -> Finding:
        findings = []
        for one, two in zip(left, right, strict=True):
            findings.append(self.compare(one, two))
            if not findings[-1].equal:
                return findings[-1]
        return weakest(findings, path)

    def in_any_order(self, left: list[Node], right: list[Node]) -> Finding:
        left, right = _without_common(left, right)
        if not left:
            return equal(Reason.EXACT, "list")
        sizes = [rough(node) for node in right]
        if len(left) > MAX_UNMATCHED and None in (*sizes, *map(rough, left)):
            raise BeyondBudget
        findings = []
        for node in left:
            size = rough(node)
            for place, other in enumerate(right):
                if far_apart(size, sizes[place]):
                    continue
                finding = self.compare(node, other)
                if finding.equal:
                    findings.append(finding)
                    del right[place], sizes[place]
                    break
            else:
                return different("list")
        return weakest(findings, "list")

    def matrices(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Matrix) and isinstance(right, Matrix):
            if (len(left.rows), len(left.rows[0])) != (len(right.rows), len(right.rows[0])):
                return different("shape")
            return self.in_order(children(left), children(right), "matrix")
        matrix, other = (left, right) if isinstance(left, Matrix) else (right, left)
        assert isinstance(matrix, Matrix)
        if not isinstance(other, Sequence) or other.kind == "set":
            return different("type")
        nested = as_matrix(other)
        if nested is not None:
            return self.matrices(matrix, nested)
        vector = children(matrix)
        if min(len(matrix.rows), len(matrix.rows[0])) != 1 or len(vector) != len(other.items):
            return different("shape")
        return self.in_order(vector, other.items, "vector")

    # Quantities and ratios

    def quantities(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Quantity) and isinstance(right, Quantity):
            if {left.unit, right.unit} == {DEGREES, RADIANS}:
                return self.compare(*map(angle, (left, right)))
            pair = in_one_unit(left, right)
            if pair is None:
                return different("unit")
            return self.compare(pair[0].number, pair[1].number)
        quantity, other = (left, right) if isinstance(left, Quantity) else (right, left)
        assert isinstance(quantity, Quantity)
        if isinstance(other, Mul) and isinstance(other.factors[-1], Symbol):
            letter = UNIT_OF.get(other.factors[-1].name)
            if quantity.unit == ((letter, 1),):
                factors = other.factors[:-1]
                other = factors[0] if len(factors) == 1 else Mul(factors)
        percents = [_without_percent(node) is not node for node in (quantity.number, other)]
        if has_unit(quantity) and percents == [False, True]:
            return different("unit")
        if quantity.unit == DEGREES and is_expression(other) and holds(other, _is_pi):
            return self.compare(angle(quantity), other)
        return self.compare(quantity.number, other)

    def times(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Clock) and isinstance(right, Clock):
            same = same_time(left, right)
        else:
            clock, other = (left, right) if isinstance(left, Clock) else (right, left)
            assert isinstance(clock, Clock)
            two_digits = clock.minute > 9 and (clock.second == 0 or clock.second > 9)
            same = two_digits and not clock.half and other == as_ratio(clock)
        return equal(Reason.EXACT, "time") if same else different("time")

    def ratios(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Ratio) and isinstance(right, Ratio):
            if len(left.parts) != len(right.parts):
                return different("length")
            if self.has_zero(left) or self.has_zero(right):
                return self.in_order(left.parts, right.parts, "ratio")
            ones = (Mul((part, right.parts[0])) for part in left.parts[1:])
            twos = (Mul((part, left.parts[0])) for part in right.parts[1:])
            return self.in_order(ones, twos, "ratio")
        ratio, other = (left, right) if isinstance(left, Ratio) else (right, left)
        assert isinstance(ratio, Ratio)
        if len(ratio.parts) != 2 or not is_expression(other) or self.has_zero(ratio):
            return different("type")
        return self.compare(Mul((ratio.parts[0], Power(ratio.parts[1], MINUS_ONE))), other)

    def has_zero(self, ratio: Ratio) -> bool:
        return any(self.compare(part, ZERO).equal for part in ratio.parts)

    # Expressions

    def expressions(self, left: Node, right: Node) -> Finding:
        finding = self.values(left, right)
        if finding.equal:
            return finding
        bare_left, bare_right = _without_percent(left), _without_percent(right)
        if (bare_left is left) != (bare_right is right):
            return self.values(bare_left, bare_right)
        if has_plain_log(left) != has_plain_log(right):
            return self.values(common_logs(left), common_logs(right))
        return finding

    def values(self, left: Node, right: Node) -> Finding:
        letters = symbols(left) | symbols(right)
        try:
            finding = open_values(left, right, letters) if letters else closed_values(left, right)
        except NotExact:
            finding = None
        except BeyondBudget:
            if logarithms_equal(left, right):
                return equal(Reason.NUMERIC, "logarithm")
            return Finding(False, Reason.LIMIT, "magnitude")
        except RecursionError:
            return Finding(False, Reason.LIMIT, "depth")
        if finding is not None:
            return finding
        judged = self.symbolic(left, right) if self.symbolic is not None else None
        if judged is None:
            return Finding(False, Reason.UNDECIDED, "symbolic")
        return equal(Reason.SYMBOLIC, "sympy") if judged else different("sympy")


def angle(quantity: Quantity) -> Node:
    """The number of radians of a quantity of degrees or radians."""
    return Call("degree", (quantity.number,)) if quantity.unit == DEGREES else quantity.number


def _is_pi(node: Node) -> bool:
    return node == Constant("pi")


def same_time(left: Clock, right: Clock) -> bool:
    """Whether two times of day agree; one that does not say its half of the day may be in either,
    or be counted to 24 hours."""
    if (left.minute, left.second) != (right.minute, right.second):
        return False
    if (left.half and right.half) or left.half == right.half:
        return _hours(left) == _hours(right)
    said, unsaid = (left, right) if left.half else (right, left)
    return unsaid.hour in (said.hour, _hours(said))


def _hours(clock: Clock) -> int:
    return clock.hour % 12 + 12 * (clock.half == "pm") if clock.half else clock.hour


def _without_percent(node: Node) -> Node:
    return node.args[0] if isinstance(node, Call) and node.name == "percent" else node


def _without_common(left: list[Node], right: list[Node]) -> tuple[list[Node], list[Node]]:
    """Drop members whose exact values occur on both sides."""
    keys = [[exact_key(node) for node in nodes] for nodes in (left, right)]
    common = Counter(keys[0]) & Counter(keys[1])
    del common[None]
    remaining: list[list[Node]] = []
    for nodes, names in zip((left, right), keys, strict=True):
        budget = common.copy()
        kept: list[Node] = []
        for node, key in zip(nodes, names, strict=True):
            if budget[key] > 0:
                budget[key] -= 1
            else:
                kept.append(node)
        remaining.append(kept)
    return remaining[0], remaining[1]
