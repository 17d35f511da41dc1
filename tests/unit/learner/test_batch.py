from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from learner.batch import (
    Share,
    check_markers,
    collate_policy,
    collate_preference,
    padded_tokens,
    plan_batches,
    tokenise_pairs,
    tokenise_segments,
)
from learner.pairs import PairConfig, tree_pairs
from rollout.prompt import (
    MARKERS,
    RSTAR_TEMPLATE,
    SHORT_TEMPLATE,
    Segment,
    render_prompt,
    render_segments,
)
from tests.builders import answered, code, make_tree
from tests.models import END_OF_TEXT, write_byte_tokenizer

TREE = make_tree(
    code("a = 1", answered("7", correct=True)),
    code("bb = 2", answered("8", correct=False)),
    code("c = 3", answered("7", correct=True)),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


def steps_of_first_answer():
    return TREE.steps(next(TREE.answers()))


@pytest.mark.parametrize("template", [SHORT_TEMPLATE, RSTAR_TEMPLATE], ids=lambda t: t.name)
def test_ids_of_a_trajectory_start_with_the_ids_of_each_prompt_of_its_search(tokenizer, template):
    steps = steps_of_first_answer()
    whole = tokenise_segments(tokenizer, render_segments("How many?", steps, template))
    for n in range(len(steps) + 1):
        prompt = tokenizer(render_prompt("How many?", steps[:n], template)).input_ids
        assert whole.ids[: len(prompt)].tolist() == prompt
    assert whole.ids[len(prompt) :].tolist() == [tokenizer.eos_token_id]


def test_loss_covers_the_policys_text_and_the_end_of_sequence(tokenizer):
    text = tokenise_segments(
        tokenizer, render_segments("How many?", steps_of_first_answer(), SHORT_TEMPLATE)
    )
    trained = tokenizer.decode(text.ids[text.trained], skip_special_tokens=False)
    untrained = tokenizer.decode(text.ids[~text.trained], skip_special_tokens=False)
    assert trained == (
        "<code>\na = 1\n<end_of_step>\nprint(7)\n<end_of_code>"
        "<answer>The answer is \\boxed{7}<end_of_answer>" + END_OF_TEXT
    )
    assert untrained == "<|user|>How many?<|assistant|>\n<output>7<end_of_output>\n"


def test_characters_of_several_tokens_are_masked_whole(tokenizer):
    segments = [Segment(text="π²", trained=False), Segment(text="≤ é", trained=True)]
    text = tokenise_segments(tokenizer, segments, end_of_sequence=False)
    assert tokenizer.decode(text.ids[text.trained]) == "≤ é"


def test_loss_boundary_inside_a_token_is_refused(tokenizer):
    segments = [Segment(text="<|us", trained=False), Segment(text="er|>", trained=True)]
    with pytest.raises(ValueError, match="reaches across the boundary"):
        tokenise_segments(tokenizer, segments)


def test_tokenizer_without_a_marker_is_refused(tmp_path):
    write_byte_tokenizer(tmp_path, markers=MARKERS[1:])
    with pytest.raises(ValueError, match="lacks step markers as single tokens: <code>"):
        check_markers(AutoTokenizer.from_pretrained(tmp_path), where="here")


def test_each_text_of_a_node_is_tokenised_once(tokenizer):
    pairs = tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig(answer_pairs=False))
    (group,) = tokenise_pairs(tokenizer, pairs)

    assert (len(pairs), len(group.texts)) == (2, 3)
    for pair, chosen, rejected in zip(pairs, group.chosen, group.rejected, strict=True):
        assert tokenizer(pair.prefix + pair.chosen).input_ids == group.texts[chosen].ids.tolist()
        assert (
            tokenizer(pair.prefix + pair.rejected).input_ids == group.texts[rejected].ids.tolist()
        )
        assert group.texts[chosen].num_trained > 0
        assert group.texts[rejected].num_trained == 0


def test_collated_targets_are_the_trained_tokens(tokenizer):
    texts = [
        tokenise_segments(
            tokenizer, [Segment(text=a, trained=False), Segment(text=b, trained=True)]
        )
        for a, b in (("ab", "cde"), ("x", "yz"))
    ]
    batch = collate_policy(texts, pad_id=99)

    assert batch.input_ids.shape == (2, 6)
    assert batch.input_ids[1].tolist()[4:] == [99, 99]
    flat = batch.input_ids.flatten()
    assert flat[batch.positions + 1].tolist() == batch.targets.tolist()
    assert tokenizer.decode(batch.targets.tolist()) == f"cde{END_OF_TEXT}yz{END_OF_TEXT}"


def test_collated_pairs_point_at_last_tokens(tokenizer):
    pairs = tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    groups = tokenise_pairs(tokenizer, pairs)
    batch = collate_preference(groups, pad_id=0)

    texts = [text for group in groups for text in group.texts]
    assert batch.input_ids.flatten()[batch.last].tolist() == [t.ids[-1] for t in texts]
    wanted = [(p.prefix + p.chosen, p.prefix + p.rejected) for p in pairs]
    found = [
        (tokenizer.decode(texts[c].ids), tokenizer.decode(texts[r].ids))
        for c, r in zip(batch.chosen, batch.rejected, strict=True)
    ]
    assert found == wanted
    assert batch.weights.tolist() == [p.weight for p in pairs]


def test_filler_has_no_weight_and_no_loss_positions(tokenizer):
    groups = tokenise_pairs(
        tokenizer, tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    )
    batch = collate_preference(groups, pad_id=0, filler=True)
    assert batch.weights.sum().item() == 0.0
    assert batch.targets.numel() == 0


def plan(lengths, *, tokens=None, examples=None, world=2, micro=10**6, seed=0, rows=None):
    return plan_batches(
        lengths,
        [1] * len(lengths),
        rows=rows,
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
        assert (
            tokens is None
            or len(members) == 1
            or padded_tokens(step, lengths, [1] * len(lengths)) <= tokens
        )
        for shares in step.micro:
            assert len(shares) == world
            for share in shares:
                width = max(lengths[e] for e in share.examples)
                assert len(share.examples) == 1 or width * len(share.examples) <= micro


def test_ranks_get_about_the_same_work():
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 140, 450).tolist()
    for step in plan(lengths, tokens=1024):
        loads = [
            sum(lengths[e] for e in share.examples if not share.filler) for share in step.micro[0]
        ]
        assert abs(loads[0] - loads[1]) <= 140


def test_like_lengths_meet_so_that_little_is_padding():
    rng = np.random.default_rng(1)
    lengths = rng.integers(100, 2000, 1000).tolist()
    steps = plan(lengths, tokens=16384)
    padded = sum(padded_tokens(step, lengths, [1] * len(lengths)) for step in steps)
    assert padded < 1.1 * sum(lengths)


def test_plan_is_a_function_of_the_seed():
    lengths = list(range(10, 110))
    assert plan(lengths, tokens=300, seed=1) == plan(lengths, tokens=300, seed=1)
    assert plan(lengths, tokens=300, seed=1) != plan(lengths, tokens=300, seed=2)


def test_rank_without_an_example_is_given_a_filler():
    (step,) = plan([5], examples=1)
    assert step.micro == ((Share(examples=(0,)), Share(examples=(0,), filler=True)),)
    assert step.examples == [0]
