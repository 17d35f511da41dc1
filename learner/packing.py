"""Which examples are computed together: optimiser steps, ranks, packed rows. Pure.

    one epoch --shuffle--> steps of at most so many tokens and examples
    step --longest first to the lightest rank--> hands of about equal work
    hand --first fit, longest first--> rows of at most `micro_tokens`, one forward pass each

A row holds whole examples one after the other and no padding, so lengths need not be alike and a
step is a plain random draw. All ranks hold the same plan and agree on the number of rows without
talking; where a rank has fewer, an example with weight 0 fills its place.

Two counts per example: *tokens* are those of its texts, each counted whole (what budgets are in);
*computed* tokens are those of its place in a row, where a shared prefix stands once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank computes in one micro-batch: one packed row."""

    examples: tuple[int, ...]
    filler: bool = False
    """True: there was nothing left; compute this with weight 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One optimiser step: `micro[i][r]` is rank r's share of micro-batch i."""

    micro: tuple[tuple[Share, ...], ...]

    @property
    def examples(self) -> list[int]:
        """All example numbers of the step, fillers excluded."""
        return [e for ranks in self.micro for s in ranks if not s.filler for e in s.examples]


def plan_epoch(
    tokens: Sequence[int],
    counts: Sequence[int],
    computed: Sequence[int],
    *,
    max_tokens: int | None,
    max_examples: int | None,
    micro_tokens: int,
    world_size: int,
    rng: random.Random | None,
) -> list[PlannedStep]:
    """Cut one pass over the data into optimiser steps, the same on every rank.

    Args:
        tokens: of each example's texts, each counted whole.
        counts: what an example counts as against `max_examples` (1, or its pairs).
        computed: tokens each example takes in a row.
        max_tokens: most tokens of a step; None: no limit.
        max_examples: most counts in a step; None: no limit. An example over a limit stands alone.
        micro_tokens: most computed tokens of one row.
        rng: shuffles; None keeps the given order (evaluation).
    """
    order = list(range(len(tokens)))
    if rng is not None:
        rng.shuffle(order)
    steps: list[list[int]] = []
    held = count = 0
    for e in order:
        fits = (max_tokens is None or held + tokens[e] <= max_tokens) and (
            max_examples is None or count + counts[e] <= max_examples
        )
        if not steps or not fits:
            steps.append([])
            held = count = 0
        steps[-1].append(e)
        held += tokens[e]
        count += counts[e]
    return [_share(step, computed, micro_tokens, world_size) for step in steps]


def _share(
    step: Sequence[int], computed: Sequence[int], micro_tokens: int, world_size: int
) -> PlannedStep:
    """Deal a step to the ranks so that all have about the same work and as many rows."""
    dealt = sorted(step, key=lambda e: (-computed[e], e))
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for e in dealt:
        lightest = loads.index(min(loads))
        hands[lightest].append(e)
        loads[lightest] += computed[e]
    rows = [first_fit_decreasing(hand, computed, micro_tokens) for hand in hands]
    filler = Share(examples=(dealt[-1],), filler=True)
    return PlannedStep(
        micro=tuple(
            tuple(Share(examples=tuple(own[i])) if i < len(own) else filler for own in rows)
            for i in range(max(len(own) for own in rows))
        )
    )


def first_fit_decreasing(
    examples: Sequence[int], sizes: Sequence[int], capacity: int
) -> list[list[int]]:
    """Pack examples into rows of at most `capacity`, the largest first, each where it first fits.

    An example larger than that stands alone.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for e in sorted(examples, key=lambda e: (-sizes[e], e)):
        for number, room in enumerate(free):
            if sizes[e] <= room:
                rows[number].append(e)
                free[number] -= sizes[e]
                break
        else:
            rows.append([e])
            free.append(capacity - sizes[e])
    return rows
