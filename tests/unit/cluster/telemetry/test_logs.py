"""Structured logs: which ids a line carries, and how its lines are found again."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.folder.run_folder import RunFolderError
from cluster.jobs.queue import StagePlan, plan_jobs
from cluster.telemetry import logs
from cluster.telemetry.logs import LogFilter, LogLine
from cluster.watch.log_view import show_logs
from rollout.store import RunStore, TrajectoryStore

logger = logging.getLogger("cluster.test_logs")


@pytest.fixture(autouse=True)
def _logs_end() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in logs.PACKAGES}
    yield
    logs.end()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_line_carries_the_ids_of_its_sentence_its_task_and_its_process(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "policy-0", replica="policy-0")
    with logs.ids(problem="p1", job="j1"):
        logger.warning("A call is tried again: too slow method=generate job=%s", "j2")

    [line] = logs.read(RunStore(tmp_path))

    assert line.ids == {"replica": "policy-0", "problem": "p1", "job": "j2", "method": "generate"}
    assert (line.level, line.process, line.logger) == ("WARNING", "policy-0", "cluster.test_logs")


def test_an_equals_sign_inside_a_sentence_is_no_id(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "driver")
    logger.info("Open trees: a=1 was the limit, now it is lower worker=w-0")
    logger.info("No ids, but x=1 in the middle of it")

    assert [line.ids for line in logs.read(RunStore(tmp_path))] == [{"worker": "w-0"}, {}]


async def test_ids_belong_to_the_task_that_set_them(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "worker-0")
    both_inside = asyncio.Barrier(2)

    async def search(problem: str) -> None:
        with logs.ids(problem=problem):
            await both_inside.wait()
            await asyncio.create_task(say(problem))

    async def say(problem: str) -> None:
        logger.info("Searching %s", problem)

    await asyncio.gather(search("a"), search("b"))

    assert {line.text: line.ids["problem"] for line in logs.read(RunStore(tmp_path))} == {
        "Searching a": "a",
        "Searching b": "b",
    }


def test_what_the_process_carries_may_change(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "policy-0", policy_version="r0")
    logger.info("one")
    logs.carry(policy_version="r1")
    logger.info("two")

    assert [line.ids["policy_version"] for line in logs.read(RunStore(tmp_path))] == ["r0", "r1"]


def test_a_traceback_is_kept_in_the_one_line(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "driver")
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("It failed job=j1")

    [line] = logs.read(RunStore(tmp_path))
    assert "KeyError: 'gone'" in line.text
    assert line.ids == {"job": "j1"}


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "driver")
    logger.info("whole")
    logs.end()
    path = tmp_path / logs.FOLDER / "driver.jsonl"
    path.write_text(path.read_text() + '{"unix_s": 1.0, "lev')

    assert [line.text for line in logs.read(RunStore(tmp_path))] == ["whole"]


def test_info_lines_do_not_reach_a_terminal_that_is_to_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(root, "level", logging.ERROR)
    logs.begin(RunStore(tmp_path), "driver")
    logger.info("quiet")
    logger.error("loud")

    assert capsys.readouterr().err == "loud\n"
    assert len(logs.read(RunStore(tmp_path))) == 2


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / logs.FOLDER).write_text("a file")
    logs.begin(RunStore(tmp_path), "driver")
    logger.info("lost")


def _line(unix_s: float, **ids: str) -> LogLine:
    return LogLine(unix_s=unix_s, level="INFO", process="worker-0", logger="x", text="", ids=ids)


def test_a_problems_lines_are_its_own_and_those_of_its_jobs_as_a_whole() -> None:
    lines = [
        _line(1, problem="p1"),
        _line(2, job="j1"),
        _line(3, job="j1", problem="p2"),
        _line(4, job="j2"),
        _line(5),
    ]
    wanted = LogFilter(problem="p1", jobs=frozenset({"j1"}))

    assert [line.unix_s for line in logs.select(lines, wanted)] == [1, 2]


def test_following_tells_of_lines_and_processes_that_come_later(tmp_path: Path) -> None:
    logs.begin(RunStore(tmp_path), "one")
    logger.info("before")
    following = logs.follow(RunStore(tmp_path), pause_s=0.0)
    path = tmp_path / logs.FOLDER / "two.jsonl"
    found = []

    # The generator looks at sizes on its first step; what is written then is new.
    def later() -> None:
        logger.info("after")
        path.write_text(_line(9e9).to_json() + "\n" + '{"cut')

    import threading

    timer = threading.Timer(0.1, later)
    timer.start()
    found = [next(following), next(following)]
    timer.join()

    assert [line.text for line in found] == ["after", ""]


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three problems: p1 handed back by j1 and committed later, p2 failed, p3 open."""
    trees = TrajectoryStore(RunStore(str(tmp_path)), 1)
    plan = StagePlan(
        round=1, stage="base", tree_index=0, problem_ids=("p1", "p2", "q3"), shard_size=2, seed=0
    )
    trees.create_plan("base", plan.to_json())
    first, _ = plan_jobs(plan)
    trees.commit(
        first.id,
        [],
        failed={"p2": "boom"},
        remaining=[["p1"]],
        info={"writer": "worker-0", "ended": "engines failed", "policy": "r0-base"},
    )
    logs.begin(RunStore(tmp_path), "worker-0")
    logger.warning("A search raised problem=p2 attempt=1")
    logger.error("A shard ends early job=%s", first.id)
    logger.info("Something else problem=q3")
    logs.end()
    return tmp_path


def _shown(run: Path, **options: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show_logs(run, console, **options)  # type: ignore[arg-type]
    return console.export_text()


def test_logs_of_a_problem_say_what_became_of_it(run: Path) -> None:
    text = _shown(run, problem="p2")

    assert "quarantined: boom, by worker-0, with policy r0-base" in text
    assert "A search raised problem=p2" in text
    assert "A shard ends early" in text
    assert "Something else" not in text


def test_a_part_that_was_handed_back_is_followed(run: Path) -> None:
    text = _shown(run, problem="p1")

    assert "handed back (engines failed)" in text
    assert text.count("stage base") == 2
    assert "not committed" in text


def test_level_and_process_narrow_what_is_shown(run: Path) -> None:
    assert "A search raised" not in _shown(run, level="error")
    assert "no line matches" in _shown(run, process="policy")


def test_json_lines_can_be_read_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_logs(run, Console(), as_json=True, last=1)

    assert json.loads(capsys.readouterr().out)["ids"] == {"problem": "q3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": "zz"}, "no problem 'zz'"),
        ({"problem": "p"}, "2 problems begin with 'p'"),
        ({"since": "yesterday"}, "--since 'yesterday': expected"),
        ({"level": "loud"}, "--level 'loud': expected"),
    ],
)
def test_bad_options_are_one_clear_error(run: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(RunFolderError, match=message):
        _shown(run, **options)


def test_a_folder_without_logs_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no logs here"):
        _shown(tmp_path)
