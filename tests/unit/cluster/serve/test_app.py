"""The server with clients that were not written here: the `openai` package and curl."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from cluster.runs.solve import asked_problem
from cluster.serve.api import read_model
from cluster.serve.keys import read_keys
from cluster.serve.service import Standing
from cluster.telemetry import metrics
from rollout.methods import Method, MethodConfig, Solver
from rollout.search import SearchConfig
from tests.fakes import ScriptedSandbox, TablePreference
from tests.scripted_replicas import hash_value
from tests.serving import Stuck, scripted_engines, serve_config, serving

QUESTION: list[Any] = [{"role": "user", "content": "3"}]


def client(url: str, key: str = "none", **other: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, **{"max_retries": 0} | other)


def texts(found: Any) -> list[str]:
    return [choice.message.content for choice in found.choices]


async def raw(url: str, path: str = "/v1/chat/completions", **other: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session:
        method = other.pop("method", "POST" if other else "GET")
        async with session.request(method, f"{url}{path}", **other) as reply:
            return reply.status, await reply.json()


# ---------------------------------------------------------------- answers


async def test_chat_answers_with_one_solution_its_code_output_and_box() -> None:
    async with serving() as (url, _):
        found = await client(url).chat.completions.create(model="rstar-mcts-8", messages=QUESTION)
    message = found.choices[0].message
    assert message.role == "assistant" and found.choices[0].finish_reason == "stop"
    assert re.fullmatch(
        r"```python\n(?s:.*)print\(\d+\)\n```\n\n```output\n3\n```\n\nIt is \\boxed\{[34]\}",
        message.content or "",
    )
    thinking = message.reasoning_content  # type: ignore[attr-defined]
    assert "step 1  (" in thinking and "output: 3" in thinking and "answer: " in thinking
    facts = found.rstar  # type: ignore[attr-defined]
    assert f"\\boxed{{{facts['answer']}}}" in (message.content or "")
    assert (facts["method"], facts["ended"], facts["num_rollouts"]) == ("mcts", "trajectories", 8)
    assert 0 < sum(a["votes"] for a in facts["answers"]) <= 4  # the top 4 vote
    assert facts["notes"] == [] and facts["value"] == facts["answers"][0]["value"]


async def test_usage_counts_all_tokens_of_the_search() -> None:
    engines = scripted_engines()
    async with serving(engines) as (url, _):
        found = await client(url).chat.completions.create(model="rstar-mcts-8", messages=QUESTION)
    alone = await Solver(
        config=MethodConfig(name=Method.MCTS, num_trajectories=8),
        search=SearchConfig(template="short", num_candidates=3),
        policy=engines.policy,
        preference=engines.preference,
        sandbox=ScriptedSandbox(default="3\n"),
    ).solve(asked_problem("3", source="request"), seed=0)
    usage = found.usage
    assert usage is not None and alone.chosen is not None
    assert found.rstar["answer"] == alone.answer  # type: ignore[attr-defined]
    assert usage.completion_tokens == alone.cost.generated_tokens
    assert usage.prompt_tokens == alone.cost.prompt_tokens
    assert usage.total_tokens == usage.completion_tokens + usage.prompt_tokens
    assert usage.scored_tokens == alone.cost.scored_tokens  # type: ignore[attr-defined]
    assert usage.completion_tokens_details is not None
    reasoning = usage.completion_tokens_details.reasoning_tokens
    assert reasoning == alone.cost.generated_tokens - alone.chosen.num_tokens


async def test_stream_tells_the_thinking_then_the_answer_then_the_usage() -> None:
    async with serving() as (url, _):
        asking = client(url).chat.completions
        whole = await asking.create(model="rstar-mcts-8", messages=QUESTION)
        chunks = [
            chunk
            async for chunk in await asking.create(
                model="rstar-mcts-8",
                messages=QUESTION,
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    kinds = "".join(
        "t" if t else "c" if d.content else "." for t, d in zip(thoughts, deltas, strict=True)
    )
    assert re.fullmatch(r"\.t{2,}c\.", kinds)
    content = "".join(delta.content or "" for delta in deltas)
    assert content == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert (ends[-1], set(ends[:-1])) == ("stop", {None})
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    facts = chunks[-2].rstar  # type: ignore[attr-defined]
    assert facts["answers"] == whole.rstar["answers"]  # type: ignore[attr-defined]


async def test_completions_answer_likewise_streamed_and_not() -> None:
    async with serving() as (url, _):
        asking = client(url).completions
        whole = await asking.create(model="rstar-greedy", prompt="3", max_tokens=500)
        stream = await asking.create(model="rstar-greedy", prompt="3", max_tokens=500, stream=True)
        texts = [chunk.choices[0].text async for chunk in stream]
    assert (whole.object, "".join(texts)) == ("text_completion", whole.choices[0].text)
    assert whole.choices[0].text


async def test_n_choices_are_searches_with_seeds_of_their_own() -> None:
    async with serving() as (url, _):
        asking = client(url).chat.completions
        found = await asking.create(model="rstar-mcts-2", messages=QUESTION, n=3)
        one = await asking.create(model="rstar-mcts-2", messages=QUESTION)
        stream = await asking.create(model="rstar-mcts-2", messages=QUESTION, n=3, stream=True)
        ends = {c.choices[0].index async for c in stream if c.choices[0].finish_reason}
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.choices[0].message.content == one.choices[0].message.content
    assert len({choice.message.reasoning_content for choice in found.choices}) == 3  # type: ignore[attr-defined]
    assert len(found.rstar_choices) == 3 and ends == {0, 1, 2}  # type: ignore[attr-defined]
    assert found.usage is not None and one.usage is not None
    assert found.usage.completion_tokens > one.usage.completion_tokens


async def test_budget_and_method_by_name_or_by_fields_are_the_same() -> None:
    async with serving() as (url, _):
        asking = client(url).chat.completions
        named = await asking.create(model="rstar-majority-6", messages=QUESTION, seed=5)
        given = await asking.create(
            model="rstar",
            messages=QUESTION,
            extra_body={"method": "majority", "trajectories": 6, "seed": 5},
        )
        other = await asking.create(model="rstar-majority-6", messages=QUESTION, seed=6)
    assert texts(named) == texts(given) and named.usage == given.usage
    assert named.usage != other.usage


async def test_weight_of_the_policys_own_opinion_counts_only_where_it_is_used() -> None:
    config = serve_config(
        method={"name": "best-of-n", "logprob_weight": 0.5}, policy_engine={"logprobs": True}
    )
    assert read_model("rstar-weighted-majority-4", config).logprob_weight == 0.5
    assert read_model("rstar-mcts-4", config).logprob_weight == 0
    MethodConfig.model_validate(read_model("rstar-mcts-4", config).model_dump())


async def test_earlier_messages_are_not_read_and_that_is_said() -> None:
    async with serving() as (url, _):
        asking = client(url).chat.completions
        found = await asking.create(
            model="rstar-mcts-8",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": [{"type": "text", "text": "3"}]},
            ],
        )
        alone = await asking.create(model="rstar-mcts-8", messages=QUESTION)
    assert texts(found) == texts(alone)
    assert found.rstar["notes"] == [  # type: ignore[attr-defined]
        "not read: earlier messages (1 system, 1 user, 1 assistant); the last user message is the "
        "problem"
    ]


async def test_deadline_answers_with_the_best_so_far_and_budget_with_what_it_found() -> None:
    engines = scripted_engines()
    stuck = type(engines)(
        policy=Stuck(14), preference=TablePreference(hash_value), sandbox=engines.sandbox
    )
    with metrics.recorded() as counted:
        async with serving(stuck) as (url, _):
            asking = client(url).chat.completions
            late = await asking.create(
                model="rstar-mcts-64", messages=QUESTION, extra_body={"timeout_s": 0.4}
            )
            nothing = await asking.create(
                model="rstar-mcts-64", messages=QUESTION, extra_body={"timeout_s": 0.2}
            )
    assert (late.rstar["ended"], late.choices[0].finish_reason) == ("time_limit", "stop")  # type: ignore[attr-defined]
    assert late.rstar["answer"] in ("3", "4")  # type: ignore[attr-defined]
    assert nothing.choices[0].finish_reason == "length"
    content = nothing.choices[0].message.content or ""
    # What was left of the 0.2 s when the search began: as good as all, on a machine with time.
    said = re.sub(r"0\.[012]\d*", "N", content)
    assert said == "No answer was found: stopped after N s; no solution reached an answer."
    assert counted.total(metrics.SERVE_REQUESTS, outcome="late", method="mcts") == 2


async def test_content_ends_before_a_stop_text() -> None:
    async with serving() as (url, _):
        found = await client(url).chat.completions.create(
            model="rstar-mcts-8", messages=QUESTION, stop=["boxed", "It is"]
        )
    assert (found.choices[0].message.content or "").endswith("```output\n3\n```\n\n")


async def test_models_are_listed_and_any_budget_is_one() -> None:
    async with serving() as (url, _):
        found = [model.id async for model in client(url).models.list()]
        assert found[0] == "rstar" and {"rstar-mcts-16", "rstar-greedy"} <= set(found)
        assert (await client(url).models.retrieve("rstar-beam-24")).id == "rstar-beam-24"
        with pytest.raises(openai.NotFoundError, match=r"'gpt-4o' does not exist; there are rstar"):
            await client(url).models.retrieve("gpt-4o")


# ---------------------------------------------------------------- errors

WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4o"}, 404, "model", "does not exist"),
    ({"model": "rstar-mcts-9999"}, 400, "model", "1 to 256"),
    ({"messages": []}, 400, "messages", "the last message must be the user's problem"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", "is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0].type",
        "must be text, got 'image_url'",
    ),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "Input should"),
    ({"messages": None}, 400, "messages", "is missing"),
    ({"n": 9}, 400, "n", "at most 8"),
    ({"n": True}, 400, "n", "a number, got a truth value"),
    ({"temperature": 0}, 400, "temperature", "all candidates of mcts are the same"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"model": "rstar-greedy", "temperature": 1}, 400, "temperature", "has temperature 0, got 1"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "9"}, 400, "max_tokens", "valid integer"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ({"logprobs": True}, 400, "logprobs", "not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort", "not supported"),
    ({"best": 1}, 400, "best", "unknown parameter 'best'"),
    ({"method": "dfs"}, 400, "method", "one of greedy, majority"),
    ({"trajectories": 257}, 400, "trajectories", "1 to 256"),
    ({"timeout_s": 4000}, 400, "timeout_s", "at most 3600"),
    ({"stop": ["a", ""]}, 400, "stop", "none of them empty"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
]


@pytest.mark.parametrize(("given", "status", "param", "message"), WRONG)
async def test_what_cannot_be_done_is_refused_by_the_name_of_its_parameter(
    given: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    body = {"model": "rstar", "messages": QUESTION} | given
    body = {name: value for name, value in body.items() if value is not None}
    async with serving() as (url, _):
        got, reply = await raw(url, json=body)
    assert (got, reply["error"]["param"]) == (status, param)
    assert message in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"


async def test_parameters_that_change_nothing_are_taken() -> None:
    async with serving() as (url, _):
        found = await client(url).chat.completions.create(
            model="rstar-mcts-2",
            messages=QUESTION,
            frequency_penalty=0,
            presence_penalty=0,
            logit_bias={},
            logprobs=False,
            response_format={"type": "text"},
            store=False,
            temperature=0.7,
            top_p=0.9,
            max_completion_tokens=4000,
            user="u",
        )
    assert found.choices[0].message.content


async def test_body_that_is_no_request_is_an_error_of_the_api() -> None:
    config = serve_config(serve={"max_request_kib": 1})
    head = {"Content-Type": "application/json"}
    async with serving(config=config) as (url, _):
        assert (await raw(url, data=b"{", headers=head))[0] == 400
        assert (await raw(url, data=b"[]", headers=head))[0] == 400
        status, reply = await raw(url, json={"model": "rstar", "messages": "x" * 2000})
        assert (status, reply["error"]["code"]) == (413, "request_too_large")
        assert (await raw(url, data=b"{}", headers={"Content-Type": "text/plain"}))[0] == 415
        status, reply = await raw(url, "/v1/embeddings", json={})
        assert status == 404 and "/v1/embeddings" in reply["error"]["message"]
        assert (await raw(url))[0] == 405


async def test_method_that_needs_a_ppm_is_refused_where_there_is_none() -> None:
    config = serve_config(ppm=None)
    async with serving(config=config) as (url, _):
        with pytest.raises(openai.NotFoundError, match="best-of-n needs a PPM"):
            await client(url).chat.completions.create(model="rstar-best-of-n-4", messages=QUESTION)
        listed = [model.id async for model in client(url).models.list()]
    assert not [name for name in listed if "best-of-n" in name or "beam" in name]


async def test_full_queue_is_429_with_retry_after_and_the_client_comes_back() -> None:
    gate = asyncio.Event()
    config = serve_config(serve={"max_running": 1, "max_queued": 0})
    with metrics.recorded() as counted:
        async with serving(scripted_engines(gate=gate), config=config) as (url, _):
            asking = client(url).chat.completions
            first = asyncio.create_task(asking.create(model="rstar", messages=QUESTION))
            await asyncio.sleep(0.2)
            with pytest.raises(openai.RateLimitError) as caught:
                await asking.create(model="rstar", messages=QUESTION)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            gate.set()
            assert (await first).choices
            patient = client(url, max_retries=3).chat.completions
            assert (await patient.create(model="rstar", messages=QUESTION)).choices
    assert counted.total(metrics.SERVE_REQUESTS, outcome="refused") == 1
    assert counted.total(metrics.SERVE_REQUESTS, outcome="ok") == 2


async def test_failing_engine_is_a_server_error_that_tells_nothing_of_the_inside() -> None:
    async with serving(scripted_engines(failures=99)) as (url, _):
        with pytest.raises(openai.InternalServerError) as caught:
            await client(url).chat.completions.create(model="rstar", messages=QUESTION)
        assert "scripted failure" not in str(caught.value)
        assert caught.value.response.headers["X-Request-Id"] in str(caught.value)
        stream = await client(url).chat.completions.create(
            model="rstar", messages=QUESTION, stream=True
        )
        with pytest.raises(openai.APIError, match="failed again and again"):
            async for _ in stream:
                pass


async def test_stream_whose_turn_does_not_come_in_time_says_so_and_counts_as_refused() -> None:
    engines = scripted_engines()
    engines = type(engines)(policy=Stuck(0), preference=None, sandbox=engines.sandbox)
    config = serve_config(serve={"max_running": 1})
    with metrics.recorded() as counted:
        async with serving(engines, config=config) as (url, _):
            asking = client(url).chat.completions
            first = asyncio.create_task(asking.create(model="rstar", messages=QUESTION))
            await asyncio.sleep(0.2)
            stream = await asking.create(
                model="rstar", messages=QUESTION, stream=True, extra_body={"timeout_s": 0.2}
            )
            with pytest.raises(openai.APIError, match=r"waited 0\.2 s for its turn"):
                async for _ in stream:
                    pass
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    assert counted.total(metrics.SERVE_REQUESTS, outcome="refused") == 1
    assert counted.total(metrics.SERVE_REQUESTS, outcome="failed") == 0


# ---------------------------------------------------------------- cancellation


@pytest.mark.parametrize("stream", [False, True])
async def test_closed_connection_frees_everything_within_a_second(stream: bool) -> None:
    engines = scripted_engines()
    engines = type(engines)(policy=Stuck(5), preference=None, sandbox=engines.sandbox)
    with metrics.recorded() as counted:
        async with serving(engines) as (url, server):
            asking = client(url).chat.completions

            async def ask() -> None:
                found = await asking.create(model="rstar", messages=QUESTION, stream=stream)
                if stream:
                    async for _ in found:
                        pass

            task = asyncio.create_task(ask())
            await asyncio.sleep(0.3)
            assert server.service.standing == Standing(running=1, waiting=0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(30):
                while server.service.standing.running:
                    await asyncio.sleep(0.01)
                await server.service.settled()
            assert engines.sandbox.open_trees == []  # type: ignore[attr-defined]
    assert counted.total(metrics.SERVE_REQUESTS, outcome="cancelled") == 1


async def test_no_answer_goes_to_another_request() -> None:
    def echo(request: Any) -> list[str]:
        number = request.prompt.split("#")[1].split("#")[0]
        if request.prompt.endswith("<end_of_output>\n"):
            return [f"<answer>\\boxed{{{number}}}<end_of_answer>"]
        return [f"print({number})\n<end_of_code>"]

    engines = scripted_engines()
    engines.policy.script = echo  # type: ignore[attr-defined]
    config = serve_config(serve={"max_running": 8, "max_queued": 200})
    async with serving(engines, config=config) as (url, server):
        asking = client(url).chat.completions

        async def one(number: int) -> str | None:
            task = asyncio.create_task(
                asking.create(
                    model="rstar-mcts-2", messages=[{"role": "user", "content": f"#{number}#"}]
                )
            )
            if number % 5 == 0:
                await asyncio.sleep(0.002 * (number % 3))
                task.cancel()
            try:
                return (await task).rstar["answer"]  # type: ignore[attr-defined]
            except asyncio.CancelledError:
                return None

        found = await asyncio.gather(*(one(number) for number in range(60)))
        await server.service.settled()
        assert server.service.standing == Standing(running=0, waiting=0)
    for number, answer in enumerate(found):
        assert answer == str(number) or (number % 5 == 0 and answer is None)
    assert engines.sandbox.open_trees == []  # type: ignore[attr-defined]


# ---------------------------------------------------------------- keys, health, trees, page


async def test_keys_are_asked_of_every_request_and_told_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-0123456789abcdef\nteam-b sk-fedcba9876543210\n")
    caplog.set_level("INFO", logger="cluster.serve")
    async with serving(keys=read_keys(file)) as (url, _):
        right = client(url, "sk-fedcba9876543210").chat.completions
        assert (await right.create(model="rstar", messages=QUESTION)).choices
        for key in ("sk-wrong-0123456789", "-"):
            with pytest.raises(openai.AuthenticationError) as caught:
                await client(url, key).chat.completions.create(model="rstar", messages=QUESTION)
            assert key not in str(caught.value) or key == "-"
        assert (await raw(url, "/v1/models"))[0] == 401
        assert (await raw(url, "/health"))[0] == 200
    assert "key=team-b" in caplog.text and "sk-" not in caplog.text
    assert "problem=" not in caplog.text


async def test_problems_are_logged_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cluster.serve")
    config = serve_config(serve={"log_requests": True})
    async with serving(config=config) as (url, _):
        await client(url).chat.completions.create(model="rstar-mcts-1", messages=QUESTION)
    assert "problem='3'" in caplog.text


async def test_without_keys_only_a_loopback_name_is_answered() -> None:
    async with serving() as (url, _):
        for path in ("/", "/v1/models"):
            status, reply = await raw(url, path, method="GET", headers={"Host": "evil.example"})
            assert status == 403 and "its own machine only" in reply["error"]["message"]


async def test_ready_says_why_not() -> None:
    why = ["no policy replica serves"]
    async with serving(why_not_ready=lambda: why[0]) as (url, _):
        status, reply = await raw(url, "/ready")
        assert (status, reply["why"]) == (503, "no policy replica serves")
        why[0] = ""
        assert await raw(url, "/ready") == (
            200,
            {"status": "ready", "running": 0, "waiting": 0},
        )


async def test_tree_page_is_at_the_address_of_the_answer_for_a_while() -> None:
    config = serve_config(serve={"kept_trees": 2})
    async with serving(config=config) as (url, _), aiohttp.ClientSession() as session:
        addresses = []
        for seed in range(3):
            found = await client(url).chat.completions.create(
                model="rstar-mcts-2", messages=QUESTION, seed=seed
            )
            addresses.append(found.rstar["tree"])  # type: ignore[attr-defined]
        greedy = await client(url).chat.completions.create(model="rstar-greedy", messages=QUESTION)
        assert greedy.rstar["tree"] is None  # type: ignore[attr-defined]
        assert all(re.fullmatch(rf"{url}/trees/[\w-]{{24}}", a) for a in addresses)
        async with session.get(addresses[0]) as reply:
            assert reply.status == 404
        async with session.get(addresses[2]) as reply:
            text = await reply.text()
            assert reply.headers["Content-Security-Policy"] == "frame-ancestors 'self'"
            assert reply.status == 200 and "asked-" in text and "print(" in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_as_in_the_docs() -> None:
    async def curl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--max-time", "30", *arguments, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    body = {"model": "rstar-mcts-4", "messages": QUESTION}
    head = ("-H", "Content-Type: application/json")
    async with serving() as (url, _):
        address = f"{url}/v1/chat/completions"
        whole = json.loads(await curl(address, *head, "-d", json.dumps(body)))
        lines = await curl("-N", address, *head, "-d", json.dumps(body | {"stream": True}))
    events = [line for line in lines.split("\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    told = [json.loads(event[6:]) for event in events[:-1]]
    content = "".join(each["choices"][0]["delta"].get("content", "") for each in told)
    assert content == whole["choices"][0]["message"]["content"]
