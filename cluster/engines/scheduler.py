"""What this project adds to vLLM's scheduler, inside the engine process: whole answers only.

vLLM 0.32 sends every token of every sequence to the process that asked, one message a step, also
where only the finished completion is wanted; there each is decoded and accounted for. With a small
model on few cores that costs a third as much CPU time as the model itself. `WholeAnswers` keeps the
tokens of such a sequence in the engine process and sends them when it ends.

    step 1: a b c    step 2: a b c    step 3: a c (b ended)        vLLM sends 8 pieces,
                                                   `-> b           this sends 1 so far

It is done for sequences whose text nobody watches for stop strings while they grow
(`detokenize=False`) and whose output is asked for once (`FINAL_ONLY`).

Not covered: vLLM's asynchronous scheduling (its default on GPUs), which needs another base class.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler

from cluster.engines.outputs import HeldOutputs

STATS_INTERVAL_S = 0.2
"""How often the engine tells how full it is."""


class WholeAnswers(Scheduler):
    """vLLM's scheduler, sending whole completions; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outputs = HeldOutputs()
        self._stats_sent_s = 0.0

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, but not at every step: each would be a message of its own.

        The last step before the engine is idle is told of, or it would seem busy for ever.
        """
        now_s = time.monotonic()
        if self.running and now_s - self._stats_sent_s < STATS_INTERVAL_S:
            return None
        self._stats_sent_s = now_s
        return super().make_stats(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's, without the pieces of sequences that go on."""
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        for client, message in list(by_client.items()):
            message.outputs = self._outputs.take(message.outputs, self._wants_whole)
            if not (message.outputs or message.finished_requests or message.scheduler_stats):
                del by_client[client]
        return by_client

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """As vLLM's: ends requests from outside."""
        ended = super().finish_requests(request_ids, finished_status)
        self._outputs.forget(request.request_id for request in ended)
        return ended

    def _wants_whole(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        params = request.sampling_params if request is not None else None
        return (
            params is not None
            and not params.detokenize
            and params.prompt_logprobs is None
            and params.output_kind is RequestOutputKind.FINAL_ONLY
        )
