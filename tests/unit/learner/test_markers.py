"""A base model from elsewhere gets the step markers once, as single tokens."""

from __future__ import annotations

import pytest

from learner.markers import with_markers
from rollout.prompt import MARKERS
from tests.models import write_tiny_policy


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_missing_markers_become_single_tokens_and_old_logits_stay(tmp_path, architecture, tied):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_tiny_policy(
        tmp_path / "source", architecture=architecture, markers=MARKERS[:2], tied=tied
    )
    made = with_markers(source, tmp_path / "made")
    assert made == tmp_path / "made"
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert all(len(tokenizer(m, add_special_tokens=False).input_ids) == 1 for m in MARKERS)
    old_tokenizer = AutoTokenizer.from_pretrained(source)
    ids = old_tokenizer("2 + 2", return_tensors="pt").input_ids
    assert tokenizer("2 + 2").input_ids == ids[0].tolist()
    with torch.no_grad():
        old = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        new = AutoModelForCausalLM.from_pretrained(made)(ids).logits
    assert new.shape[-1] >= len(tokenizer)
    # Rows of padding that the source had beyond its tokenizer are the new tokens' now.
    assert torch.allclose(new[..., : len(old_tokenizer)], old[..., : len(old_tokenizer)])


@pytest.mark.parametrize("tied", [False, True])
def test_a_marker_begins_as_the_mean_of_its_pieces(tmp_path, tied):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_tiny_policy(tmp_path / "source", markers=(), tied=tied)
    made = with_markers(source, tmp_path / "made")
    pieces = AutoTokenizer.from_pretrained(source)(MARKERS[1]).input_ids
    marker = AutoTokenizer.from_pretrained(made).convert_tokens_to_ids(MARKERS[1])
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (source, made))
    assert len(pieces) > 1
    for name in ("get_input_embeddings", "get_output_embeddings"):
        rows, grown = getattr(old, name)().weight, getattr(new, name)().weight
        assert torch.allclose(grown[marker], rows[pieces].mean(0))


def test_model_that_has_all_markers_is_used_as_it_is(tmp_path):
    source = write_tiny_policy(tmp_path / "source")
    assert with_markers(source, tmp_path / "made") == source
    assert not (tmp_path / "made").exists()


def test_markers_are_added_once(tmp_path):
    source = write_tiny_policy(tmp_path / "source", markers=())
    made = with_markers(source, tmp_path / "made")
    before = (made / "tokenizer.json").stat().st_mtime_ns
    assert with_markers(source, tmp_path / "made") == made
    assert (made / "tokenizer.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".made")] == []
