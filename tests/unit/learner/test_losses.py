from __future__ import annotations

import math

import pytest
import torch

from learner.losses import (
    next_token_loss,
    outcome_loss,
    pairwise_loss,
    value_regression_loss,
)


def test_pairwise_loss_equals_numbers_worked_by_hand():
    rewards = torch.tensor([1.0, 0.0, -1.0])
    loss = pairwise_loss(
        rewards,
        chosen=torch.tensor([0, 0, 2]),
        rejected=torch.tensor([1, 2, 1]),
        weights=torch.tensor([1.0, 0.5, 0.25]),
    )
    # -log sigmoid(1) = 0.31326, -log sigmoid(2) = 0.12693, -log sigmoid(-1) = 1.31326
    assert loss.item() == pytest.approx(0.31326 + 0.5 * 0.12693 + 0.25 * 1.31326, abs=1e-4)


def test_pair_of_weight_zero_gives_no_gradient():
    rewards = torch.tensor([0.3, -0.2], requires_grad=True)
    pairwise_loss(rewards, torch.tensor([0]), torch.tensor([1]), torch.zeros(1)).backward()
    assert rewards.grad.tolist() == [0.0, 0.0]


def test_next_token_loss_reads_the_loss_positions_only():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=generator)
    weight = torch.randn(5, 4, generator=generator)
    positions, targets = torch.tensor([0, 4]), torch.tensor([3, 1])

    loss = next_token_loss(hidden, weight, positions, targets)

    logits = hidden @ weight.T
    expected = -(logits[0, 0].log_softmax(-1)[3] + logits[1, 1].log_softmax(-1)[1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_prediction_costs_log_of_the_vocabulary_per_token():
    loss = next_token_loss(
        torch.zeros(1, 4, 2), torch.ones(8, 2), torch.arange(3), torch.tensor([1, 2, 3])
    )
    assert loss.item() == pytest.approx(3 * math.log(8), rel=1e-6)


def test_no_loss_positions_cost_nothing_and_still_give_gradients():
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    next_token_loss(hidden, torch.ones(4, 3), empty, empty).backward()
    assert hidden.grad.abs().sum().item() == 0.0


def test_regression_loss_is_the_squared_distance_of_values_to_q():
    logits = torch.atanh(torch.tensor([0.5, -0.25, 0.9]))
    loss = value_regression_loss(
        logits, torch.tensor([1.0, -0.25, -1.0]), torch.tensor([1.0, 1.0, 0.0])
    )
    assert loss.item() == pytest.approx(0.25, rel=1e-5)


def test_outcome_loss_is_minus_the_log_of_the_chance_given_to_what_happened():
    logits = torch.atanh(torch.tensor([0.5, 0.5]))  # chance (1 + 0.5) / 2 = 0.75
    loss = outcome_loss(logits, torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx(-math.log(0.75) - 2 * math.log(0.25), rel=1e-5)
