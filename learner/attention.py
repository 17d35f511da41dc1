"""Attention over packed rows: examples side by side that do not see each other.

A row is one sequence of T tokens without padding. A `Layout` says what is where:

    document      [ tokens ]                       causal within itself
    tree          [ prefix + branch 0 ][ branch 1 ][ branch 2 ]
                  every branch sees the prefix and, causally, itself

so the candidates of a node cost one prefix between them. Position ids restart with each example
and go on from the prefix in each branch; with them a packed row computes what its texts would
compute alone.

One code path: `packed_attention` is registered with transformers under `PACKED`, the model passes
the layout through, and a backend does the work:

    flash   on a GPU in half precision: variable-length FlashAttention, of the flash_attn package
            if it is there, else torch's own; branches gather the keys of their prefix
    flex    on a GPU in any precision: torch's FlexAttention, compiled, one call a row with a block
            mask made of the spans (blocks that nobody sees are not computed)
    sdpa    anywhere: torch's scaled_dot_product_attention, one call a span

`choose_backend` takes the first of flash, flex and sdpa whose result equals sdpa's on a small row.

Not covered: dropout with flex or torch's own flash. On a CPU flex runs uncompiled and forward only,
which is what its equality with sdpa is tested by.

Shapes: T tokens of a row, H query heads, K key heads, D head size, S spans.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

T = TypeVar("T")

Backend = Literal["sdpa", "flex", "flash"]

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [1, H, T, D], key and value [1, K, T, D]."""

PACKED = "rstar_packed"
"""Name of the attention in transformers' registry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring tokens that attend causally to each other, and wholly to a prefix."""

    length: int
    parent: int = -1
    """Number of the span that begins with the prefix; -1: there is none."""
    prefix: int = 0
    """Tokens at the beginning of the parent that are seen."""


def _once(derive: Callable[..., T]) -> Callable[..., T]:
    """A method of a layout whose result is kept: every layer of the model asks for the same."""

    @functools.wraps(derive)
    def found(layout: Layout, *arguments: Any) -> T:
        key = (derive.__name__, *arguments)
        if key not in layout.derived:
            layout.derived[key] = derive(layout, *arguments)
        return layout.derived[key]

    return found


