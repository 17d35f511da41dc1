from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from learner import dataset as dataset_module
from learner import select as select_module
from learner import spill as spill_module
from learner import task as task_module
from learner.dataset import SFTExample, read_pairs, read_sft, writing_dataset
from learner.fit import FitRequest, LearnerError, PolicyTrainConfig, PreferenceTrainConfig
from learner.select import DatasetConfig, select_dataset
from learner.spill import DiskList
from learner.task import plan_fit, policy_task, preference_task
from rollout.prompt import SHORT_TEMPLATE, Segment
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_byte_tokenizer

NOISE = "".join(chr(97 + number * 7 % 26) for number in range(300))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


def trees(count: int):
    for number in range(count):
        yield make_tree(
            code(f"good = {number}  # {NOISE}", answered("7", correct=True)),
            code(f"fair = {number}  # {NOISE}", answered("7", correct=True)),
            code(f"bad = {number}  # {NOISE}", answered("8", correct=False)),
            problem=make_problem(f"p{number:05d}", text=f"{number}? {NOISE}"),
        )


def select(folder: Path, count: int, *, valued_steps: bool = False) -> None:
    select_dataset(
        trees(count),
        folder,
        template=SHORT_TEMPLATE,
        config=DatasetConfig(validation_share=0.0),
        valued_steps=valued_steps,
        memory_bytes=1 << 14,
    )


def request(folder: Path, config, **changes) -> FitRequest:
    fields = {
        "fit_id": "f",
        "kind": "policy" if isinstance(config, PolicyTrainConfig) else "ppm",
        "round": 1,
        "base": "base",
        "data": str(folder),
        "checkpoints": "checkpoints",
        "config": config,
    }
    return FitRequest(**fields | changes)


