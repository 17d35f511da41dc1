"""Replicas as Ray actors around real CPU engines, against transformers.

Three engines are started once, together, and serve nearly all tests: a PPM's, a policy's whose core
is a process, as on GPUs, and a policy's whose core is a thread of the replica. What is tested of a
policy is tested of both. The models are random and small; float32, where two correct
implementations write the same greedy text.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.config import EngineConfig
from cluster.engines.lifecycle import ReplicaInfo, ReplicaStats
from cluster.engines.model_check import ModelCheckError
from cluster.engines.replica import PolicyReplica, PolicyReplicaActor, PreferenceReplicaActor
from cluster.engines.weight_sync import take_weights
from cluster.jobs.admission import EnginePressure
from rollout.engine import (
    Completion,
    EngineError,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    LogprobRequest,
)
from rollout.prompt import (
    SHORT_TEMPLATE,
    STOP_STRINGS,
    output_block,
    render_question,
    segments_of,
)
from tests.models import write_tiny_policy, write_tiny_ppm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

MAX_MODEL_LEN = 256
CONFIG = EngineConfig(max_model_len=MAX_MODEL_LEN, kv_cache_gib=0.1, logprobs=True)

CORES = ("process", "thread")

QUESTIONS = (
    "There are 63 boxes with 12 pens each. How many pens are there?",
    "Ann reads 4 pages a day. After how many days has she read 96 pages?",
    "Zoë pays 137 € for 2 paintings.",
)
PROMPTS = tuple(render_question(question, SHORT_TEMPLATE) for question in QUESTIONS)

IN_PROCESS = """
import json, os, sys

from cluster.engines.model_check import check_policy_checkpoint
from cluster.engines.arguments import engine_arguments, engine_environment
from cluster.engines.config import EngineConfig

config = EngineConfig(max_model_len=512, kv_cache_gib=0.05)
for name, value in engine_environment(config, on_cpu=True).items():
    if value is not None:
        os.environ[name] = value

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

prompts, paths = json.loads(sys.argv[1]), sys.argv[2:]
params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
found = {}
for path in paths:
    info = check_policy_checkpoint(path)
    engine = LLM(**engine_arguments(config, info, runner="generate", on_cpu=True))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    for output in engine.generate(prompts, params, use_tqdm=False):
        ids = tokenizer(output.prompt).input_ids
        written = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=40, eos_token_id=None
        )[0, len(ids):].tolist()
        rows.append({
            "ids": ids, "vllm_ids": list(output.prompt_token_ids),
            "written": written, "vllm_written": list(output.outputs[0].token_ids),
        })
    found[info.model_type if info.architecture != "LlamaForCausalLM" else path] = rows
    del engine
print("FOUND" + json.dumps(found))
"""


def test_ids_and_greedy_tokens_equal_transformers_in_every_architecture(tmp_path: Path) -> None:
    from learner.miniature import write_base_model
    from rollout.problems.miniature import generate

    world = generate(seed=0, num_demonstrations=60, num_train=60, num_test=6)
    texts = [p.text for p in (*world.demonstrations, *world.train)]
    texts += [p.solution for p in world.demonstrations]
    paths = [
        write_base_model(tmp_path / "miniature", seed=0, texts=texts),
        write_tiny_policy(tmp_path / "llama", architecture="llama"),
        write_tiny_policy(tmp_path / "qwen2", architecture="qwen2"),
        write_tiny_policy(tmp_path / "phi3", architecture="phi3"),
    ]
    prompts = [render_question(p.text, SHORT_TEMPLATE) for p in world.test] + list(PROMPTS)
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, json.dumps(prompts), *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert len(found) == 4
    for name, rows in found.items():
        assert len(rows) == len(prompts)
        for row in rows:
            assert row["vllm_ids"] == row["ids"], name
            assert row["vllm_written"] == row["written"], name


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Replicas and what they serve."""

    folder: Path
    policies: dict[str, Any]
    """By where the engine core is."""
    ppm: Any
    core: str = "thread"

    @property
    def policy(self) -> Any:
        return self.policies[self.core]

    def generate(self, prompt: str, **options: Any) -> GenerationReply:
        import ray

        options = {"num_candidates": 1, "max_tokens": 40, "temperature": 0.0} | options
        reply = self.policy.generate.remote(GenerationRequest(prompt=prompt, **options))
        return ray.get(reply, timeout=300)

    def completions(self, prompt: str, **options: Any) -> tuple[Completion, ...]:
        return self.generate(prompt, **options).completions

    def stats(self) -> ReplicaStats:
        import ray

        return ray.get(self.policy.stats.remote(), timeout=300)


