"""Two real gloo ranks behind Ray Train: fits share one group, errors and deaths do not end it.

`rstar train` on two ranks runs in a process of its own, with a Ray of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from cluster.fleet.config import ActorConfig
from cluster.fleet.learner_group import LearnerGroup
from learner.checkpoint import CheckpointStore, directory_digest
from learner.fit import FitRequest, LearnerError, PolicyTrainConfig, PreferenceTrainConfig
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import SHORT_TEMPLATE
from rollout.run_store import RunStore
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_tiny_policy

pytestmark = pytest.mark.slow

POLICY = PolicyTrainConfig(num_epochs=2, batch_examples=8, learning_rate=5e-3, zero_stage=1)
PPM = PreferenceTrainConfig(num_epochs=4, batch_examples=16, learning_rate=3e-3, zero_stage=1)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    group = LearnerGroup(ActorConfig(replicas=2), RunStore(tmp_path_factory.mktemp("run")))
    group.start()
    yield group
    group.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    policy = write_tiny_policy(tmp_path_factory.mktemp("policy"), hidden=32, layers=1)
    trees = [
        make_tree(
            code(f"good = {n}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n}", text=f"{n}?"),
        )
        for n in range(24)
    ]
    config = DatasetConfig(validation_share=0.3)
    data = tmp_path_factory.mktemp("data")
    select_dataset(trees, data, template=SHORT_TEMPLATE, config=config)
    checkpoints = tmp_path_factory.mktemp("checkpoints")

    def make(config, round, **changes):
        kind = "policy" if isinstance(config, PolicyTrainConfig) else "ppm"
        fields = {
            "fit_id": f"round={round}/{kind}",
            "kind": kind,
            "round": round,
            "base": str(policy),
            "data": str(data),
            "checkpoints": str(checkpoints),
            "config": config,
        }
        return FitRequest(**fields | changes)

    return make


def test_policy_and_ppm_train_in_the_same_group_and_load_in_transformers(group, request_of):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = group.fit(request_of(POLICY, 1))
    assert policy.loss_curve[-1][1] < policy.loss_curve[0][1]
    AutoModelForCausalLM.from_pretrained(policy.checkpoint.path)

    ppm = group.fit(request_of(PPM, 1, base=policy.checkpoint.path))
    assert ppm.metrics["pair_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(ppm.checkpoint.path)
    assert model.config.num_labels == 1
    assert CheckpointStore(request_of(PPM, 1).checkpoints).current("ppm", 1) == ppm.checkpoint


def test_two_ranks_train_as_one_does(group, request_of):
    from learner.trainer import run_fit

    pair = group.fit(request_of(POLICY, 2))
    alone = run_fit(request_of(POLICY, 3))
    assert [loss for _, loss in pair.loss_curve] == pytest.approx(
        [loss for _, loss in alone.loss_curve], rel=1e-3
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_gives_the_same_losses(group, request_of, stage):
    reference = group.fit(request_of(POLICY, 4 + 2 * stage))
    config = POLICY.model_copy(update={"zero_stage": stage})
    result = group.fit(request_of(config, 5 + 2 * stage))
    assert [loss for _, loss in result.loss_curve] == pytest.approx(
        [loss for _, loss in reference.loss_curve], rel=1e-3
    )
    assert result.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=1e-3)


def test_bad_request_is_answered_and_the_next_one_still_runs(group, request_of, tmp_path):
    with pytest.raises(LearnerError, match="no checkpoint in"):
        group.fit(request_of(POLICY, 20, base=str(tmp_path)))
    assert group.fit(request_of(POLICY, 20)).steps > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_rank_costs_time_but_not_the_fit(group, request_of, stage):
    config = POLICY.model_copy(
        update={"total_tokens": 40_000, "zero_stage": stage, "save_every_steps": 20}
    )
    reference = group.fit(request_of(config, 30 + 2 * stage))
    killed = []

    def kill_one_rank(progress):
        if not killed and progress.phase == "training" and progress.step > 25:
            children = psutil.Process().children(recursive=True)
            workers = [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]
            killed.append(workers[-1].pid)
            os.kill(workers[-1].pid, signal.SIGKILL)

    request = request_of(config, 31 + 2 * stage)
    result = group.fit(request, on_progress=kill_one_rank)
    assert killed
    assert result.resumed_from >= 20
    assert result.loss_curve == reference.loss_curve
    assert result.metrics == reference.metrics
    # the finished fit is reported, not redone
    assert group.fit(request).checkpoint == result.checkpoint


def test_rstar_train_on_two_ranks_publishes_and_logs(request_of, tmp_path):
    settings = {"zero_stage": 1, "batch_examples": 8, "learning_rate": 5e-3, "num_epochs": 2}
    rows = [{"prompt": f"{n}?", "response": "<answer>7<end_of_answer>"} for n in range(24)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(tmp_path / "run"),
        "base": request_of(POLICY, 1).base,
        "data": {"train": str(tmp_path / "set.jsonl")},
        "learner": {"replicas": 2},
        "train_policy": settings,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cluster", "train", "policy", str(tmp_path / "train.yaml")]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    made = store.current("policy", 0)
    assert made is not None and made.path in done.stdout
    assert directory_digest(Path(made.path)) == made.digest
    folder = store.home("policy", 0).local
    assert folder is not None
    *steps, last = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert steps[-1]["loss"] < steps[0]["loss"] and last["held"] is None
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
