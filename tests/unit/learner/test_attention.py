from __future__ import annotations

import math

import pytest
import torch

from learner import attention
from learner.attention import Layout, choose_backend, documents, packed_attention, trees

LAYOUT = trees([(40, (20, 30)), (0, (17,)), (5, (9, 1, 12))])
TOTAL = sum(LAYOUT.lengths)


def inputs(heads: int = 4, key_heads: int = 2, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, TOTAL, size, generator=generator, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]


def seen(layout: Layout, window: int | None = None) -> torch.Tensor:
    """[T, T] bool, worked out token by token."""
    starts = [sum(layout.lengths[:n]) for n in range(len(layout.spans))]
    table = torch.zeros(sum(layout.lengths), sum(layout.lengths), dtype=torch.bool)
    for start, span in zip(starts, layout.spans, strict=True):
        own = [starts[span.parent] + i for i in range(span.prefix)]
        own += [start + i for i in range(span.length)]
        for i in range(span.length):
            place = span.prefix + i
            first = 0 if window is None else max(0, place - window + 1)
            table[start + i, own[first : place + 1]] = True
    return table


def reference(query, key, value, table):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    weights = weights.masked_fill(~table, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 7])
def test_packed_attention_equals_masked_attention_with_its_gradients(window):
    module = torch.nn.Module()
    ours, theirs = inputs(), inputs()
    found, _ = packed_attention(module, *ours, None, layout=LAYOUT, sliding_window=window)
    wanted = reference(*theirs, seen(LAYOUT, window))

    assert torch.allclose(found, wanted, atol=1e-5)
    (found**2).sum().backward()
    (wanted**2).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-4)


def test_branches_are_sequences_of_their_own_for_flash(monkeypatch):
    """What the kernel is asked for, computed by plain attention in its place."""

    def kernel(query, key, value, query_starts, key_starts, *longest, **settings):
        assert settings == {"scaling": None, "dropout": 0.0, "window_size": (-1, 0)}
        outputs = []
        for number in range(len(query_starts) - 1):
            q = query[query_starts[number] : query_starts[number + 1]]
            k = key[key_starts[number] : key_starts[number + 1]]
            v = value[key_starts[number] : key_starts[number + 1]]
            table = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
            outputs.append(reference(*rows, table)[0])
        return torch.cat(outputs)

    monkeypatch.setattr(attention, "_variable_length_kernel", lambda: kernel)
    ours, theirs = inputs(), inputs()
    found, _ = packed_attention(torch.nn.Module(), *ours, None, layout=LAYOUT, backend="flash")
    wanted, _ = packed_attention(torch.nn.Module(), *theirs, None, layout=LAYOUT)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("layout", [LAYOUT, documents([60, 1, 90])], ids=["trees", "documents"])
def test_flex_equals_sdpa_within_a_thousandth(layout, window):
    # forward only: FlexAttention has no backward pass on a CPU
    total = sum(layout.lengths)
    row = [tensor.detach()[:, :, :total] for tensor in inputs()]
    row = [torch.cat((t, t), dim=2)[:, :, :total] for t in row]
    module = torch.nn.Module()
    found, _ = packed_attention(
        module, *row, None, layout=layout, backend="flex", sliding_window=window, scaling=0.5
    )
    wanted, _ = packed_attention(
        module, *row, None, layout=layout, sliding_window=window, scaling=0.5
    )
    assert torch.allclose(found, wanted, atol=1e-3)


def test_flex_computes_no_block_that_nobody_sees():
    layout = documents([128] * 8)
    mask = layout.block_mask(None, torch.device("cpu"))
    assert mask.sparsity() == pytest.approx(100 * (1 - 8 / 64))
    assert layout.block_mask(None, torch.device("cpu")) is mask


def test_attended_pairs_are_those_of_the_mask():
    assert LAYOUT.num_attended == int(seen(LAYOUT).sum())
    assert documents([3, 4]).num_attended == 6 + 10


def test_the_fastest_backend_that_is_right_is_taken(monkeypatch):
    shape = {"num_heads": 4, "num_key_heads": 2, "head_size": 8}
    gpu, half = torch.device("cuda"), torch.bfloat16
    wrong: dict[str, str] = {}
    monkeypatch.setattr(attention, "_disagreement", lambda backend, *given: wrong.get(backend))
    assert choose_backend("auto", gpu, half, **shape) == "flash"
    assert choose_backend("auto", gpu, torch.float32, **shape) == "flex"
    assert choose_backend("flex", gpu, half, **shape) == "flex"
    wrong["flash"] = "no such kernel"
    assert choose_backend("auto", gpu, half, **shape) == "flex"
    with pytest.raises(ValueError, match="attention = flash cannot be used: no such kernel"):
        choose_backend("flash", gpu, half, **shape)
    wrong["flex"] = "no compiler"
    assert choose_backend("auto", gpu, half, **shape) == "sdpa"
    assert choose_backend("sdpa", gpu, half, **shape) == "sdpa"


def test_flash_is_not_taken_where_it_cannot_run():
    shape = {"num_heads": 4, "num_key_heads": 2, "head_size": 8}
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32, **shape) == "sdpa"
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_backend("flash", cpu, torch.bfloat16, **shape)
    with pytest.raises(ValueError, match="attention = flex cannot be used: it needs a GPU"):
        choose_backend("flex", cpu, torch.float32, **shape)


def test_attention_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="without a layout"):
        packed_attention(torch.nn.Module(), *inputs(), None)
