from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from learner.preference_model import load_preference_model, new_preference_model, values
from tests.models import Architecture, write_byte_tokenizer, write_tiny_policy

TEXTS = [
    "<|user|>How many?<|assistant|><code>\na = 1\n<end_of_step>",
    "<|user|>x",
    "<|user|>long" * 4,
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


def new(policy, seed=0):
    return new_preference_model(policy, seed=seed, dtype=torch.float32).eval()


def test_new_head_prefers_nothing_and_depends_on_the_seed(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    found = values(new(policy), tokenizer, TEXTS)
    assert max(abs(v) for v in found) < 0.1
    assert found == values(new(policy), tokenizer, TEXTS)
    assert found != values(new(policy, seed=1), tokenizer, TEXTS)


def test_trunk_is_the_policys(policy):
    from transformers import AutoModelForCausalLM

    trunk = AutoModelForCausalLM.from_pretrained(policy).model.state_dict()
    for name, weight in new(policy).model.state_dict().items():
        assert torch.equal(weight, trunk[name]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_saved_model_gives_transformers_the_same_values(tmp_path, architecture: Architecture):
    policy = write_tiny_policy(tmp_path / "policy", architecture=architecture)
    model = new(policy)
    with torch.no_grad():
        model.score.weight.mul_(200.0)
    model.save_pretrained(tmp_path / "ppm")
    write_byte_tokenizer(tmp_path / "ppm")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppm")
    ours = values(load_preference_model(tmp_path / "ppm"), tokenizer, TEXTS)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppm").eval()
    with torch.no_grad():
        theirs = [
            torch.tanh(plain(**tokenizer(text, return_tensors="pt")).logits).item()
            for text in TEXTS
        ]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert max(abs(v) for v in ours) > 0.05

    # the one of the next round goes on with all of it
    assert values(new(tmp_path / "ppm", seed=7), tokenizer, TEXTS) == pytest.approx(ours, abs=1e-6)
