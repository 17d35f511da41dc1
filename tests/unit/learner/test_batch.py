from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from learner.batch import (
    check_markers,
    pack_policy,
    pack_preference,
    tokenise_nodes,
    tokenise_pairs,
    tokenise_segments,
    tokenise_texts,
)
from learner.pairs import PairConfig, tree_pairs, valued_nodes
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


def test_a_token_across_a_loss_boundary_is_cut_there(tokenizer):
    segments = [Segment(text="<|us", trained=False), Segment(text="er|>", trained=True)]
    text = tokenise_segments(tokenizer, segments)
    assert tokenizer.decode(text.ids[text.trained]) == "er|>" + END_OF_TEXT
    assert tokenizer.decode(text.ids[~text.trained]) == "<|us"


def test_texts_together_and_alone_have_the_same_ids(tokenizer):
    texts = [
        render_segments("How many?", steps_of_first_answer(), SHORT_TEMPLATE),
        [Segment(text="<|us", trained=False), Segment(text="er|>", trained=True)],
        [Segment(text="π²", trained=True)],
    ]
    together = tokenise_texts(tokenizer, texts)
    for segments, one in zip(texts, together, strict=True):
        alone = tokenise_segments(tokenizer, segments)
        assert one.ids.tolist() == alone.ids.tolist()
        assert one.trained.tolist() == alone.trained.tolist()


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


def test_packed_targets_are_the_trained_tokens_and_positions_restart(tokenizer):
    texts = [
        tokenise_segments(
            tokenizer, [Segment(text=a, trained=False), Segment(text=b, trained=True)]
        )
        for a, b in (("ab", "cde"), ("x", "yz"))
    ]
    batch = pack_policy(texts)

    assert batch.input_ids.shape == (1, 10)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.layout.lengths == [6, 4]
    assert batch.input_ids[0][batch.positions + 1].tolist() == batch.targets.tolist()
    assert tokenizer.decode(batch.targets.tolist()) == f"cde{END_OF_TEXT}yz{END_OF_TEXT}"


def test_packed_nodes_hold_their_shared_tokens_once_and_point_at_last_tokens(tokenizer):
    pairs = tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    groups = list(tokenise_pairs(tokenizer, pairs))
    batch = pack_preference(groups)

    assert batch.input_ids.shape[1] == sum(group.num_computed for group in groups)
    texts = [text for group in groups for text in group.texts]
    assert batch.input_ids[0][batch.last].tolist() == [t.ids[-1] for t in texts]
    assert batch.position_ids[0][batch.last].tolist() == [t.length - 1 for t in texts]
    wanted = [(p.prefix + p.chosen, p.prefix + p.rejected) for p in pairs]
    found = [
        (tokenizer.decode(texts[c].ids), tokenizer.decode(texts[r].ids))
        for c, r in zip(batch.chosen, batch.rejected, strict=True)
    ]
    assert found == wanted
    assert batch.weights.tolist() == [p.weight for p in pairs]


def test_shared_tokens_leave_each_text_at_least_one_of_its_own(tokenizer):
    step, answer = tokenise_pairs(
        tokenizer, tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    )
    for group in (step, answer):
        rows = [text.ids.tolist() for text in group.texts]
        assert len({tuple(row[: group.num_shared]) for row in rows}) == 1
        assert len({row[group.num_shared] for row in rows}) > 1
        assert min(group.branches) >= 1
    prompt = tokenizer("<|user|>How many?<|assistant|>").input_ids
    assert step.num_shared > len(prompt)


def test_targets_of_pairs_are_which_is_chosen(tokenizer):
    pairs = tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    for group in tokenise_pairs(tokenizer, pairs):
        assert {group.targets[i] for i in group.chosen} == {1.0}
        assert {group.targets[i] for i in group.rejected} == {-1.0}


def test_targets_of_a_node_are_the_q_values_of_all_its_steps(tokenizer):
    nodes = valued_nodes(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    values = {node.prefix + step.text: step.q for node in nodes for step in node.steps}
    groups = list(tokenise_nodes(tokenizer, nodes))
    found = {
        tokenizer.decode(text.ids): target
        for group in groups
        for text, target in zip(group.texts, group.targets, strict=True)
    }
    assert found == values
    assert len(values) == 9  # of three solutions of three steps
    batch = pack_preference(groups)
    assert batch.value_targets.tolist() == pytest.approx(list(values.values()))
    assert batch.chosen.numel() == batch.rejected.numel() == batch.weights.numel() == 0


def test_filler_has_no_weight_and_no_loss_positions(tokenizer):
    pairs = tree_pairs(TREE, template=SHORT_TEMPLATE, config=PairConfig())
    groups = list(tokenise_pairs(tokenizer, pairs))
    batch = pack_preference(groups, filler=True)
    assert batch.weights.sum().item() == 0.0
    assert batch.text_weights.sum().item() == batch.outcome_weights.sum().item() == 0.0
    assert batch.targets.numel() == 0
    assert pack_policy(list(groups[0].texts), filler=True).targets.numel() == 0