@pytest.fixture(scope="module")
def all_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray

    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        # Tied, as small policies are: the head then is a second copy the engine has to renew.
        write_tiny_policy(folder / f"policy{seed}", seed=seed, tied=True)
        write_tiny_ppm(folder / f"ppm{seed}", seed=seed)
    write_tiny_policy(folder / "wide", hidden=128, tied=True)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    policies = {
        core: PolicyReplicaActor.options(num_cpus=0).remote(
            str(folder / "policy0"),
            CONFIG.model_copy(update={"in_process": core == "thread"}),
            version="policy-r0",
            name=f"policy-{core}",
        )
        for core in CORES
    }
    ppm = PreferenceReplicaActor.options(num_cpus=0).remote(
        str(folder / "ppm0"), CONFIG, version="ppm-r0", name="ppm-0"
    )
    ray.get([replica.ready.remote() for replica in (*policies.values(), ppm)], timeout=800)
    yield Served(folder=folder, policies=policies, ppm=ppm)
    ray.shutdown()


@pytest.fixture(params=CORES)
def served(request: pytest.FixtureRequest, all_served: Served) -> Served:
    return replace(all_served, core=request.param)


def transformers_greedy(path: Path, prompt: str, num_tokens: int) -> tuple[str, float]:
    """Greedy text of transformers and its log-probability."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.generate(ids, do_sample=False, max_new_tokens=num_tokens, eos_token_id=None)
        logits = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    written = whole[0, ids.shape[1] :]
    logprob = logits.gather(1, written[:, None]).sum().item()
    return tokenizer.decode(written, skip_special_tokens=False), logprob


def test_logprobs_of_given_texts_equal_transformers(served: Served) -> None:
    import ray
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = served.folder / "policy0"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    code, answer = "<code>\nprint(12)\n<end_of_code>", "<answer>12<end_of_answer>"
    written = (code, code + output_block("12") + answer)
    texts = tuple(segments_of(prompt, text) for prompt in PROMPTS for text in written)
    too_long = segments_of("pens " * MAX_MODEL_LEN, code)
    request = LogprobRequest(texts=(*texts, too_long))
    reply = ray.get(served.policy.logprobs.remote(request), timeout=300)
    expected = []
    for segments in texts:
        parts = [tokenizer(s.text, add_special_tokens=False).input_ids for s in segments]
        ids = torch.tensor([[token for part in parts for token in part]])
        own = [s.trained for s, part in zip(segments, parts, strict=True) for _ in part]
        with torch.no_grad():
            told = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(float(told[torch.tensor(own[1:])].sum()))
    assert reply.values[:-1] == pytest.approx(expected, abs=1e-3)
    assert math.isnan(reply.values[-1]) and reply.policy_version == "policy-r0"


def test_greedy_text_and_its_logprob_equal_transformers(served: Served) -> None:
    for prompt in PROMPTS:
        text, logprob = transformers_greedy(served.folder / "policy0", prompt, 20)
        (completion,) = served.completions(prompt, max_tokens=20)
        assert completion.text == text
        assert completion.logprob == pytest.approx(logprob, abs=1e-3)
        assert (completion.num_tokens, completion.finish) == (20, FinishReason.LENGTH)


def test_values_equal_transformers_within_1e_4(all_served: Served) -> None:
    import ray
    from transformers import AutoTokenizer

    from learner.preference_model import load_preference_model, values

    path = all_served.folder / "ppm0"
    texts = (*PROMPTS, *(f"{prompt}<code>\nx = {i}" for i, prompt in enumerate(PROMPTS)))
    expected = values(load_preference_model(path), AutoTokenizer.from_pretrained(path), texts)
    reply = ray.get(all_served.ppm.evaluate.remote(EvaluationRequest(texts=texts)))
    assert reply.values == pytest.approx(expected, abs=1e-4)
    assert reply.preference_version == "ppm-r0"
    assert max(reply.values) - min(reply.values) > 0.01


def test_text_longer_than_the_context_has_no_value(all_served: Served) -> None:
    import ray

    texts = ("x" * MAX_MODEL_LEN, "x" * (MAX_MODEL_LEN + 1))
    reply = ray.get(all_served.ppm.evaluate.remote(EvaluationRequest(texts=texts)))
    assert math.isfinite(reply.values[0])
    assert math.isnan(reply.values[1])


def test_candidates_stop_at_markers_which_stay_in_the_text(served: Served) -> None:
    completions = served.completions(
        PROMPTS[0], num_candidates=16, max_tokens=150, temperature=2.0, seed=1, stop=STOP_STRINGS
    )
    stopped = [c for c in completions if c.stop_string is not None]
    assert len(stopped) >= 4
    for completion in stopped:
        assert completion.text.endswith(completion.stop_string or "")
        assert sum(completion.text.count(marker) for marker in STOP_STRINGS) == 1
        assert completion.finish is FinishReason.STOP
    for completion in set(completions) - set(stopped):
        assert not any(marker in completion.text for marker in STOP_STRINGS)


def test_ordinary_stop_string_cuts_the_greedy_text(served: Served) -> None:
    (whole,) = served.completions(PROMPTS[0])
    mark = whole.text[10:12]
    (cut,) = served.completions(PROMPTS[0], stop=(mark,))
    assert cut.text == whole.text[: whole.text.index(mark) + len(mark)]
    assert cut.stop_string == mark


def test_a_seed_repeats_its_candidates_and_another_does_not(served: Served) -> None:
    options: dict[str, Any] = {"num_candidates": 4, "temperature": 1.0}
    first = served.completions(PROMPTS[0], seed=5, **options)
    served.completions(PROMPTS[1], seed=9, **options)
    again = served.completions(PROMPTS[0], seed=5, **options)
    other = served.completions(PROMPTS[0], seed=6 + 2**20, **options)
    assert [c.text for c in first] == [c.text for c in again]
    assert len({c.text for c in (*first, *other)}) == 8


def test_seeded_prompts_that_fill_many_steps_do_not_harm_the_engine(served: Served) -> None:
    import ray

    requests = [
        GenerationRequest(
            prompt=f"{i:03d}" + "y" * (MAX_MODEL_LEN - 10), num_candidates=1, max_tokens=4, seed=i
        )
        for i in range(64)
    ]
    replies = ray.get([served.policy.generate.remote(r) for r in requests], timeout=300)
    assert len(replies) == 64
    assert served.stats().healthy


def test_prompt_without_room_is_answered_and_max_tokens_is_cut(served: Served) -> None:
    for completion in served.completions("x" * MAX_MODEL_LEN, num_candidates=2):
        assert (completion.text, completion.finish) == ("", FinishReason.PROMPT_TOO_LONG)
    (completion,) = served.completions("x" * (MAX_MODEL_LEN - 3), max_tokens=40)
    assert completion.num_tokens <= 3


def test_second_request_finds_its_prompt_in_the_cache(served: Served) -> None:
    prompt = "<|user|>" + "a question nobody else asks " * 4
    first, second = served.generate(prompt), served.generate(prompt)
    assert first.cached_tokens < 32
    assert second.cached_tokens >= 64
    assert second.prompt_tokens == first.prompt_tokens > second.cached_tokens


def test_cached_tokens_of_many_candidates_are_counted_once(served: Served) -> None:
    """Seven of eight find the whole prompt in the cache because the first one put it there."""
    prompt = "Eight candidates share this prompt, none of it was ever seen before. " * 2
    first = served.generate(prompt, num_candidates=8, temperature=1.0, seed=3, max_tokens=8)
    second = served.generate(prompt, num_candidates=8, temperature=1.0, seed=4, max_tokens=8)
    assert first.cached_tokens < 32 and second.cached_tokens >= 96


class BreakablePolicyReplica(PolicyReplica):
    """One whose engine core can be made to fail at its next step."""

    async def break_core(self) -> None:
        def fail() -> None:
            raise RuntimeError("a step that failed")

        self._engine.engine_core._core.step_fn = fail


@pytest.fixture(scope="module")
def breakable(all_served: Served) -> Iterator[Any]:
    import ray

    config = CONFIG.model_copy(update={"max_repeats": 4})
    path = str(all_served.folder / "policy0")
    replica = ray.remote(BreakablePolicyReplica).options(num_cpus=0).remote(path, config)
    yield replica
    ray.kill(replica)


def test_a_completion_that_repeats_itself_is_ended(breakable: Any) -> None:
    """A greedy model of this size falls into a loop."""
    import ray

    request = GenerationRequest(
        prompt=PROMPTS[0], num_candidates=1, max_tokens=250, temperature=0.0
    )
    reply = ray.get(breakable.generate.remote(request), timeout=800)
    (completion,) = reply.completions
    assert completion.finish is FinishReason.REPETITION
    assert completion.num_tokens < 250


def test_a_core_that_fails_in_its_thread_fails_its_replica_and_nothing_waits(
    breakable: Any,
) -> None:
    import ray

    request = GenerationRequest(prompt=PROMPTS[0], num_candidates=4, max_tokens=200, seed=1)
    ray.get(breakable.generate.remote(request), timeout=800)
    ray.get(breakable.break_core.remote(), timeout=300)
    references = [breakable.generate.remote(request) for _ in range(3)]
    for reference in references:
        with pytest.raises(EngineError):
            ray.get(reference, timeout=60)
    with pytest.raises(EngineError, match="the engine died"):
        ray.get(breakable.generate.remote(request), timeout=60)
    assert not ray.get(breakable.stats.remote(), timeout=60).healthy
    ray.get(breakable.shutdown.remote(), timeout=60)


def test_an_engine_says_how_full_it_is(served: Served) -> None:
    import ray

    def until(condition: Callable[[EnginePressure], bool]) -> EnginePressure:
        give_up = time.monotonic() + 120
        while not condition(said := ray.get(served.policy.pressure.remote())):
            assert time.monotonic() < give_up, said
            time.sleep(0.01)
        return said

    request = GenerationRequest(prompt="w", num_candidates=64, max_tokens=250, seed=1)
    reference = served.policy.generate.remote(request)
    said = until(lambda said: said.running > 8)
    assert 0 < said.kv_usage <= 1 and said.preemptions >= 0
    ray.get(reference, timeout=300)
    assert served.stats().steps > 0
    said = until(lambda said: said.running == 0)
    assert said.waiting == 0
    idle = EnginePressure(running=0, waiting=0, kv_usage=0.0, preemptions=0)
    said = ray.get(served.ppm.pressure.remote())
    assert replace(said, pace_s=None) == idle


def test_cancelled_request_leaves_nothing_running(served: Served) -> None:
    import ray

    request = GenerationRequest(prompt="z", num_candidates=64, max_tokens=250, seed=1)
    reference = served.policy.generate.remote(request)
    while served.stats().running_sequences < 64:
        time.sleep(0.005)
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(reference, timeout=300)
    assert served.stats().running_sequences == 0
    assert served.completions(PROMPTS[0])


def test_weights_loaded_in_place_change_the_text_and_change_it_back(served: Served) -> None:
    import ray

    def load(which: int) -> float:
        path, version = str(served.folder / f"policy{which}"), f"policy-r{which}"
        return ray.get(served.policy.load.remote(path, version), timeout=300)

    old = served.generate(PROMPTS[0])
    load(1)
    new = served.generate(PROMPTS[0])
    text, _ = transformers_greedy(served.folder / "policy1", PROMPTS[0], 40)
    assert new.completions[0].text == text != old.completions[0].text
    assert (old.policy_version, new.policy_version) == ("policy-r0", "policy-r1")
    assert new.cached_tokens == 0
    load(0)
    assert served.generate(PROMPTS[0]).completions == old.completions


def test_requests_around_a_load_are_each_answered_by_one_version(served: Served) -> None:
    import ray

    def ask() -> Any:
        request = GenerationRequest(
            prompt=PROMPTS[2], num_candidates=1, max_tokens=150, temperature=0.0
        )
        return served.policy.generate.remote(request)

    early = [ask() for _ in range(8)]
    load = served.policy.load.remote(str(served.folder / "policy1"), "policy-r1")
    between = []
    while not ray.wait([load], timeout=0.005)[0]:
        between.append(ask())
    late = [ask() for _ in range(8)]
    texts: dict[str, set[str]] = {}
    versions = []
    for reply in ray.get([*early, *between, *late], timeout=300):
        versions.append(reply.policy_version)
        texts.setdefault(reply.policy_version, set()).add(reply.completions[0].text)
    assert versions[:8] + versions[-8:] == ["policy-r0"] * 8 + ["policy-r1"] * 8
    assert {version: len(found) for version, found in texts.items()} == {
        "policy-r0": 1,
        "policy-r1": 1,
    }
    ray.get(served.policy.load.remote(str(served.folder / "policy0"), "policy-r0"), timeout=300)


def test_checkpoint_of_another_shape_is_refused_by_a_serving_replica(served: Served) -> None:
    import ray

    with pytest.raises(ModelCheckError, match="hidden_size"):
        ray.get(served.policy.load.remote(str(served.folder / "wide"), "wide"), timeout=300)
    assert served.generate(PROMPTS[0]).policy_version == "policy-r0"


async def test_replica_is_brought_to_a_checkpoint(all_served: Served) -> None:
    said = await take_weights(all_served.ppm, str(all_served.folder / "ppm1"), "ppm-r1")
    assert said == await all_served.ppm.fingerprint.remote()
    reply = await all_served.ppm.evaluate.remote(EvaluationRequest(texts=PROMPTS))
    assert reply.preference_version == "ppm-r1"
    with pytest.raises(ModelCheckError, match="does not exist"):
        await take_weights(all_served.ppm, str(all_served.folder / "absent"), "ppm-r2")


def living(pids: list[int]) -> list[int]:
    def lives(pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    return [pid for pid in pids if lives(pid)]


def test_killed_replicas_leave_no_engine_process(all_served: Served) -> None:
    import psutil
    import ray

    replicas = (*all_served.policies.values(), all_served.ppm)
    infos: list[ReplicaInfo] = ray.get([replica.ready.remote() for replica in replicas])
    pids = [p.pid for info in infos for p in psutil.Process(info.pid).children(recursive=True)]
    assert living(pids)  # of the policy whose core is a process
    for info in infos:
        os.kill(info.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(pids) == []
