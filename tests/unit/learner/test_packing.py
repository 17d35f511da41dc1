from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.packing import PlannedStep, Share, first_fit_decreasing, plan_epoch


def plan(lengths, *, tokens=None, examples=None, world=2, micro=10**6, seed=0):
    return plan_epoch(
        lengths,
        [1] * len(lengths),
        lengths,
        max_tokens=tokens,
        max_examples=examples,
        micro_tokens=micro,
        world_size=world,
        rng=None if seed is None else random.Random(seed),
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    tokens=st.one_of(st.none(), st.integers(16, 400)),
    examples=st.one_of(st.none(), st.integers(1, 20)),
    micro=st.integers(16, 200),
    world=st.integers(1, 4),
    seed=st.one_of(st.none(), st.integers(0, 3)),
)
def test_every_example_is_planned_once_within_the_limits(
    lengths, tokens, examples, micro, world, seed
):
    steps = plan(lengths, tokens=tokens, examples=examples, micro=micro, world=world, seed=seed)

    assert sorted(e for step in steps for e in step.examples) == list(range(len(lengths)))
    for step in steps:
        members = step.examples
        assert examples is None or len(members) <= examples
        assert tokens is None or len(members) == 1 or sum(lengths[e] for e in members) <= tokens
        for shares in step.micro:
            assert len(shares) == world
            for share in shares:
                assert len(share.examples) == 1 or sum(lengths[e] for e in share.examples) <= micro


def loads(step: PlannedStep, lengths: list[int], rank: int) -> int:
    return sum(
        lengths[e] for ranks in step.micro for e in ranks[rank].examples if not ranks[rank].filler
    )


def test_ranks_get_about_the_same_number_of_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 2000, 600).tolist()
    for step in plan(lengths, tokens=65536, micro=8192)[:-1]:
        first, second = (loads(step, lengths, rank) for rank in (0, 1))
        assert abs(first - second) <= 0.02 * (first + second)


def test_rows_are_nearly_full():
    rng = np.random.default_rng(1)
    lengths = rng.integers(100, 2000, 1000).tolist()
    rows = first_fit_decreasing(range(1000), lengths, 8192)
    assert len(rows) <= 1.01 * sum(lengths) / 8192 + 1


def test_example_goes_into_the_first_row_with_room():
    #                                0  1  2  3  4
    assert first_fit_decreasing([0, 1, 2, 3, 4], [4, 7, 3, 5, 1], 10) == [[1, 2], [3, 0, 4]]
    assert first_fit_decreasing([0, 1], [3, 12], 10) == [[1], [0]]


def test_budget_counts_whole_texts_and_rows_count_computed_tokens():
    (step,) = plan_epoch(
        [40, 40],
        [4, 4],
        [25, 25],
        max_tokens=80,
        max_examples=None,
        micro_tokens=50,
        world_size=1,
        rng=None,
    )
    assert step.micro == ((Share(examples=(0, 1)),),)


def test_plan_is_a_function_of_the_seed():
    lengths = list(range(10, 110))
    assert plan(lengths, tokens=300, seed=1) == plan(lengths, tokens=300, seed=1)
    assert plan(lengths, tokens=300, seed=1) != plan(lengths, tokens=300, seed=2)


def test_rank_without_an_example_is_given_a_filler():
    (step,) = plan([5], examples=1)
    assert step.micro == ((Share(examples=(0,)), Share(examples=(0,), filler=True)),)
    assert step.examples == [0]
