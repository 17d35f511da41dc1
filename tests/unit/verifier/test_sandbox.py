"""The sandbox's own ways: names, settings, the awaiting form, the end."""

from __future__ import annotations

import asyncio

import pytest

from verifier.sandbox import AsyncSandbox, Sandbox, SandboxError, SandboxLimits


def test_unknown_and_closed_names_are_value_errors(strict_sandbox):
    with pytest.raises(ValueError, match="unknown state 'nowhere'"):
        strict_sandbox.run("nowhere", ["1"])
    with pytest.raises(ValueError, match="state id"):
        strict_sandbox.run(None, ["1"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not open"):
        strict_sandbox.close("never opened")
    root = strict_sandbox.open("twice")
    with pytest.raises(ValueError, match="already open"):
        strict_sandbox.open("twice")
    strict_sandbox.close("twice")
    with pytest.raises(ValueError, match="unknown state"):
        strict_sandbox.run(root, ["1"])
    with pytest.raises(ValueError, match="problem_id"):
        strict_sandbox.open("")
    with pytest.raises(ValueError, match="flavour"):
        strict_sandbox.open("x", flavour="vanilla")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"wall_s": 0}, ValueError, "wall_s must be above 0"),
        ({"wall_s": float("nan")}, ValueError, "wall_s"),
        ({"wall_s": "5"}, TypeError, "wall_s must be a number, got '5'"),
        ({"memory_mib": 1.5}, TypeError, "memory_mib must be a whole number"),
        ({"output_kib": 5000}, ValueError, "output_kib must be at most 1024"),
        ({"depth": -1}, ValueError, "depth"),
        ({"wall_stretch": 0.5}, ValueError, "wall_stretch must be at least 1, got 0.5"),
        ({"wall_stretch": float("inf")}, ValueError, "wall_stretch"),
        ({"wall_stretch": "3"}, TypeError, "wall_stretch must be a number, got '3'"),
        ({"live_states": True}, TypeError, "live_states"),
    ],
)
def test_limits_check_themselves(settings, error, message):
    with pytest.raises(error, match=message):
        SandboxLimits(**settings)


async def test_async_form_keeps_the_loop_free_with_many_trees_in_flight():
    async with await AsyncSandbox.start(SandboxLimits(wall_s=20.0)) as sandbox:
        beats = 0
        done = asyncio.Event()

        async def beat() -> None:
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0.001)

        async def search(number: int) -> str:
            root = await sandbox.open(f"async-{number}")
            first = (await sandbox.run(root, [f"x = {number}", "1/0"]))[0]
            assert first.state is not None
            await sandbox.evict(first.state)
            printed = (await sandbox.run(first.state, ["print(x)"]))[0].stdout
            await sandbox.close(f"async-{number}")
            return printed

        heart = asyncio.create_task(beat())
        printed = await asyncio.gather(*[search(number) for number in range(20)])
        done.set()
        await heart
        assert printed == [f"{number}\n" for number in range(20)]
        assert beats > 5
        assert (await sandbox.stats())["trees"] == 0


def test_cancelled_await_disturbs_nobody(strict_sandbox):
    async def cancel_one() -> str:
        sandbox = AsyncSandbox.__new__(AsyncSandbox)
        sandbox.limits, sandbox._client = strict_sandbox.limits, strict_sandbox._client
        root = await sandbox.open("cancelled")
        task = asyncio.create_task(sandbox.run(root, ["import time\ntime.sleep(0.2)"]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        printed = (await sandbox.run(root, ["print('next')"]))[0].stdout
        await sandbox.close("cancelled")
        return printed

    assert asyncio.run(cancel_one()) == "next\n"


def test_after_shutdown_every_call_says_so():
    sandbox = Sandbox(limits=SandboxLimits(wall_s=5.0))
    sandbox.open("p")
    sandbox.shutdown()
    sandbox.shutdown()
    with pytest.raises(SandboxError, match="shut down"):
        sandbox.open("q")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"isolation": "loose"}, "isolation must be"), ({"cores": 0}, "cores must be at least 1")],
)
def test_settings_are_checked_before_anything_starts(settings, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**settings)
