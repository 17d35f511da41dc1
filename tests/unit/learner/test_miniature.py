"""The miniature's tokenizer and base model: what is served must be what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from learner.miniature import (
    DIGIT_TOKENS,
    END_OF_TEXT,
    PADDING,
    build_tokenizer,
    write_base_model,
)
from rollout.problems.miniature import generate
from rollout.prompt import MARKERS, SHORT_TEMPLATE, render_question

MINIATURE = generate(seed=0, num_demonstrations=180, num_train=360, num_test=90)
TEXTS = [
    *(problem.text for problem in (*MINIATURE.demonstrations, *MINIATURE.train)),
    *(problem.solution for problem in MINIATURE.demonstrations),
]
HELD_OUT = [
    render_question(problem.text, SHORT_TEMPLATE) + problem.solution for problem in MINIATURE.test
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"), seed=0, texts=TEXTS)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in ids(tokenizer, text)]


def test_saved_tokenizer_loads_with_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, base_model: Path
) -> None:
    loaded = AutoTokenizer.from_pretrained(base_model)
    for text in [*HELD_OUT, "There are 63 apples, x_1 = -07; 12345678 + 3.50\n\n  y² = é漢"]:
        assert ids(loaded, text) == ids(tokenizer, text)


def test_no_token_is_added_before_or_after_a_text(base_model: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(base_model)
    assert loaded("7")["input_ids"] == [loaded.convert_tokens_to_ids("7")]
    assert loaded.bos_token is None
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, PADDING)


def test_problems_and_solutions_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in HELD_OUT:
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_unicode_round_trips(text: str) -> None:
    tokenizer = _session_tokenizer()
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


def test_every_digit_pair_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(DIGIT_TOKENS) == 110
    for number in DIGIT_TOKENS:
        assert pieces(tokenizer, number) == [number]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There are 63 apples", ["There", " are ", "63", " apples"]),
        ("a = 63 * 7", ["a", " = ", "63", " * ", "7"]),
        ("has 137 more", [" more"]),
        ("137", ["13", "7"]),
        ("2005", ["20", "05"]),
        ("<end_of_step>\n# Step 12: The", ["<end_of_step>", "\n# Step ", "12", ":", " The"]),
    ],
)
def test_numbers_read_the_same_in_prose_and_code(
    tokenizer: PreTrainedTokenizerFast, text: str, expected: list[str]
) -> None:
    assert pieces(tokenizer, text)[-len(expected) :] == expected


def test_no_number_token_carries_a_space_or_letter(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in tokenizer.get_vocab():
        if token not in tokenizer.all_special_tokens and any(c in "0123456789" for c in token):
            assert token in DIGIT_TOKENS


def test_step_markers_are_single_special_tokens(base_model: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(base_model)
    for marker in (*MARKERS, END_OF_TEXT, PADDING):
        (token,) = loaded(f"{marker}")["input_ids"]
        assert loaded.convert_ids_to_tokens(token) == marker
        assert marker in loaded.all_special_tokens
        assert loaded.decode([token], skip_special_tokens=True) == ""


def test_a_marker_next_to_text_stays_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, "7\n<end_of_code>\n<output>7<end_of_output>") == [
        "7", "\n", "<end_of_code>", "\n", "<output>", "7", "<end_of_output>",
    ]  # fmt: skip


def test_a_vocabulary_without_room_for_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=300 leaves no room for \d+ number tokens"):
        build_tokenizer(TEXTS[:20], vocab_size=300)


def test_a_tokenizer_needs_texts() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        build_tokenizer([])


def test_base_model_is_a_float32_llama_with_the_tokenizers_vocabulary(base_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    assert model.config.model_type == "llama"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_base_model_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    def weights(name: str, *, seed: int, global_seed: int) -> bytes:
        torch.manual_seed(global_seed)
        path = write_base_model(tmp_path / name, seed=seed, texts=TEXTS[:60])
        return (path / "model.safetensors").read_bytes()

    first = weights("a", seed=1, global_seed=10)
    assert weights("b", seed=1, global_seed=11) == first
    assert weights("c", seed=2, global_seed=10) != first


def test_first_layer_heads_attend_to_previous_positions(base_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokens = tokenizer(HELD_OUT[0], return_tensors="pt")["input_ids"][:, :40]
    attention = model(tokens, output_attentions=True).attentions[0][0]  # [heads, T, T]
    for head in range(4):
        assert attention[head, 20:].argmax(-1).tolist() == [
            position - head - 1 for position in range(20, tokens.shape[1])
        ]


def test_an_induction_head_looks_at_what_followed_the_same_token_before(base_model: Path) -> None:
    """In "A B C ... A B C ..." the second A attends to the first B more than by chance."""
    model = AutoModelForCausalLM.from_pretrained(base_model, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(32, 400, generator=generator).argsort(-1)[:, :24] + 300  # [32, 24]
    tokens = torch.cat([half, half], dim=-1)
    with torch.no_grad():
        attention = model(tokens, output_attentions=True).attentions[1]  # [32, heads, 48, 48]
    times_uniform = [
        sum(attention[:, head, 24 + i, i + 1].mean().item() * (25 + i) for i in range(23)) / 23
        for head in range(4)
    ]
    assert times_uniform[0] > 3
    assert max(times_uniform[1:]) < 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 1}, "num_layers must be >= 2"),
        ({"hidden_size": 100}, "multiple of 2 \\* num_heads = 8, got 100"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads = 3, got 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_base_model(tmp_path, seed=0, texts=TEXTS[:10], **sizes)


_TOKENIZERS: list[PreTrainedTokenizerFast] = []


def _session_tokenizer() -> PreTrainedTokenizerFast:
    if not _TOKENIZERS:
        _TOKENIZERS.append(build_tokenizer(TEXTS))
    return _TOKENIZERS[0]
