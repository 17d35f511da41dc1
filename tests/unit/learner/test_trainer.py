from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto import event_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.checkpoint import CheckpointStore, directory_digest
from learner.dataset import read_manifest, read_sft
from learner.fit import (
    FitRequest,
    GateConfig,
    LearnerError,
    PolicyTrainConfig,
    PreferenceTrainConfig,
    RankError,
)
from learner.preference_model import load_preference_model, values
from learner.select import DatasetConfig, select_dataset
from learner.spill import DiskList
from learner.trainer import run_fit
from rollout.prompt import MARKERS, SHORT_TEMPLATE
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_byte_tokenizer, write_tiny_policy

POLICY = PolicyTrainConfig(
    num_epochs=4, batch_examples=8, learning_rate=5e-3, warmup_share=0.1, zero_stage=0
)
PPM = PreferenceTrainConfig(num_epochs=6, batch_examples=16, learning_rate=3e-3, zero_stage=0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"), hidden=32, layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Problems whose right first step is always `good = n`."""
    trees = [
        make_tree(
            code(f"good = {n}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n}", text=f"{n}?"),
        )
        for n in range(24)
    ]
    config = DatasetConfig(validation_share=0.3)
    path = tmp_path_factory.mktemp("data")
    manifest = select_dataset(
        trees, path, template=SHORT_TEMPLATE, config=config, valued_steps=True
    )
    assert all(file["rows"] for file in manifest["files"].values())
    return path


@pytest.fixture
def fit(policy, data, tmp_path):
    def run(config, *, progress=None, round=1, **changes):
        request = {
            "fit_id": "test",
            "kind": "policy" if isinstance(config, PolicyTrainConfig) else "ppm",
            "round": round,
            "base": str(policy),
            "data": str(data),
            "checkpoints": str(tmp_path),
            "config": config,
        }
        return run_fit(FitRequest(**request | changes), progress=progress)

    return run


def test_policy_learns_and_its_checkpoint_is_published_for_transformers(fit, tmp_path, policy):
    seen = []
    result = fit(POLICY, progress=seen.append)

    losses = [loss for _, loss in result.loss_curve]
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["loss"] == pytest.approx(losses[-1], rel=0.5)
    last = [report for report in seen if report.phase == "training"][-1]
    assert (last.step, last.num_steps) == (result.steps, result.steps)
    store = CheckpointStore(tmp_path)
    assert store.current("policy", 1) == result.checkpoint
    assert store.info("policy", 1)["metrics"] == result.metrics
    trained = AutoModelForCausalLM.from_pretrained(result.checkpoint.path)
    before = AutoModelForCausalLM.from_pretrained(policy)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint.path)
    assert (
        tokenizer("<code>x").input_ids == AutoTokenizer.from_pretrained(policy)("<code>x").input_ids
    )


def test_same_seed_gives_the_same_losses_and_another_seed_others(fit):
    first, again = fit(POLICY, round=1), fit(POLICY, round=2)
    other = fit(POLICY, round=3, seed=1)
    assert first.loss_curve == again.loss_curve
    assert first.loss_curve != other.loss_curve


@pytest.mark.parametrize("config", [POLICY, PPM], ids=["policy", "ppm"])
def test_losses_do_not_depend_on_how_a_batch_is_cut_into_micro_batches(fit, config):
    whole = fit(config, round=1)
    cut = fit(config.model_copy(update={"micro_batch_tokens": 200}), round=2)
    assert [loss for _, loss in cut.loss_curve] == pytest.approx(
        [loss for _, loss in whole.loss_curve], rel=1e-3
    )


def test_ppm_learns_what_tells_right_from_wrong_on_problems_it_never_met(fit):
    result = fit(PPM)
    assert result.metrics["pair_accuracy"] == 1.0
    assert result.metrics["pair_accuracy_answer"] == 1.0
    assert result.metrics["pair_margin"] > 0.5
    assert result.metrics["value_correct"] > 0.2 > -0.2 > result.metrics["value_incorrect"]

    path = result.checkpoint.path
    prefix = "<|user|>99?<|assistant|>"
    texts = [f"{prefix}<code>\n{name} = 99\n<end_of_step>" for name in ("good", "bad")]
    good, bad = values(load_preference_model(path), AutoTokenizer.from_pretrained(path), texts)
    assert good > bad


def test_auxiliary_loss_is_counted_and_changes_the_training(fit):
    plain = fit(PPM, round=1)
    auxiliary = fit(PPM.model_copy(update={"lm_weight": 0.1}), round=2)
    assert plain.loss_tokens == 0 < auxiliary.loss_tokens
    assert auxiliary.loss_curve[0][1] > plain.loss_curve[0][1]


