"""`python -m bench.gpu` with parts that hang, fail or cannot run; and what its real parts use.

The bench ends every process below its own, so it has one of its own here.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_parts
from bench.base_model import SETTINGS
from cluster.folder.config_file import load_config
from cluster.runs.config import RolloutConfig, RunConfig
from tests.models import write_tiny_policy

ROOT = Path(__file__).parents[3]

PART = """
import json, pathlib, signal, subprocess, sys, time
name, results = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--results") + 1])

def note(**figures):
    with results.open("a") as stream:
        stream.write(json.dumps({"part": name, "figures": figures}) + "\\n")

if name == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep, start_new_session=True)
    # Its parent is gone at once, as that of a daemon.
    orphan = subprocess.run(
        ["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE
    )
    print("half way", flush=True)
    note(prefix_hit_rate=0.8, pids=[child.pid, int(orphan.stdout)])
    time.sleep(600)
elif name == "fails":
    note(sft_mfu=0.46)
    raise RuntimeError("no kernel image")
elif name == "declines":
    print("no model here")
    sys.exit(77)
else:
    note(engine_utilisation=0.91, tokens_per_s=12345.6, kernel="flash")
"""

BENCH = """
import sys
from bench import gpu

part, out, size, *limits = sys.argv[1:]
command = (sys.executable, part)
gpu.PARTS = {
    name: gpu.Part(limit_s=float(limit), toy_limit_s=float(limit), command=command,
                   needs=("no_such_module",) if name == "lacks" else ())
    for name, limit in (given.split("=") for given in limits)
}
sys.exit(gpu.main(["--out", out, "--size", size]))
"""


def start(folder: Path, size: str, *limits: str) -> subprocess.Popen[str]:
    part = folder / "part.py"
    part.write_text(PART)
    command = [sys.executable, "-c", BENCH, str(part), str(folder / "out"), size, *limits]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def results(folder: Path) -> list[dict[str, Any]]:
    return list(gpu.read(folder / "out" / "results.jsonl"))


def pids(folder: Path) -> list[int]:
    return next((r["figures"]["pids"] for r in results(folder) if "figures" in r), [])


def test_one_part_that_hangs_fails_or_cannot_run_costs_nothing_of_the_others(
    tmp_path: Path,
) -> None:
    bench = start(tmp_path, "full", "hangs=8", "fails=30", "lacks=1", "declines=30", "good=60")
    printed = bench.communicate(timeout=120)[0]
    assert bench.returncode == 1
    found = json.loads(printed.splitlines()[-1])
    status = {name: part["status"] for name, part in found["parts"].items()}
    assert status == {
        "hangs": "late",
        "fails": "failed",
        "lacks": "skipped",
        "declines": "skipped",
        "good": "done",
    }
    reasons = {name: part["reason"] for name, part in found["parts"].items()}
    assert re.fullmatch(r"killed with its children after \d+ s; half way", reasons["hangs"])
    assert reasons["fails"] == "status 1: RuntimeError: no kernel image"
    assert reasons["lacks"] == "no no_such_module here"
    assert reasons["declines"] == "no model here"
    assert len(pids(tmp_path)) == 2 and not any(map(is_alive, pids(tmp_path)))
    assert found["met"] == {"engine_utilisation": True, "prefix_hit_rate": False, "sft_mfu": True}
    lines = printed.splitlines()
    assert "  engine_utilisation                        0.910  >= 0.90  yes" in lines
    assert "  prefix_hit_rate                           0.800  >= 0.85  no" in lines
    assert "  tokens_per_s                             12,346" in lines
    assert "not measured: loop_completed" in lines
    # What came before the fault is on the disk, and was there before the part had ended.
    order = [(r["part"], "figures" in r) for r in results(tmp_path)]
    assert order.index(("hangs", True)) < order.index(("hangs", False))
    assert order.index(("fails", True)) < order.index(("fails", False))


def test_what_a_part_leaves_over_is_the_next_ones_and_no_goal_is_judged_at_toy_size(
    tmp_path: Path,
) -> None:
    # The second has no limit of its own: it lives on what the first has not used.
    bench = start(tmp_path, "toy", "good=60", "declines=0")
    printed = bench.communicate(timeout=120)[0]
    found = json.loads(printed.splitlines()[-1])
    assert (bench.returncode, found["parts"]["declines"]["status"]) == (0, "skipped")
    assert found["met"] == {} and " yes" not in printed


def test_a_bench_that_is_ended_says_what_it_has_and_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = start(tmp_path, "full", "hangs=600", "good=60")
    until_s = time.monotonic() + 60
    while not pids(tmp_path):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert all(map(is_alive, pids(tmp_path)))
    os.kill(bench.pid, signal.SIGTERM)
    printed = bench.communicate(timeout=60)[0]
    found = json.loads(printed.splitlines()[-1])
    assert found["prefix_hit_rate"] == 0.8 and found["parts"].keys() == {"hangs"}
    assert found["parts"]["hangs"]["status"] == "interrupted"
    assert bench.returncode == 1 and not any(map(is_alive, pids(tmp_path)))


def test_the_whole_takes_eight_minutes_and_both_files_know_the_same_parts() -> None:
    assert sum(part.limit_s for part in gpu.PARTS.values()) == 480
    assert gpu.PARTS.keys() == gpu_parts.PARTS.keys()


@pytest.mark.parametrize("size", ["toy", "full"])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_what_the_parts_set_are_keys_of_the_configuration(
    size: str, has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def note(*arguments: object) -> str:
        asked.append([str(argument) for argument in arguments])
        raise SystemExit

    monkeypatch.setattr(gpu_parts, "command", note)
    monkeypatch.setattr(gpu_parts.Bench, "on_gpu", lambda bench: has_gpu)
    bench = gpu_parts.Bench(size, tmp_path, tmp_path, tmp_path / "results", "loop")
    for part in (gpu_parts.loop, gpu_parts.bootstrap):
        with pytest.raises(SystemExit):
            part(bench)
    loop, rollout = ([b for a, b in pairwise(words) if a == "--set"] for words in asked)
    run = load_config("smoke", loop, kind=RunConfig)
    assert run.cluster.hand_over and run.cluster.policy.num_gpus == (0.6 if has_gpu else 0)
    given = {"policy": "x", "problems": tmp_path, "run_dir": tmp_path}
    config = load_config("rollout", [*SETTINGS, *rollout], kind=RolloutConfig, given=given)
    assert config.cluster.policy.num_gpus == has_gpu


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    gpu.append(tmp_path / "r", {"part": "a", "figures": {"sft_mfu": 0.5}})
    with (tmp_path / "r").open("a") as stream:
        stream.write('{"part": "b", "fig')
    assert list(gpu.read(tmp_path / "r")) == [{"part": "a", "figures": {"sft_mfu": 0.5}}]


def test_random_policy_writes_digits_and_ends_its_steps_in_a_filled_up_vocabulary(
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.search import STEP_TOKENS, write_random_policy
    from rollout.prompt import END_OF_STEP

    shape = {**gpu_parts.MINIATURE, "vocab_size": 5000}
    path = write_random_policy(tmp_path, shape=shape, letters="123456789", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (model.dtype, model.config.vocab_size) == (torch.bfloat16, 5000)
    prompt = tokenizer(gpu_parts.digits(random.Random(0), 40), return_tensors="pt")
    with torch.no_grad():
        chances = model(**prompt).logits[0, -1].float().softmax(-1)
    written = tokenizer.convert_tokens_to_ids([*"123456789"])
    assert float(chances[written].min()) > 0.01
    end = tokenizer.convert_tokens_to_ids(END_OF_STEP)
    assert float(chances[end]) == pytest.approx(1 / STEP_TOKENS, rel=0.8)
    assert float(chances[[*written, end]].sum()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("kind", "computed_share"), [("policy", 1.0), ("ppm", 0.4)])
def test_rate_of_a_fit_counts_a_shared_prefix_once(kind: Any, computed_share: float) -> None:
    from bench.learner import measure_fit

    shape = {**gpu_parts.MINIATURE, "vocab_size": 300, "hidden_size": 64}
    found = measure_fit(kind, shape, length=128, row_tokens=256, rows=1, steps=3)
    # Of 128 computed tokens 64 are the prefix, which each of four branches of 16 counts: 320.
    assert found["computed_tokens_per_s"] == pytest.approx(found["tokens_per_s"] * computed_share)
    assert found["mfu"] == pytest.approx(found["tflops"] / found["peak_tflops"])
    assert found["mfu"] > 0 and found["peak_memory_gib"] > 0.1


def test_shape_of_a_checkpoint_is_what_is_measured(tmp_path: Path) -> None:
    from bench import learner

    path = write_tiny_policy(tmp_path / "policy", hidden=32, layers=3)
    found = learner.measure_shape(path, 128)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = config["num_hidden_layers"] * config["hidden_size"] * config["intermediate_size"] * 3
    assert found["policy_tflops"] * 1e12 > 6 * weights * found["policy_tokens_per_s"]
    assert 0 < found["policy_mfu"] < 1 and 0 < found["ppm_mfu"] < 1
