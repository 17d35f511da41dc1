"""A packed row gives the losses, gradients and values of its texts computed one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.batch import (
    pack_policy,
    pack_preference,
    tokenise_nodes,
    tokenise_pairs,
    tokenise_segments,
)
from learner.fit import PreferenceTrainConfig
from learner.losses import outcome_loss, pairwise_loss, value_regression_loss
from learner.objectives import PolicyObjective, PreferenceObjective, untied_output
from learner.pairs import PairConfig, PairKind, tree_pairs, valued_nodes
from learner.preference_model import new_preference_model
from rollout.prompt import SHORT_TEMPLATE, render_segments
from tests.builders import answered, code, make_problem, make_tree
from tests.models import Architecture, write_tiny_policy

ARCHITECTURES: list[Architecture] = ["llama", "qwen2", "phi3"]
TREES = [
    make_tree(
        code(f"a = {n}", code(f"b = {n * n}", answered("7", correct=True))),
        code(f"bb = {n} * 2", answered("8", correct=False)),
        code(f"c = '{'x' * 20 * n}'", answered("7", correct=True)),
        problem=make_problem(f"p{n}", text=f"What is {'very ' * n} odd?"),
    )
    for n in range(1, 4)
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request, tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"), architecture=request.param)


@pytest.fixture(scope="module")
def groups(policy):
    pairs = [p for t in TREES for p in tree_pairs(t, template=SHORT_TEMPLATE, config=PairConfig())]
    return list(tokenise_pairs(AutoTokenizer.from_pretrained(policy), pairs))


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5), name


def test_packed_policy_loss_and_gradients_equal_the_unpacked(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [
        tokenise_segments(
            tokenizer, render_segments(tree.problem.text, tree.steps(leaf), SHORT_TEMPLATE)
        )
        for tree in TREES
        for leaf in tree.answers()
    ]
    packed = PolicyObjective(AutoModelForCausalLM.from_pretrained(policy))
    loss = packed(pack_policy(texts))
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(policy)
    total = torch.zeros(())
    for text in texts:
        ids = torch.tensor(text.ids.tolist())[None]
        labels = torch.where(torch.tensor(text.trained), ids[0], -100)[None]
        total = total + plain(input_ids=ids, labels=labels).loss * text.num_trained
    total.backward()

    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert_same_gradients(gradients(packed.model), gradients(plain))


def separate_logits(model, groups):
    """Of every text, alone in its row, by transformers' own forward pass."""
    return torch.cat(
        [
            model(input_ids=torch.tensor(text.ids.tolist())[None]).logits[0]
            for group in groups
            for text in group.texts
        ]
    )


def models(policy, **settings):
    config = PreferenceTrainConfig(**settings)
    made = [new_preference_model(policy, seed=0, dtype=torch.float32) for _ in range(2)]
    for model in made:
        with torch.no_grad():
            model.score.weight.mul_(200.0)
    return PreferenceObjective(made[0], config), made[1]


@pytest.mark.parametrize("objective", ["pairwise", "q_regression", "outcome"])
def test_packed_ppm_loss_and_gradients_equal_those_of_separate_texts(policy, groups, objective):
    ours, plain = models(policy, objective=objective)
    if objective == "q_regression":
        config = PairConfig()
        nodes = [n for t in TREES for n in valued_nodes(t, template=SHORT_TEMPLATE, config=config)]
        groups = list(tokenise_nodes(AutoTokenizer.from_pretrained(policy), nodes))
        assert min(len(group.texts) for group in groups) == 1
    batch = pack_preference(groups)
    loss = ours.train()(batch)
    loss.backward()

    logits = separate_logits(plain, groups).squeeze(-1)
    if objective == "pairwise":
        wanted = pairwise_loss(torch.tanh(logits), batch.chosen, batch.rejected, batch.weights)
    elif objective == "outcome":
        wanted = outcome_loss(logits, batch.value_targets, torch.ones(len(logits)))
    else:
        wanted = value_regression_loss(logits, batch.value_targets, torch.ones(len(logits)))
    wanted.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_same_gradients(gradients(ours.model), gradients(plain))


def test_packed_values_equal_those_of_separate_texts(policy, groups):
    ours, plain = models(policy)
    with torch.no_grad():
        found = ours.eval()(pack_preference(groups))
        wanted = torch.tanh(separate_logits(plain, groups)).squeeze(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert found.std() > 0.01


def test_auxiliary_loss_is_that_of_the_policy_with_its_own_output_layer(policy, groups):
    head = untied_output(policy)
    assert head is not None
    trunk = new_preference_model(policy, seed=0, dtype=torch.float32)
    ours = PreferenceObjective(trunk, PreferenceTrainConfig(lm_weight=1.0), head).train()
    batch = pack_preference(groups)
    with torch.no_grad():
        found = (ours(batch, 1.0) - ours(batch)).item()

    plain = AutoModelForCausalLM.from_pretrained(policy)
    wanted = 0.0
    for text in [text for group in groups for text in group.texts if text.num_trained]:
        ids = torch.tensor(text.ids.tolist())[None]
        labels = torch.where(torch.tensor(text.trained), ids[0], -100)[None]
        with torch.no_grad():
            loss = plain(input_ids=ids, labels=labels).loss
        wanted += loss.item() * text.num_trained
    assert found == pytest.approx(wanted, rel=1e-5)


def test_tied_output_layer_is_not_loaded_twice(tmp_path):
    assert untied_output(write_tiny_policy(tmp_path, tied=True)) is None


def test_a_ppm_has_no_output_layer_to_train_with(policy, tmp_path):
    new_preference_model(policy, seed=0, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no output layer, which lm_weight"):
        untied_output(tmp_path)


def test_released_rewards_are_scaled_so_that_tanh_of_a_fifth_is_served(policy, groups):
    ours, plain = models(policy, loss_on="logit", logit_scale=5.0)
    batch = pack_preference(groups)
    with torch.no_grad():
        loss = ours.train()(batch)
        rewards = 5.0 * separate_logits(plain, groups).squeeze(-1)
    wanted = pairwise_loss(rewards, batch.chosen, batch.rejected, batch.weights)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_outcomes_of_whole_trajectories_count_beside_the_pairs(policy, groups):
    model = new_preference_model(policy, seed=1, dtype=torch.float32)
    batch = pack_preference(groups)
    with torch.no_grad():
        objective = PreferenceObjective(model, PreferenceTrainConfig()).train()
        logits, _ = objective.logits(batch)
        both = PreferenceObjective(model, PreferenceTrainConfig(outcome_weight=0.5)).train()
        added = both(batch) - objective(batch)
    wanted = 0.0
    place = 0
    for group in groups:
        own = slice(place, place + len(group.texts))
        place = own.stop
        if group.kind is PairKind.ANSWER:
            targets = torch.tensor(group.targets)
            ones = torch.ones(len(targets))
            wanted += 0.5 * outcome_loss(logits[own], targets, ones).item() / len(targets)
    assert {group.kind for group in groups} == set(PairKind)
    assert added.item() == pytest.approx(wanted, rel=1e-5)
