from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from io import StringIO
from pathlib import Path

import aiohttp
import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from cluster.fleet.config import ActorConfig
from cluster.fleet.learner_group import LearnerLostError
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.train import print_train_report, run_train
from cluster.telemetry import metrics as m
from cluster.telemetry.samples import Samples
from cluster.watch.top import show_top
from learner.checkpoint import CheckpointStore
from learner.fit import FitResult, LearnerError
from learner.select import DatasetConfig, select_dataset
from learner.trainer import run_fit
from rollout.prompt import MARKERS, SHORT_TEMPLATE
from rollout.run_store import RunStore
from tests.builders import answered, code, make_problem, make_tree
from tests.made_metrics import write_made_run
from tests.models import write_byte_tokenizer, write_tiny_policy

TRAIN = {"batch_examples": 8, "learning_rate": 5e-3, "zero_stage": 0, "num_epochs": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("base"), hidden=32, layers=1)


@pytest.fixture
def quiet():
    return Console(file=StringIO())


def write_config(path: Path, **settings: object) -> Path:
    config = {"run_dir": str(path.parent / "out"), "train_policy": TRAIN, "train_ppm": TRAIN}
    path.write_text(yaml.safe_dump(config | settings))
    return path


def write_set(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_policy_trains_on_a_plain_file_and_a_second_call_only_reports(tmp_path, base, quiet):
    rows = [{"prompt": f"{n}?", "response": "<answer>7<end_of_answer>"} for n in range(24)]
    data = write_set(tmp_path / "set.jsonl", rows)
    config = write_config(tmp_path / "c.yaml", base=str(base), data={"train": str(data)})

    result = await run_train("policy", config, console=quiet)

    store = CheckpointStore(tmp_path / "out" / "checkpoints")
    assert store.current("policy", 0) == result.checkpoint
    again = await run_train("policy", config, console=quiet)
    assert again.checkpoint == result.checkpoint
    print_train_report(result, quiet)
    text = quiet.file.getvalue()
    assert "train policy" in text and f"checkpoint {result.checkpoint.path}\n" in text


async def test_training_alone_exports_what_it_measures_and_can_be_watched(tmp_path, base, quiet):
    rows = [{"prompt": f"{n}?", "response": "<answer>7<end_of_answer>"} for n in range(1000)]
    data = write_set(tmp_path / "set.jsonl", rows)
    out = tmp_path / "out"
    config = write_config(
        tmp_path / "c.yaml", base=str(base), data={"train": str(data)}, metrics={"sample_s": 0.2}
    )
    work = asyncio.create_task(run_train("policy", config, console=quiet))
    pages = []
    async with aiohttp.ClientSession() as http:
        while not work.done():
            await asyncio.sleep(0.05)
            targets = out / "metrics" / "targets.json"
            for group in json.loads(targets.read_text()) if targets.exists() else ():
                with contextlib.suppress(aiohttp.ClientError):
                    page = await http.get(f"http://{group['targets'][0]}/metrics")
                    pages.append(await page.text())
    result = await work
    seen = "".join(pages)
    assert 'rstar_learner_step{kind="policy",run="out"}' in seen
    assert 'rstar_stage_running{round="0",run="out",stage="train policy"} 1.0' in seen
    assert json.loads((out / "metrics" / "targets.json").read_text()) == []
    samples = Samples.read(RunStore(out))
    steps = samples.series[m.LEARNER_STEPS.exported][(("kind", "policy"),)]
    assert steps.values[-1] == result.steps > 0
    shown = Console(file=StringIO(), width=120)
    show_top(out, shown, once=True)
    assert "finished" in shown.file.getvalue()


async def test_training_into_the_folder_of_a_run_leaves_its_account_alone(tmp_path, base, quiet):
    rows = [{"prompt": f"{n}?", "response": "<answer>7<end_of_answer>"} for n in range(8)]
    data = write_set(tmp_path / "set.jsonl", rows)
    write_made_run(tmp_path / "out", time.time() - 60, state="stopped")
    before = (tmp_path / "out" / "live.json").read_bytes()
    config = write_config(tmp_path / "c.yaml", base=str(base), data={"train": str(data)})
    await run_train("policy", config, console=quiet)
    assert (tmp_path / "out" / "live.json").read_bytes() == before


async def test_both_models_train_on_a_committed_round(tmp_path, base, quiet):
    run = RunFolder(tmp_path / "run")
    trees = [
        make_tree(
            code(f"good = {n}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n}", text=f"{n}?"),
        )
        for n in range(12)
    ]
    manifest = select_dataset(
        trees, run.dataset(2), template=SHORT_TEMPLATE, config=DatasetConfig()
    )
    data = {"run": str(run.root)}
    config = write_config(tmp_path / "c.yaml", base=str(base), data=data)

    policy = await run_train("policy", config, ["data.round=2"], console=quiet)
    assert policy.checkpoint.round == 2
    ppm = await run_train("ppm", config, [f"base={policy.checkpoint.path}"], console=quiet)
    assert ppm.examples == manifest["files"]["pairs_train"]["rows"]
    with pytest.raises(RunFolderError, match="round 1 is not committed"):
        await run_train("policy", config, ["data.round=5"], console=quiet)
    # its dataset has pairs, and no Q-values of all steps: it is to be selected again
    head = {**TRAIN, "objective": "q_regression"}
    config = write_config(tmp_path / "q.yaml", base=str(base), data=data, train_ppm=head)
    with pytest.raises(RunFolderError, match="round 1 is not committed"):
        await run_train("ppm", config, console=quiet)


class LostGroup:
    """A learner group that loses its machines so many times."""

    losses = 0
    ended = 0

    def __init__(self, settings: ActorConfig, storage: Path, **named: object) -> None:
        assert settings.replicas == 2

    def fit(self, request, show, again) -> FitResult:
        cls = type(self)
        if cls.losses:
            cls.losses -= 1
            raise LearnerLostError("learner group ended: node 7 is gone")
        return run_fit(request, progress=show)

    def shutdown(self, timeout_s: float) -> None:
        type(self).ended += 1


@pytest.fixture
def group(monkeypatch):
    class Own(LostGroup):
        pass

    monkeypatch.setattr("cluster.fleet.learner_group.LearnerGroup", Own)
    monkeypatch.setattr("ray.init", lambda **named: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return Own


async def test_ranks_that_lose_their_machines_train_again_and_say_why(tmp_path, base, quiet, group):
    rows = [{"prompt": f"{n}?", "response": "<answer>7<end_of_answer>"} for n in range(24)]
    data = {"train": str(write_set(tmp_path / "set.jsonl", rows))}
    config = write_config(
        tmp_path / "c.yaml", base=str(base), data=data, learner={"replicas": 2}, stage_attempts=2
    )
    group.losses = 1
    result = await run_train("policy", config, console=quiet)
    lost = "learner group ended: node 7 is gone"
    assert f"done again: train policy, 1 of 2: {lost}" in " ".join(quiet.file.getvalue().split())
    assert (tmp_path / "out/checkpoints").is_dir() and result.steps > 0

    group.losses = 2
    again = [f"run_dir={tmp_path / 'other'}"]
    with pytest.raises(LearnerLostError, match=rf"failed 2 times \(stage_attempts\), .*{lost}"):
        await run_train("policy", config, again, console=quiet)
    assert (group.losses, group.ended) == (0, 2)


async def test_ppm_starts_from_the_trunk_of_its_run_or_the_one_asked_for(tmp_path, base, quiet):
    run = RunFolder(tmp_path / "run")
    trees = [
        make_tree(
            code(f"good = {n}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n}", text=f"{n}?"),
        )
        for n in range(12)
    ]
    select_dataset(trees, run.dataset(2), template=SHORT_TEMPLATE, config=DatasetConfig())
    for number in (0, 2):
        CheckpointStore(run.checkpoints).publish(
            "policy", number, lambda made: shutil.copytree(base, made, dirs_exist_ok=True), {}
        )
    shutil.copytree(base, run.base_model)
    named = {"models": {"ppm_trunk": "cold_start"}}
    (run.root / "config.yaml").write_text(yaml.safe_dump(named))
    config = write_config(tmp_path / "c.yaml", data={"run": str(run.root)})

    async def trunk(*overrides: str) -> str:
        result = await run_train("ppm", config, overrides, console=quiet)
        checkpoint = Path(result.checkpoint.path)
        card = (checkpoint / "README.md").read_text()
        return card.split("- trunk: `")[1].split("`")[0].removeprefix(f"{run.root}/")

    assert (await trunk()).startswith("checkpoints/round=0/policy")
    # another trunk is another fit, which does not pass for the one that is there
    with pytest.raises(LearnerError, match="ppm checkpoint of another base"):
        await trunk("ppm_trunk=base")
    base_out, policy_out = (f"run_dir={tmp_path / name}" for name in ("b", "p"))
    assert await trunk("ppm_trunk=base", base_out) == "base"
    assert (await trunk("ppm_trunk=policy", policy_out)).startswith("checkpoints/round=2/policy")
    first_out, second_out = (f"run_dir={tmp_path / name}" for name in ("first", "second"))
    previous = "ppm_trunk=previous"
    assert (await trunk(previous, first_out)).startswith("checkpoints/round=2/policy")
    CheckpointStore(run.checkpoints).publish(
        "ppm", 1, lambda made: shutil.copytree(base, made, dirs_exist_ok=True), {}
    )
    assert (await trunk(previous, second_out)).startswith("checkpoints/round=1/ppm")
    run.write(run.ruler_name(1), {"rankings": {"ppm": {"low": 0.46}}})
    third_out = f"run_dir={tmp_path / 'third'}"
    assert (await trunk(previous, third_out)).startswith("checkpoints/round=2/policy")
    with pytest.raises(ConfigError, match="either base or ppm_trunk"):
        await trunk("ppm_trunk=base", f"base={base}")


async def test_bad_input_is_one_line(tmp_path, base, quiet):
    data = write_set(tmp_path / "set.jsonl", [{"prompt": "a", "response": "b"}])
    good = {"base": str(base), "data": {"train": str(data)}}
    with pytest.raises(ConfigError, match=r"either data\.run or data\.train"):
        await run_train("policy", write_config(tmp_path / "a.yaml", base=str(base), data={}))
    with pytest.raises(ConfigError, match="unknown key 'train_polcy'; did you mean 'train_policy'"):
        await run_train("policy", write_config(tmp_path / "b.yaml", train_polcy={}, **good))
    with pytest.raises(RunFolderError, match="base is missing"):
        await run_train(
            "policy", write_config(tmp_path / "c.yaml", data=good["data"]), console=quiet
        )
    with pytest.raises(RunFolderError, match="no committed round"):
        empty = {"base": str(base), "data": {"run": str(tmp_path / "nowhere")}}
        await run_train("policy", write_config(tmp_path / "d.yaml", **empty), console=quiet)


@pytest.mark.parametrize("kind", ["policy", "ppm"])
async def test_a_base_without_step_markers_gets_them(tmp_path, quiet, kind):
    unmarked = write_tiny_policy(tmp_path / "unmarked", hidden=32, layers=1)
    write_byte_tokenizer(unmarked, markers=MARKERS[1:])
    rows = {"policy": {"prompt": "a", "response": "b"}}
    rows["ppm"] = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = write_set(tmp_path / "set.jsonl", [rows[kind]])
    config = write_config(tmp_path / "c.yaml", base=str(unmarked), data={"train": str(data)})
    result = await run_train(kind, config, ["dataset.validation_share=0"], console=quiet)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint.path)
    assert all(len(tokenizer(mark, add_special_tokens=False).input_ids) == 1 for mark in MARKERS)