def test_auxiliary_loss_of_a_tied_policy_is_read_out_by_its_embedding(fit, tmp_path):
    tied = write_tiny_policy(tmp_path / "tied", hidden=32, layers=1, tied=True)
    config = PPM.model_copy(update={"lm_weight": 0.1, "num_epochs": 1})
    assert fit(config, base=str(tied)).loss_tokens > 0


@pytest.mark.parametrize("objective", ["q_regression", "outcome"])
def test_ablation_heads_learn_what_tells_right_from_wrong(fit, objective):
    result = fit(PPM.model_copy(update={"objective": objective, "num_epochs": 12}))
    assert result.metrics["pair_accuracy_answer"] == 1.0
    assert result.metrics["value_correct"] > 0.3 > -0.3 > result.metrics["value_incorrect"]


def test_fit_that_was_cut_off_goes_on_with_the_same_losses(fit, tmp_path):
    config = POLICY.model_copy(update={"save_every_steps": 3})
    whole = fit(config, round=1)

    def stop(progress):
        states = list((tmp_path / "round=2" / "policy" / ".resume").glob("*/STATE.json"))
        if states and progress.phase == "training" and progress.step >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, round=2, progress=stop)
    again = fit(config, round=2)
    assert again.resumed_from >= 3
    assert again.loss_curve == whole.loss_curve
    assert again.metrics == whole.metrics
    assert not (tmp_path / "round=2" / "policy" / ".resume").exists()
    lines = (tmp_path / "round=2" / "policy" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [line["step"] for line in steps[:-1]] == list(range(1, whole.steps + 1))
    assert [line["loss"] for line in steps[:-1]] == [loss for _, loss in whole.loss_curve]


def test_state_of_another_config_is_not_taken_up(fit, tmp_path):
    config = POLICY.model_copy(update={"save_every_steps": 1})

    def stop(progress):
        if list((tmp_path / "round=1" / "policy" / ".resume").glob("*/STATE.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, progress=stop)
    other = config.model_copy(update={"learning_rate": 1e-3})
    assert fit(other).resumed_from == 0


def test_finished_fit_is_answered_from_its_record(fit, monkeypatch):
    first = fit(POLICY)

    def prepare(request):
        raise AssertionError("trained again")

    monkeypatch.setattr("learner.trainer.prepare", prepare)
    assert fit(POLICY) == replace(first, seconds_save=0.0)
    with pytest.raises(LearnerError, match="round 1 has a policy checkpoint of another"):
        fit(POLICY, seed=5)


def test_model_card_names_data_and_metrics(fit, data):
    result = fit(POLICY)
    card = (Path(result.checkpoint.path) / "README.md").read_text()
    assert read_manifest(data)["digest"] in card
    assert f"{result.metrics['loss']:.4f}" in card
    assert "learning_rate: 0.005" in card


def test_metrics_are_logged_for_people_and_tensorboard(fit, tmp_path):
    result = fit(POLICY)
    folder = tmp_path / "round=1" / "policy"
    *steps, last = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)
    assert last["validation"] == result.metrics
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert result.mean_grad_norm == pytest.approx(
        sum(line["grad_norm"] for line in steps) / len(steps)
    )
    assert result.mfu is None


def board_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of TensorBoard's event files: frames of length, crc, event, crc."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            at += 16 + length
    return found


def test_all_signals_are_in_tensorboard(fit, tmp_path):
    result = fit(PPM.model_copy(update={"peak_tflops": 0.1}))
    board = board_scalars(tmp_path / "round=1" / "ppm" / "tensorboard")

    losses = dict(result.loss_curve)
    assert board["train/loss"] == pytest.approx(losses, rel=1e-5)
    for name in ("grad_norm", "learning_rate", "tokens_per_s", "mfu"):
        assert list(board[f"train/{name}"]) == list(losses)
    for name in ("pair_accuracy", "pair_margin", "calibration_error", "value_correct"):
        assert board[f"validation/{name}"] == {
            result.steps: pytest.approx(result.metrics[name], rel=1e-5)
        }


def test_progress_tells_what_a_dashboard_shows(fit):
    seen = []
    fit(POLICY.model_copy(update={"peak_tflops": 0.1}), progress=seen.append)
    last = [report for report in seen if report.phase == "training"][-1]
    assert (last.fit_id, last.step, last.num_steps) == ("test", last.num_steps, last.num_steps)
    assert last.loss > 0 and last.tokens_per_s > 0 and last.grad_norm > 0 and last.mfu > 0


def test_mfu_is_the_share_of_the_given_peak(fit):
    result = fit(POLICY.model_copy(update={"peak_tflops": 0.1}))
    assert 0.0 < result.mfu < 1.0


BROKEN = POLICY.model_copy(update={"learning_rate": 30.0, "num_epochs": 1, "warmup_share": 0.0})


def test_clearly_worse_policy_is_held_back_and_the_earlier_one_serves(fit, tmp_path):
    good = fit(POLICY, round=1)
    gate = {"gate": GateConfig(min_examples=2)}
    worse = BROKEN.model_copy(update=gate)
    held = fit(worse, round=2, previous=good.checkpoint.path)

    assert held.held.startswith("worse_than_previous: loss")
    assert held.held in held.warnings
    assert held.metrics["previous_loss"] == pytest.approx(good.metrics["loss"], rel=1e-5)
    store = CheckpointStore(tmp_path)
    assert store.current("policy", 2).path == good.checkpoint.path == held.checkpoint.path
    assert store.held("policy", 2) == held.held
    assert fit(worse, round=2, previous=good.checkpoint.path).held == held.held

    released = fit(worse, round=2, previous=good.checkpoint.path, force=True)
    assert released.held is None
    assert store.current("policy", 2).path != good.checkpoint.path
    assert store.held("policy", 2) is None
    current = store.current("policy", 2)
    assert directory_digest(Path(current.path)) == current.digest


def test_as_good_a_policy_passes_the_gate(fit):
    good = fit(POLICY, round=1)
    config = POLICY.model_copy(update={"gate": GateConfig(min_examples=2)})
    assert fit(config, round=2, previous=good.checkpoint.path, seed=1).held is None


def test_loss_that_is_not_finite_leaves_the_earlier_checkpoint_in_service(fit, tmp_path):
    good = fit(POLICY, round=1)
    config = POLICY.model_copy(update={"learning_rate": 1e30, "clip_norm": 0.0})
    held = fit(config, round=2, previous=good.checkpoint.path)
    assert held.held.startswith("not_finite: fit 'test': ")
    assert CheckpointStore(tmp_path).current("policy", 2).path == good.checkpoint.path
    with pytest.raises(LearnerError, match="at step"):
        fit(config, round=3, previous=good.checkpoint.path, force=True)


def test_ppm_at_chance_is_a_warning_and_calibration_is_measured(fit):
    config = PPM.model_copy(update={"learning_rate": 1e-9, "num_epochs": 1})
    result = fit(config)
    (warning,) = result.warnings
    assert warning.startswith("accuracy_at_chance: pair accuracy")
    assert result.held is None
    answers = sum(count for count, _, _ in result.calibration)
    assert answers > 0
    # nothing learned: all chances near a half, half of the trajectories correct
    assert result.metrics["calibration_error"] == pytest.approx(0.0, abs=0.1)


def test_token_budget_repeats_the_data_until_it_is_spent(fit):
    config = POLICY.model_copy(update={"total_tokens": 6000, "batch_tokens": 512})
    result = fit(config)
    assert 6000 <= result.useful_tokens < 6512
    assert result.computed_tokens == result.useful_tokens
    assert result.epochs > 2


def test_long_examples_are_left_out_and_counted(fit, policy, data):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    lengths = [
        len(tokenizer("".join(s.text for s in example.segments)).input_ids) + 1
        for example in read_sft(data, "train")
    ]
    shortest = min(lengths)
    assert shortest < max(lengths)

    result = fit(POLICY.model_copy(update={"max_sequence_tokens": shortest}))
    assert result.examples == lengths.count(shortest)
    assert result.left_out == {"too_long": len(lengths) - lengths.count(shortest)}
    with pytest.raises(LearnerError, match="longer than max_sequence_tokens = 8"):
        fit(POLICY.model_copy(update={"max_sequence_tokens": 8}), round=2)


def test_token_ids_go_to_a_folder_of_the_machine(fit, monkeypatch, tmp_path):
    folders = []
    make = DiskList.__init__

    def noted(records, folder):
        folders.append(folder)
        make(records, folder)

    monkeypatch.setattr(DiskList, "__init__", noted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    fit(POLICY)
    assert folders == [tmp_path / "local"] * 2
    assert not list((tmp_path / "local").iterdir())


def test_loss_that_is_not_finite_is_an_error_that_says_what_to_lower(fit, policy, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(broken)
    write_byte_tokenizer(broken)
    with pytest.raises(LearnerError, match=r"loss is nan at step 1 of .*lower learning_rate"):
        fit(POLICY, base=str(broken))
    assert CheckpointStore(tmp_path).current("policy", 1) is None


def test_bad_input_is_one_clear_error(fit, policy, tmp_path):
    with pytest.raises(LearnerError, match=r"no checkpoint in .*nowhere"):
        fit(POLICY, base=str(tmp_path / "nowhere"))
    with pytest.raises(LearnerError, match=r"no complete training data in .*nowhere"):
        fit(POLICY, data=str(tmp_path / "nowhere"))
    select_dataset([], tmp_path / "empty", template=SHORT_TEMPLATE, config=DatasetConfig())
    with pytest.raises(LearnerError, match="no preference pairs to train on"):
        fit(PPM, data=str(tmp_path / "empty"))
    AutoModelForCausalLM.from_pretrained(policy).save_pretrained(tmp_path / "unmarked")
    write_byte_tokenizer(tmp_path / "unmarked", markers=MARKERS[:-1])
    with pytest.raises(LearnerError, match="lacks step markers"):
        fit(POLICY, base=str(tmp_path / "unmarked"))


def test_rank_out_of_memory_says_what_to_lower(fit, monkeypatch):
    def step(*arguments):
        raise MemoryError("no more")

    monkeypatch.setattr("learner.trainer.forward_backward", step)
    with pytest.raises(RankError, match=r"rank 0 is out of memory .*lower micro_batch_tokens"):
        fit(POLICY)


def test_state_that_cannot_be_written_is_one_error_and_the_state_before_stays(
    fit, monkeypatch, tmp_path
):
    from deepspeed import DeepSpeedEngine

    config = POLICY.model_copy(update={"save_every_steps": 2})
    save = DeepSpeedEngine.save_checkpoint

    def full(engine, folder, tag, **options):
        save(engine, folder, tag=tag, **options)
        if tag == "step=4":
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(DeepSpeedEngine, "save_checkpoint", full)
    with pytest.raises(RankError, match=r"cannot write .*step=4: .*GiB free.*goes on from"):
        fit(config)
    assert not list(tmp_path.rglob("step=4"))
    monkeypatch.setattr(DeepSpeedEngine, "save_checkpoint", save)
    assert fit(config).resumed_from == 2


def test_fit_that_another_number_of_ranks_began_is_refused(fit, tmp_path):
    config = POLICY.model_copy(update={"save_every_steps": 3})

    def stop(progress):
        if list((tmp_path / "round=1" / "policy" / ".resume").glob("*/STATE.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, progress=stop)
    (state,) = (tmp_path / "round=1" / "policy" / ".resume").iterdir()
    state.rename(state.with_name(state.name.replace("ranks=1", "ranks=2")))
    with pytest.raises(LearnerError, match=r"fit 'test': it was cut off at step .* with 2 ranks"):
        fit(config)


def test_request_with_the_other_kinds_config_is_refused(fit):
    with pytest.raises(ValueError, match="needs a PreferenceTrainConfig"):
        fit(POLICY, kind="ppm")


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"zero_stage": 1, "offload": True},
        {"zero_stage": 2, "offload": True},
        {"zero_stage": 3},
    ],
    ids=["checkpointing", "offload-1", "offload-2", "zero-3"],
)
def test_ways_to_save_memory_do_not_change_the_losses(fit, change):
    plain = fit(POLICY.model_copy(update={"num_epochs": 1}), round=1)
    saving = fit(POLICY.model_copy(update={"num_epochs": 1} | change), round=2)
    assert [loss for _, loss in saving.loss_curve] == pytest.approx(
        [loss for _, loss in plain.loss_curve], rel=1e-3
    )


def test_bfloat16_trains_and_is_saved_as_such(fit):
    result = fit(POLICY.model_copy(update={"precision": "bfloat16", "zero_stage": 1}))
    assert result.loss_curve[-1][1] < 0.8 * result.loss_curve[0][1]
    state = load_file(Path(result.checkpoint.path) / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_a_fit_tells_what_it_does_from_its_first_row_on(fit):
    told = []
    fit(POLICY, round=7, progress=told.append)
    phases = list(dict.fromkeys(report.phase for report in told))
    assert phases[0] == "reading" and phases[-1] == "saving" and "training" in phases
    reading = told[0]
    assert 0 < reading.step <= reading.num_steps and reading.facts() == {"now": "reading"}
    last = [report for report in told if report.phase == "training"][-1]
    assert last.step == last.num_steps and last.facts().keys() == {"loss", "tokens/s"}
