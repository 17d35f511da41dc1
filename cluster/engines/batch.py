"""A pooling engine that values many texts in one step: vLLM's offline engine in a thread.

    evaluate --rows--> waiting --+
    evaluate --rows--> waiting --+--> all that wait now: one call of `LLM.encode` --> values
    evaluate --rows--> (next batch)

A value is one forward pass, so there is nothing to stream and no request that outlasts another:
what arrives while a batch runs is the next batch. Where requests come closer together than
`gather_s`, a batch waits so long for more of them, because a small batch costs nearly as much as a
large one; a lone search is not held up. Against vLLM's asynchronous engine, where each
text is a message of its own to another process and a request of eight texts is spread over two or
three steps, it costs a half of the CPU time for a small model; for a large one it is the same.

On CPU the engine runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), on a GPU in its own.

Not covered: cancelling rows that are in a batch; their values are thrown away.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class BatchEngine:
    """vLLM's `LLM` of a one-label classification model, for callers on one event loop."""

    def __init__(self, arguments: dict[str, Any], *, gather_s: float = 0.03) -> None:
        """Start the engine; takes seconds.

        Args:
            arguments: of vLLM's `LLM`.
            gather_s: longest wait for further requests.
        """
        self._gather_s = gather_s
        self._gap_s = math.inf
        """Mean time between two requests, the last ones weighing most."""
        self._arrived_s = -math.inf
        # One thread makes the engine and runs it: parts of torch's state belong to a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-engine")
        self._llm: Any = self._thread.submit(_make_engine, arguments).result()
        self._waiting: list[tuple[Sequence[list[int]], str, asyncio.Future[Any]]] = []
        self._running: asyncio.Task[None] | None = None
        self._error: BaseException | None = None

    @property
    def errored(self) -> bool:
        """A batch failed: what the engine would do next is not known."""
        return self._error is not None

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    async def outputs(self, rows: Sequence[list[int]], salt: str) -> tuple[list[float], int]:
        """The model's raw output of each row of token ids, and how many tokens were cached.

        Args:
            rows: none empty, none longer than the model's context.
            salt: of the prefix cache.
        Raises:
            Exception: what the engine raised, now or before.
        """
        if self._error is not None:
            raise RuntimeError(f"the engine failed before: {self._error}") from self._error
        if not rows:
            return [], 0
        answer = asyncio.get_running_loop().create_future()
        self._note_arrival(time.monotonic())
        self._waiting.append((rows, salt, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> Any:
        """Call a method of every worker, between two batches."""
        return await self._call(lambda: self._llm.collective_rpc(method, kwargs=kwargs))

    async def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        await self._call(self._llm.reset_prefix_cache)

    def shutdown(self) -> None:
        """End the engine; nothing may be asked of it any more."""
        self._thread.submit(self._llm.llm_engine.engine_core.shutdown).result()
        self._thread.shutdown()

    def _note_arrival(self, now_s: float) -> None:
        # Longer than that says only "not soon", and must not be remembered for long.
        gap_s = min(now_s - self._arrived_s, 4 * self._gather_s)
        self._gap_s = gap_s if math.isinf(self._gap_s) else 0.8 * self._gap_s + 0.2 * gap_s
        self._arrived_s = now_s

    async def _call(self, function: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _run(self) -> None:
        while self._waiting:
            if self._gap_s < self._gather_s:
                await asyncio.sleep(self._gather_s)
            batch, self._waiting = self._waiting, []
            batch = [entry for entry in batch if not entry[2].done()]
            inputs = [(row, salt) for rows, salt, _ in batch for row in rows]
            try:
                found = iter(await self._call(lambda inputs=inputs: self._encode(inputs)))
            except Exception as error:
                self._error = error
                for _, _, answer in [*batch, *self._waiting]:
                    if not answer.done():
                        answer.set_exception(RuntimeError(f"the engine failed: {error}"))
                self._waiting = []
                return
            for rows, _, answer in batch:
                own = [next(found) for _ in rows]
                if not answer.done():
                    answer.set_result(([number for number, _ in own], sum(n for _, n in own)))

    def _encode(self, inputs: Sequence[tuple[list[int], str]]) -> list[tuple[float, int]]:
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": row, "cache_salt": salt} for row, salt in inputs]
        outputs = self._llm.encode(
            prompts,
            pooling_params=PoolingParams(task="classify", use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [(float(o.outputs.data.squeeze()), o.num_cached_tokens or 0) for o in outputs]


def _make_engine(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)
