from __future__ import annotations

import pytest

from learner.fit import PolicyTrainConfig
from learner.optimiser import deepspeed_config, learning_rate_share


def test_learning_rate_warms_up_and_decays_to_its_final_share():
    config = PolicyTrainConfig(warmup_share=0.2, schedule="cosine", final_share=0.1)
    shares = [learning_rate_share(step, 10, config) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[6] == pytest.approx(0.1 + 0.9 * 0.5)  # halfway: cos(pi / 2) = 0
    linear = PolicyTrainConfig(schedule="linear")
    assert [learning_rate_share(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_keeps_the_optimiser_on_the_host(stage):
    config = PolicyTrainConfig(zero_stage=stage, offload=True)
    zero = deepspeed_config(config, 8, bfloat16=True)["zero_optimization"]
    assert zero == {"stage": stage, "offload_optimizer": {"device": "cpu"}}