@dataclass(slots=True, kw_only=True)
class Layout:
    """What a packed row holds."""

    spans: tuple[Span, ...]
    """In the order of the row, which they fill."""
    derived: dict[Any, Any] = field(default_factory=dict)
    """What the backends have asked for."""

    @property
    def lengths(self) -> list[int]:
        return [span.length for span in self.spans]

    @property
    def num_attended(self) -> int:
        """Pairs of a token and one it sees, itself included."""
        return sum(s.length * (s.length + 1) // 2 + s.length * s.prefix for s in self.spans)

    @_once
    def mask(
        self, number: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """[1, 1, length, prefix + length] additive mask of a span; 0 or -inf."""
        span = self.spans[number]
        rows = torch.arange(span.length, device=device)[:, None] + span.prefix
        columns = torch.arange(span.prefix + span.length, device=device)[None, :]
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        found = torch.zeros(seen.shape, dtype=dtype, device=device)
        return found.masked_fill_(~seen, -math.inf)[None, None]

    @_once
    def sequences(self, device: torch.device) -> _Sequences:
        """The spans as variable-length FlashAttention wants them."""
        starts = [0, *itertools.accumulate(self.lengths)]
        key_lengths = [span.prefix + span.length for span in self.spans]
        key_starts = [0, *itertools.accumulate(key_lengths)]
        keys = None
        if any(span.prefix for span in self.spans):
            pieces = []
            for start, span in zip(starts, self.spans, strict=False):
                pieces.append(starts[span.parent] + np.arange(span.prefix))
                pieces.append(start + np.arange(span.length))
            keys = torch.from_numpy(np.concatenate(pieces)).to(device)
        return _Sequences(
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            key_starts=torch.tensor(key_starts, dtype=torch.int32, device=device),
            longest_query=max(self.lengths),
            longest_key=max(key_lengths),
            keys=keys,
        )

    @_once
    def places(self, device: torch.device) -> _Places:
        """What the mask of a whole row is made of, token by token."""
        starts = [0, *itertools.accumulate(self.lengths)]
        rows = np.empty((4, starts[-1]), dtype=np.int32)
        for number, (start, span) in enumerate(zip(starts, self.spans, strict=False)):
            own = slice(start, start + span.length)
            rows[0, own] = number
            rows[1, own] = span.prefix + np.arange(span.length)
            rows[2, own] = starts[span.parent] if span.prefix else 0
            rows[3, own] = rows[2, own] + span.prefix
        return _Places(*torch.from_numpy(rows).to(device))

    @_once
    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """The row as FlexAttention's BlockMask."""
        # Tensors of the closure itself are inputs to a compiled mask: other rows reuse it.
        places = self.places(device)
        span, position = places.span, places.position
        start, stop = places.prefix_start, places.prefix_stop

        def sees(
            batch: torch.Tensor, head: torch.Tensor, at: torch.Tensor, other: torch.Tensor
        ) -> torch.Tensor:
            own = (span[at] == span[other]) & (other <= at)
            seen = own | ((start[at] <= other) & (other < stop[at]))
            if window is not None:
                seen = seen & (position[other] > position[at] - window)
            return seen

        total = sum(self.lengths)
        build = _flex_function("create_block_mask", device.type)
        return build(sees, None, None, total, total, device=device)


@dataclass(frozen=True, slots=True)
class _Places:
    """[T] int32 each."""

    span: torch.Tensor
    """Number of the span a token is in."""
    position: torch.Tensor
    """Position id."""
    prefix_start: torch.Tensor
    """Where in the row the prefix begins that its span sees."""
    prefix_stop: torch.Tensor
    """Where it ends; not after `prefix_start`: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequences:
    query_starts: torch.Tensor
    """[S + 1] int32."""
    key_starts: torch.Tensor
    """[S + 1] int32."""
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None
    """Row positions of all spans' keys, in order; None: the row itself."""


def documents(lengths: Sequence[int]) -> Layout:
    """A row of texts that share nothing."""
    return Layout(spans=tuple(Span(length=length) for length in lengths))


def trees(examples: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """A row of trees, each a shared prefix and its branches: (prefix length, branch lengths)."""
    spans: list[Span] = []
    for prefix, branches in examples:
        parent = len(spans)
        spans.append(Span(length=prefix + branches[0]))
        spans += [Span(length=branch, parent=parent, prefix=prefix) for branch in branches[1:]]
    return Layout(spans=tuple(spans))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    backend: Backend = "sdpa",
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row, as transformers calls it.

    Args:
        query: [1, H, T, D]; key and value: [1, K, T, D].
        attention_mask: not used; the layout says it all.
    Returns:
        [1, T, H, D] and None for the weights.
    """
    if layout is None:
        raise ValueError("packed attention was called without a layout")
    longest = max(span.prefix + span.length for span in layout.spans)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    run = {"sdpa": _sdpa, "flex": _flex, "flash": _flash}[backend]
    return run((query, key, value), layout, scaling, dropout, window), None


def _sdpa(
    rows: Rows, layout: Layout, scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    query, key, value = rows
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # `split` gives the backward pass one concatenation; slices would each fill a whole row.
    queries = query.split(layout.lengths, dim=2)
    keys = key.split(layout.lengths, dim=2)
    values = value.split(layout.lengths, dim=2)
    outputs = []
    for number, span in enumerate(layout.spans):
        own_keys, own_values = keys[number], values[number]
        mask = None
        if span.prefix:
            own_keys = torch.cat((keys[span.parent][:, :, : span.prefix], own_keys), dim=2)
            own_values = torch.cat((values[span.parent][:, :, : span.prefix], own_values), dim=2)
        if span.prefix or window is not None:
            mask = layout.mask(number, window, query.dtype, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[number],
                own_keys,
                own_values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _flex(
    rows: Rows, layout: Layout, scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    query, key, value = rows
    if dropout:
        raise ValueError("FlexAttention has no dropout; use attention: sdpa")
    output = _flex_function("flex_attention", query.device.type)(
        query,
        key,
        value,
        block_mask=layout.block_mask(window, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@functools.cache
def _flex_function(name: str, device: str) -> Any:
    """One of FlexAttention's; compiled but on a CPU, where that takes a C++ compiler and minutes.

    Compiled, the mask builder never holds the T x T table.
    """
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    # Rows differ in length: with dynamic shapes one compilation serves them all.
    return function if device == "cpu" else torch.compile(function, dynamic=True)


def _flash(
    rows: Rows, layout: Layout, scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    places = layout.sequences(rows[0].device)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in rows)
    if places.keys is not None:
        keys, values = keys.index_select(0, places.keys), values.index_select(0, places.keys)
    output = _variable_length_kernel()(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        places.query_starts,
        places.key_starts,
        places.longest_query,
        places.longest_key,
        scaling=scaling,
        dropout=dropout,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output[None]


@functools.cache
def _variable_length_kernel() -> Any:
    """The variable-length kernel that is there; both align the causal edge to the last key.

    Raises:
        ImportError: neither flash_attn nor torch's own can be imported.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        def with_torch(
            *rows: Any, scaling: float | None, dropout: float, window_size: tuple[int, int]
        ) -> torch.Tensor:
            if dropout:
                raise ValueError("torch's variable-length attention has no dropout; use sdpa")
            found = varlen_attn(*rows, scale=scaling, window_size=window_size, enable_gqa=True)
            assert isinstance(found, torch.Tensor)
            return found

        return with_torch

    def with_package(
        *rows: Any, scaling: float | None, dropout: float, window_size: tuple[int, int]
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            *rows, dropout_p=dropout, softmax_scale=scaling, causal=True, window_size=window_size
        )

    return with_package


def use_packed_attention(model: Any) -> None:
    """Make a transformers model attend by layout; its forward pass then needs `layout=`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


def choose_backend(
    wanted: Literal["auto", "sdpa", "flex", "flash"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    num_key_heads: int,
    head_size: int,
) -> Backend:
    """The attention backend for a model on a device: the fastest that is right there.

    Raises:
        ValueError: one is asked for by name and cannot run there.
    """
    candidates: tuple[Backend, ...] = ("flash", "flex") if wanted == "auto" else ()
    if wanted in ("flash", "flex"):
        candidates = (wanted,)
    for backend in candidates:
        problem = _why_not(backend, device, dtype, (num_heads, num_key_heads, head_size))
        if problem is None:
            return backend
        if wanted != "auto":
            raise ValueError(f"attention = {backend} cannot be used: {problem}")
        if device.type == "cuda":
            logger.warning("attention: not %s, because %s", backend, problem)
    return "sdpa"


def _why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> str | None:
    """Why a backend cannot train a model on a device; None: it can."""
    if device.type != "cuda":
        return f"it needs a GPU, the model is on {device.type}"
    if backend == "flash" and dtype not in (torch.float16, torch.bfloat16):
        return f"it needs half precision, the model is in {dtype}"
    try:
        return _disagreement(backend, device, dtype, shape)
    except Exception as error:  # a compiler or a driver may raise anything, and sdpa is there
        return f"{type(error).__name__}: {error}"


def _disagreement(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> str | None:
    """How a backend differs from sdpa on a small row, values and gradients; None: not.

    Args:
        shape: H, K and D.
    """
    num_heads, num_key_heads, head_size = shape
    layout = trees([(40, (20, 30)), (0, (17,)), (5, (9, 1, 12))])
    total = sum(layout.lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, total, head_size) for heads in (num_heads, num_key_heads, num_key_heads)]
    found = []
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    run = _flash if backend == "flash" else _flex
    for compute, kind in ((_sdpa, torch.float32), (run, dtype)):
        own = [tensor.to(device, kind).requires_grad_() for tensor in inputs]
        output = compute((own[0], own[1], own[2]), layout, None, 0.0, None)
        (output.float() ** 2).sum().backward()
        found.append(
            [output.detach().float(), *(t.grad.float() for t in own if t.grad is not None)]
        )
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        error = float((ours - theirs).norm() / ours.norm())
        if not error < 0.03:
            return f"its {name} differs by {error:.3f} from sdpa's on a test row"
    return None