def peak_bytes(work, *arguments) -> int:
    """Most that Python held at a time for a call."""
    tracemalloc.start()
    try:
        work(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_a_selection_grows_slower_than_its_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_ROW_GROUP_ROWS", 16)
    monkeypatch.setattr(spill_module, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(select_module, "_TREES", 4)
    select(tmp_path / "warm", 10)
    small = peak_bytes(select, tmp_path / "small", 20)
    large = peak_bytes(select, tmp_path / "large", 120)
    assert sum(1 for _ in read_sft(tmp_path / "large", "train")) == 240
    assert large < 3 * small  # six times the trees


def test_memory_of_a_fits_data_grows_by_a_few_numbers_an_example(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_module, "_BATCH_ROWS", 8)
    monkeypatch.setattr(task_module, "_TEXTS", 4)
    for name, count in (("small", 5), ("large", 60)):
        select(tmp_path / name, count)
    config = PolicyTrainConfig(batch_examples=4)

    def prepare(name):
        task = policy_task(tokenizer, request(tmp_path / name, config), "train", spill=tmp_path)
        for step in plan_fit(task, config, world_size=1, seed=0):
            for shares in step.micro:
                task.pack(shares[0])
        return task

    prepare("small")
    small, large = peak_bytes(prepare, "small"), peak_bytes(prepare, "large")
    task = prepare("large")
    more_ids = 4 * sum(task.tokens) * 55 / 60
    assert large - small < 0.5 * more_ids


def test_task_reads_back_what_it_tokenised_in_any_order(tmp_path, tokenizer):
    select(tmp_path / "data", 10)
    config = PolicyTrainConfig(micro_batch_tokens=4096, batch_examples=6)
    task = policy_task(tokenizer, request(tmp_path / "data", config), "train", spill=tmp_path)
    texts = ["".join(s.text for s in e.segments) for e in read_sft(tmp_path / "data", "train")]
    assert [n - 1 for n in task.tokens] == [len(tokenizer(text).input_ids) for text in texts]
    (step,) = plan_fit(task, config, world_size=1, seed=3)[:1]
    assert sorted(step.examples) != list(range(6))
    for (share,) in step.micro:
        row = tokenizer.decode(task.pack(share).input_ids[0])
        assert row == "".join(texts[e] + tokenizer.eos_token for e in share.examples)
    assert not [path for path in tmp_path.iterdir() if path.name != "data"]


def test_q_regression_trains_on_all_steps_and_is_judged_by_pairs(tmp_path, tokenizer):
    select(tmp_path / "data", 4, valued_steps=True)
    wanted = request(tmp_path / "data", PreferenceTrainConfig(objective="q_regression"))
    task = preference_task(tokenizer, wanted, "train", spill=tmp_path)
    # each of the three solutions has three steps, the first ones behind one prefix
    assert sorted(task.counts) == sorted([3, 1, 1, 1, 1, 1, 1] * 4)
    (step,) = plan_fit(task, wanted.config, world_size=1, seed=0)
    assert task.denominator(step) == 36.0
    assert not any(task.trained)
    held_out = preference_task(tokenizer, wanted, "validation", spill=tmp_path)
    assert len(held_out) == 0
    pairs = request(tmp_path / "data", PreferenceTrainConfig())
    assert sum(preference_task(tokenizer, pairs, "train", spill=tmp_path).counts) == 4 * 4
    with pytest.raises(LearnerError, match=r"no steps with a Q-value .* another objective"):
        select(tmp_path / "without", 4)
        preference_task(
            tokenizer, request(tmp_path / "without", wanted.config), "train", spill=tmp_path
        )


def test_outcome_objective_takes_whole_trajectories_only(tmp_path, tokenizer):
    select(tmp_path / "data", 4)
    kinds = {pair.kind.value for pair in read_pairs(tmp_path / "data", "train")}
    assert kinds == {"step", "answer"}
    config = PreferenceTrainConfig(objective="outcome")
    wanted = request(tmp_path / "data", config)
    task = preference_task(tokenizer, wanted, "train", spill=tmp_path)
    assert {group.kind.value for group in task.groups} == {"answer"}
    with pytest.raises(LearnerError, match="no preference pairs to train on"):
        select(tmp_path / "empty", 0)
        preference_task(tokenizer, request(tmp_path / "empty", config), "train", spill=tmp_path)


class Refusing:
    """A tokenizer that knows no Greek; what it raises has no type of its own."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, texts, **options):
        if any("π" in text for text in texts):
            raise Exception("no token for 'π'")
        return self._tokenizer(texts, **options)


def write_texts(folder: Path, texts: list[str]) -> None:
    """One trajectory a text."""
    with writing_dataset(folder) as writer:
        for number, text in enumerate(texts):
            segments = (Segment(text="How many?", trained=False), Segment(text=text, trained=True))
            writer.add(
                "sft_train",
                SFTExample(
                    problem_id=f"p{number}",
                    level="gsm",
                    origin="tree",
                    round=1,
                    mean_q=1.0,
                    segments=segments,
                ),
            )
        writer.commit(template="short", counts={}, excluded={})


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path, tokenizer):
    write_texts(tmp_path / "data", ["one", "π", "", "two", "x" * 99, "three", "2π"])
    wanted = request(tmp_path / "data", PolicyTrainConfig(max_sequence_tokens=60))
    task = policy_task(Refusing(tokenizer), wanted, "train", spill=tmp_path)
    assert task.left_out == {"untokenisable": 2, "empty": 1, "too_long": 1}
    assert task.trained.tolist() == [len(text) + 1 for text in ("one", "two", "three")]


def test_nodes_that_cannot_be_tokenised_are_left_out_and_counted(tmp_path, tokenizer):
    more = make_tree(
        code("good = 'π'", answered("7", correct=True)),
        code("bad = 1", answered("8", correct=False)),
        problem=make_problem("greek", text="How many?"),
    )
    select_dataset(
        [*trees(3), more],
        tmp_path / "data",
        template=SHORT_TEMPLATE,
        config=DatasetConfig(validation_share=0.0),
    )
    wanted = request(tmp_path / "data", PreferenceTrainConfig())
    task = preference_task(Refusing(tokenizer), wanted, "train", spill=tmp_path)
    assert task.left_out == {"untokenisable": 2}
    assert len(task) == 2 * 3


def test_set_of_which_nothing_is_left_says_why(tmp_path, tokenizer):
    write_texts(tmp_path / "data", ["π", "", "", "x" * 99])
    wanted = request(tmp_path / "data", PolicyTrainConfig(max_sequence_tokens=60))
    message = (
        "all 4 trajectories in .* are left out: "
        "1 refused by the tokenizer .no token for 'π'., 2 without a token to train on, "
        "1 longer than max_sequence_tokens = 60"
    )
    with pytest.raises(LearnerError, match=message):
        policy_task(Refusing(tokenizer), wanted, "train", spill=tmp_path)
    assert len(policy_task(Refusing(tokenizer), wanted, "validation", spill=tmp_path)) == 0


def test_full_disk_is_an_error_that_names_its_folder(tmp_path, tokenizer, monkeypatch):
    def full(records, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_texts(tmp_path / "data", ["one"])
    monkeypatch.setattr(DiskList, "append_pickled", full)
    with pytest.raises(LearnerError, match=f"cannot write {tmp_path}: .*No space left.*TMPDIR"):
        policy_task(
            tokenizer, request(tmp_path / "data", PolicyTrainConfig()), "train", spill=tmp_path
        )
