from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluation.asked import (
    choose_prompting,
    evaluate_config,
    find_benchmarks,
    overlaps,
    read_benchmark,
)
from cluster.evaluation.config import EvaluateConfig
from cluster.folder.config_file import ConfigError, make_config
from cluster.folder.run_folder import RunFolderError
from rollout.methods import Method
from rollout.problem import Level, Problem

DATA = Path(__file__).parents[5] / "shared" / "data"


def write_problems(path: Path, *rows: tuple[str, str]) -> Path:
    lines = [
        json.dumps({"id": str(n), "problem": text, "answer": answer})
        for n, (text, answer) in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(**own: Any) -> EvaluateConfig:
    data = {"run_dir": "out", "policy": "p", "benchmarks": ["b.jsonl"], **own}
    return make_config(data, kind=EvaluateConfig, source="test")


def test_benchmarks_are_found_by_name_or_path_and_the_nearest_is_named(tmp_path: Path) -> None:
    named = write_problems(tmp_path / "aime2024.jsonl", ("a", "1"))
    other = write_problems(tmp_path / "mine.jsonl", ("b", "2"))
    assert find_benchmarks(["aime2024", str(other)], tmp_path) == [named, other]
    with pytest.raises(ConfigError, match="'aime': no such file; did you mean 'aime2024'"):
        find_benchmarks(["aime"], tmp_path)
    with pytest.raises(ConfigError, match=r"no benchmark: .*aime2024, mine"):
        find_benchmarks([], tmp_path)
    with pytest.raises(ConfigError, match="two benchmarks are called 'mine'"):
        find_benchmarks(["mine", str(other)], tmp_path)


def test_ids_of_two_files_never_meet_and_sentences_are_counted(tmp_path: Path) -> None:
    one = write_problems(tmp_path / "one.jsonl", ("a", "1"), ("a", "2"), ("", "3"))
    two = write_problems(
        tmp_path / "two.jsonl", ("c", "anecessarybutnotasufficientcondition"), ("d", "4")
    )
    first, about, lines = read_benchmark(one, config())
    second, sentences, _ = read_benchmark(two, config(limit=1))
    assert [p.id for p in (*first, *second)] == ["one:0", "one:1", "two:0"]
    assert {p.source for p in first} == {"one"}
    assert (about.num_rows, about.num_problems, about.num_repeated) == (3, 2, 1)
    assert about.skipped == {"without problem text": 1}
    assert any("row 3" in line for line in lines)
    assert sentences.num_sentences == 1


def test_benchmark_that_is_part_of_another_is_warned_of() -> None:
    def problems(*texts: str) -> list[Problem]:
        return [Problem(id=t, source="s", level=Level.MATH, text=t) for t in texts]

    (warning,) = overlaps(
        {
            "large": problems("a b", "c", "d", "e"),
            "small": problems("a  b", "c"),
            "x": problems("y"),
        }
    )
    assert warning.startswith("2 of 2 problems of small stand in large too")


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not beside the checkout")
def test_all_nine_benchmark_files_are_read_whole() -> None:
    files = [path for path in sorted(DATA.glob("*.parquet")) if path.stem != "problems_train"]
    read = {path.stem: read_benchmark(path, config()) for path in files}
    assert sum(about.num_problems for _, about, _ in read.values()) == 15_184
    assert all(not about.skipped for _, about, _ in read.values())
    # One more than with every blank counted.
    assert (read["collegemath"][1].num_repeated, read["omni"][1].num_repeated) == (37, 22)
    (warning,) = overlaps({name: problems for name, (problems, _, _) in read.items()})
    assert warning.startswith("500 of 500 problems of math500 stand in math_test too")


def test_command_line_wins_over_the_config_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    policy, ppm = (run / "checkpoints" / "round=2" / kind / "x" for kind in ("policy", "ppm"))
    for kind, path in (("policy", policy), ("ppm", ppm)):
        path.mkdir(parents=True)
        record = {"kind": kind, "round": 2, "path": str(path), "digest": "0" * 64}
        (path.parent / "CURRENT.json").write_text(json.dumps({**record, "info": {}}))
    (run / "config.yaml").write_text(
        "search: {template: short}\n"
        "evaluation: {max_solution_tokens: 77, num_candidates: 3, temperature: 0.6}\n"
    )
    problems = write_problems(tmp_path / "b.jsonl", ("a", "1"))
    made = evaluate_config(
        what=run,
        benchmarks=str(problems),
        methods="greedy,mcts",
        trajectories="4,1,4",
        overrides=["rollouts_per_tree=2"],
    )
    assert made.trajectories == [1, 4]
    assert made.methods == [Method.GREEDY, Method.MCTS]
    assert (made.max_solution_tokens, made.search.num_candidates) == (77, 3)
    assert (made.search.template, made.rollouts_per_tree) == ("short", 2)
    assert made.search.temperature == 0.6
    assert made.run_dir == Path("runs/evaluate-run")
    with pytest.raises(RunFolderError, match="no policy of round 9; there are rounds 2"):
        evaluate_config(what=run, round=9, benchmarks=str(problems))


def test_what_cannot_be_done_is_said_before_anything_starts(tmp_path: Path) -> None:
    problems = str(write_problems(tmp_path / "b.jsonl", ("a", "1")))
    with pytest.raises(ConfigError, match="no policy"):
        evaluate_config(benchmarks=problems)
    with pytest.raises(ConfigError, match="method best-of-n needs a PPM"):
        evaluate_config(policy=tmp_path, benchmarks=problems, methods="best-of-n")
    own = ["logprob_weight=0.5"]
    with pytest.raises(ConfigError, match=r"needs policy_engine\.logprobs: true"):
        evaluate_config(policy=tmp_path, benchmarks=problems, overrides=own)
    own.append("policy_engine.logprobs=true")
    made = evaluate_config(policy=tmp_path, benchmarks=problems, overrides=own)
    assert made.logprob_weight == 0.5
    with pytest.raises(ConfigError, match="'two': expected whole numbers"):
        evaluate_config(benchmarks=problems, trajectories="1,two")
    with pytest.raises(ConfigError, match=r"methods\.0"):
        evaluate_config(policy=tmp_path, benchmarks=problems, methods="gredy")
    with pytest.raises(RunFolderError, match="no such folder"):
        evaluate_config(what=tmp_path / "nothing", benchmarks=problems)


class Tokenizer:
    """What is asked of a tokenizer: how many tokens a text is, and its chat template."""

    def __init__(
        self, *, taught: bool, chat_template: str | None, adds_begin: bool = False
    ) -> None:
        self.taught, self.chat_template, self.adds_begin = taught, chat_template, adds_begin
        self.bos_token, self.bos_token_id = "<s>", 1

    def __call__(self, text: str, **options: bool) -> Any:
        ids = [7] if self.taught else [7, 8]
        begin = [1] if self.adds_begin and options.get("add_special_tokens", True) else []
        return type("Encoded", (), {"input_ids": begin + ids})()

    def apply_chat_template(self, turns: list[dict[str, str]], **options: bool) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"<s><user>{turns[0]['content']}<assistant>"


def test_prompt_follows_what_the_tokenizer_knows() -> None:
    taught = Tokenizer(taught=True, chat_template="t")
    assert choose_prompting(config(), taught).kind == "steps"
    chat = choose_prompting(
        config(instruction="Box it."), Tokenizer(taught=False, chat_template="t")
    )
    assert (chat.kind, chat.text) == ("chat", "<s><user>{question}\nBox it.<assistant>")
    base = choose_prompting(config(), Tokenizer(taught=False, chat_template=None))
    assert base.kind == "plain" and base.text is not None and "{question}" in base.text
    with pytest.raises(ConfigError, match="has no chat template"):
        choose_prompting(config(prompt="chat"), Tokenizer(taught=True, chat_template=None))


def test_begin_of_text_is_not_written_twice() -> None:
    tokenizer = Tokenizer(taught=False, chat_template="t", adds_begin=True)
    text = choose_prompting(config(), tokenizer).text
    assert text is not None and text.startswith("<user>")
