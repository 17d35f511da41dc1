"""Policy and preference replicas: one vLLM engine each, behind the Protocols of the search.

    actor process                                        engine core (vLLM): a process, on a
    generate --token ids--> AsyncLLM ------------------> CPU a thread of the actor; continuous
    evaluate --token ids--> BatchEngine ---------------> batching, prefix cache
            ^                     |                      lives for the whole run
            +--- text, values <---+

A replica is an ordinary class, whose life is in `lifecycle`; Ray is one line at the foot. `vllm` is
imported when the engine is started. What it is asked, and how text comes of its tokens, is in
`arguments`; whatever the way, the text is cut behind the earliest stop string in it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import ray

from cluster.engines.arguments import decode_continuation, plan_stops, sampling_arguments
from cluster.engines.batch import BatchEngine
from cluster.engines.lifecycle import Replica
from cluster.engines.model_check import (
    ModelInfo,
    check_policy_checkpoint,
    check_preference_checkpoint,
)
from cluster.engines.outputs import CachedPrefixes
from rollout.engine import (
    Completion,
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    LogprobReply,
    LogprobRequest,
    cut_completion,
)
from rollout.prompt import MARKERS

_REPEATED_TOKENS = 32
"""Longest passage whose repetition is looked for."""

_FINGERPRINT_TEXTS = (
    "<|user|>There are 12 boxes with 5 pens each. How many pens are there?<|assistant|><code>",
    "<|user|>Solve 3*x + 4 = 19 for x.<|assistant|><code>\n# Step 1: import\nimport sympy\n",
)


class PolicyReplica(Replica):
    """Serves a policy: `rollout.engine.PolicyEngine`."""

    _runner = "generate"
    _version_id = "policy_version"

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Sample continuations; see `PolicyEngine`.

        A prompt without room for one token gets empty completions that say so; `max_tokens` is
        cut to the room there is. With a seed, a request gives the same text again, as far as
        floating-point sums in another batch allow.

        Raises:
            EngineError: the engine failed, or did not answer in time.
        """
        async with self._answering(request.num_candidates) as answering:
            reply = await self._generate(request)
            answering.length = max(completion.num_tokens for completion in reply.completions)
            return reply

    async def _generate(self, request: GenerationRequest) -> GenerationReply:
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

        prompt_ids = self._tokenizer.encode(request.prompt)
        room = self._max_model_len - len(prompt_ids)
        if room < 1:
            self._stats.too_long += 1
            empty = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
            return GenerationReply(
                completions=(empty,) * request.num_candidates,
                prompt_tokens=len(prompt_ids),
                policy_version=self._version,
            )
        stops = plan_stops(request.stop, self._special_tokens)
        params = SamplingParams(
            **sampling_arguments(request, stops, room=room, logprobs=self._config.logprobs),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self._config.max_repeats is not None:
            params.repetition_detection = RepetitionDetectionParams(
                max_pattern_size=_REPEATED_TOKENS, min_count=self._config.max_repeats
            )
        output = await self._run(prompt_ids, params)
        completions = tuple(
            self._read(choice, request, prompt_ids, bool(stops.strings))
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        )
        cached = output.num_cached_tokens
        self._stats.prompt_tokens += len(prompt_ids)
        self._stats.cached_tokens += cached
        self._stats.generated_tokens += sum(completion.num_tokens for completion in completions)
        if len(completions) < request.num_candidates:
            completions *= request.num_candidates
        return GenerationReply(
            completions=completions,
            prompt_tokens=len(prompt_ids),
            cached_tokens=cached,
            policy_version=self._version,
        )

    async def logprobs(self, request: LogprobRequest) -> LogprobReply:
        """How likely the policy is to write given texts; see `LogprobRequest`.

        Raises:
            EngineError: the engine failed, or did not answer in time.
        """
        from learner.batch import tokenise_texts

        async with self._answering(len(request.texts)):
            texts = tokenise_texts(self._tokenizer, request.texts, end_of_sequence=False)
            values = await asyncio.gather(*map(self._logprob, texts))
            self._stats.prompt_tokens += sum(text.length for text in texts)
            return LogprobReply(values=tuple(values), policy_version=self._version)

    async def _logprob(self, text: Any) -> float:
        """Of a `learner.batch.TokenisedText`."""
        if text.length >= self._max_model_len:
            self._stats.too_long += 1
            return math.nan
        told = await self._prompt_logprobs(text.ids.tolist())
        return sum(value for value, trained in zip(told, text.trained[1:], strict=True) if trained)

    async def _prompt_logprobs(self, prompt_ids: list[int]) -> list[float]:
        """Of each token but the first, given those before it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(prompt_ids, params)
        return [
            entry[token].logprob
            for token, entry in zip(prompt_ids, output.prompt_logprobs, strict=True)
            if entry is not None
        ]

    def _read(
        self, choice: Any, request: GenerationRequest, prompt_ids: list[int], detokenized: bool
    ) -> Completion:
        if choice.finish_reason not in ("stop", "length", "repetition"):
            raise EngineError(f"completion ended by {choice.finish_reason!r}")
        token_ids = list(choice.token_ids)
        text = (
            choice.text
            if detokenized
            else decode_continuation(self._tokenizer, prompt_ids, token_ids)
        )
        stopped = choice.finish_reason == "stop"
        completion = cut_completion(
            text,
            stop=request.stop,
            stopped=stopped,
            end_of_sequence=self._tokenizer.decode(token_ids[-1:], skip_special_tokens=False)
            if stopped and not text.endswith(request.stop)
            else "",
            num_tokens=len(token_ids),
            logprob=choice.cumulative_logprob if self._config.logprobs else None,
        )
        if choice.finish_reason == "repetition" and completion.stop_string is None:
            return replace(completion, finish=FinishReason.REPETITION)
        return completion

    async def _run(self, prompt_ids: list[int], params: Any) -> Any:
        """The one output of a request that asks for the final one only."""
        # What vLLM's own renderer makes of token ids; given so, it does no work of its own. The
        # salt keeps what other weights wrote into the prefix cache from ever being found.
        prompt = {"type": "token", "prompt_token_ids": prompt_ids, "cache_salt": self._salt}
        request_id = f"{self._name}-{next(self._request_numbers)}"
        last = None
        try:
            # To the end: leaving the loop early would abort the request once more.
            async for output in self._engine.generate(prompt, params, request_id):
                last = output
        finally:
            cached_tokens = self._prefixes.take(request_id)
        if last is None:
            raise EngineError("the engine ended a request without an answer")
        last.num_cached_tokens = cached_tokens
        return last

    @cached_property
    def _special_tokens(self) -> Mapping[str, int]:
        return dict(self._tokenizer.get_added_vocab())

    def _make_engine(self, arguments: dict[str, Any]) -> Any:
        from cluster.engines.async_engine import gauge_of, make_async_engine

        engine = make_async_engine(arguments, in_process=self._in_process)
        self._prefixes = CachedPrefixes(engine.output_processor)
        self._request_numbers = itertools.count(1)
        self._gauge = gauge_of(engine)
        return engine

    def _check_model(self, path: str) -> ModelInfo:
        return check_policy_checkpoint(path, markers=MARKERS if self._config.step_markers else ())

    async def _take_fingerprint(self) -> tuple[float, ...]:
        numbers: list[float] = []
        for text in _FINGERPRINT_TEXTS:
            prompt_ids = self._tokenizer.encode(text)[: self._max_model_len - 1]
            numbers += await self._prompt_logprobs(prompt_ids)
        return tuple(numbers)

    def _take_reference(self, path: str) -> tuple[float, ...]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        numbers: list[float] = []
        for text in _FINGERPRINT_TEXTS:
            ids = torch.tensor([self._tokenizer.encode(text)[: self._max_model_len - 1]])
            with torch.no_grad():
                logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            numbers += logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return tuple(numbers)


class PreferenceReplica(Replica):
    """Serves a process preference model: `rollout.engine.PreferenceEngine`."""

    _runner = "pooling"
    _version_id = "ppm_version"

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """Value each text in (-1, 1); see `PreferenceEngine`.

        A text longer than the model's context gets NaN: the value of a text the model was not
        shown whole would be of another text.

        Raises:
            EngineError: the engine failed, or did not answer in time.
        """
        async with self._answering(len(request.texts)):
            rows = [self._tokenizer.encode(text) for text in request.texts]
            values = await self._values(rows)
            num_tokens = sum(len(row) for row in rows)
            self._stats.prompt_tokens += num_tokens
            return EvaluationReply(
                values=tuple(values), num_tokens=num_tokens, preference_version=self._version
            )

    async def _values(self, rows: Sequence[list[int]]) -> list[float]:
        fits = [0 < len(row) <= self._max_model_len for row in rows]
        self._stats.too_long += fits.count(False)
        fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
        outputs, cached = await self._engine.outputs(fitting, self._salt)
        self._stats.cached_tokens += cached
        found = iter(outputs)
        return [math.tanh(next(found)) if fit else math.nan for fit in fits]

    def _make_engine(self, arguments: dict[str, Any]) -> Any:
        return BatchEngine(arguments)

    def _check_model(self, path: str) -> ModelInfo:
        return check_preference_checkpoint(path)

    async def _take_fingerprint(self) -> tuple[float, ...]:
        rows = [self._tokenizer.encode(t)[: self._max_model_len] for t in _FINGERPRINT_TEXTS]
        return tuple(await self._values(rows))

    def _take_reference(self, path: str) -> tuple[float, ...]:
        from learner.preference_model import load_preference_model, values

        texts = [
            self._tokenizer.decode(self._tokenizer.encode(text)[: self._max_model_len])
            for text in _FINGERPRINT_TEXTS
        ]
        return tuple(values(load_preference_model(path), self._tokenizer, texts))


PolicyReplicaActor = ray.remote(PolicyReplica)
PreferenceReplicaActor = ray.remote(PreferenceReplica)
