from __future__ import annotations

import pytest

from learner.fit import PPM_PRESETS, PolicyTrainConfig, PreferenceTrainConfig
from learner.optimiser import learning_rate_share


def test_defaults_are_the_papers_and_presets_the_released_scripts():
    policy, ppm = PolicyTrainConfig(), PreferenceTrainConfig()
    assert (policy.num_epochs, policy.batch_examples, policy.learning_rate) == (2.0, 128, 7e-6)
    assert (policy.max_sequence_tokens, policy.schedule, policy.warmup_share) == (4096, "linear", 0)
    assert (ppm.num_epochs, ppm.batch_examples, ppm.learning_rate) == (1.0, 512, 7e-6)
    assert (ppm.objective, ppm.loss_on) == ("pairwise", "value")  # tanh in the loss
    assert PPM_PRESETS["paper"] == ppm
    released = PPM_PRESETS["released"]
    assert (released.num_epochs, released.dropout, released.max_sequence_tokens) == (2.0, 0.1, 2048)
    assert (released.loss_on, released.logit_scale) == ("logit", 5.0)  # serves tanh(r / 5)
    phi = PolicyTrainConfig(schedule="cosine", learning_rate=5e-6)
    assert learning_rate_share(50, 100, phi) == pytest.approx(0.5)


def test_config_refuses_offload_without_zero_and_batches_without_limit():
    with pytest.raises(ValueError, match="offload needs zero_stage"):
        PolicyTrainConfig(offload=True, zero_stage=0)
    with pytest.raises(ValueError, match="set batch_tokens, batch_examples or both"):
        PolicyTrainConfig(batch_examples=None)
