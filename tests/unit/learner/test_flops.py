from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.flops import flop_counter, peak_flops


def test_flops_equal_numbers_worked_by_hand():
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    counter = flop_counter(LlamaForCausalLM(config))
    # a layer: q 8x8, k and v 8x4, o 8x8, three 8x16 matrices = 576 weights; forward 2, backward 4
    assert counter.per_token == 6 * 2 * 576
    # q.k and p.v over 8 numbers, both 2 FLOPs, times three, in two layers
    assert counter.per_attended == 2 * 3 * 2 * 2 * 8
    assert counter.per_output == 6 * 8 * 100
    assert counter.total(tokens=10, attended=55, outputs=4) == pytest.approx(
        10 * 6912 + 55 * 192 + 4 * 4800
    )


def test_peak_is_as_given_or_unknown_on_a_cpu():
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11
