"""What ranks do together; two real ones, once for all tests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from learner import task as task_module
from learner.batch import tokenise_texts
from learner.dataset import DatasetError, read_pieces
from learner.fit import FitRequest, LearnerError, PolicyTrainConfig, PreferenceTrainConfig
from learner.packing import Share
from learner.ranks import from_all_ranks, machine_list, release_memory, share_out
from learner.select import DatasetConfig, select_dataset
from learner.spill import DiskList
from learner.task import Task, policy_task, preference_task
from rollout.prompt import SHORT_TEMPLATE
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_byte_tokenizer
from tests.two_ranks import on_two_ranks

NUM_TEXTS = 15
LIMIT = 200


def policy(folder: Path) -> Task:
    config = PolicyTrainConfig(max_sequence_tokens=LIMIT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return policy_task(tokenizer, request(folder, config), "train", spill=folder)


def ppm(folder: Path) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    wanted = request(folder, PreferenceTrainConfig(max_sequence_tokens=LIMIT))
    return preference_task(tokenizer, wanted, "train", spill=folder)


def request(folder: Path, config) -> FitRequest:
    return FitRequest(
        fit_id="f",
        kind="policy" if isinstance(config, PolicyTrainConfig) else "ppm",
        round=1,
        base="base",
        data=str(folder / "data"),
        checkpoints="checkpoints",
        config=config,
    )


def content(task: Task) -> dict[str, object]:
    """All that a plan and a step see of a task."""
    everything = task.pack(Share(examples=tuple(range(len(task)))))
    return {
        "left_out": dict(task.left_out),
        "ids": everything.input_ids.tolist(),
        "targets": everything.targets.tolist(),
        **{
            name: list(getattr(task, name))
            for name in ("tokens", "computed", "attended", "counts", "trained")
        },
    }


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def room_for(room: int):
    """`DiskList.append_pickled` on a disk with room for so many records."""
    append = DiskList.append_pickled

    def limited(records, data):
        if len(records) == room:
            raise NO_SPACE
        append(records, data)

    return limited


def error_of(folder: Path, on: object, broken: bool, **patch) -> str:
    """What a fit's data ends with; with a patch on a rank where something is broken."""
    there = mock.patch.multiple(on, **patch) if broken else contextlib.nullcontext()
    with there, pytest.raises(LearnerError) as caught:
        policy(folder)
    return str(caught.value)


def scenarios(rank: int, folder: Path) -> dict[str, object]:
    """Body of a rank: tokenise with a group, with and without faults on one of the ranks."""
    found: dict[str, object] = {}
    tokenised = []

    def counted(tokenizer, texts):
        tokenised.append(len(texts))
        return tokenise_texts(tokenizer, texts)

    with mock.patch.multiple(task_module, _TEXTS=4, _PAIRS=4):
        with mock.patch.object(task_module, "tokenise_texts", counted):
            found["policy"] = content(policy(folder))
        found["num_tokenised"] = sum(tokenised)
        found["ppm"] = content(ppm(folder))
        # Full at its first record, in the middle of a piece, at the last of all, when written.
        for room in (0, 5, len(policy(folder)) - 1):
            append = room_for(room)
            found[f"full {room}"] = error_of(folder, DiskList, rank == 1, append_pickled=append)
        flush = mock.Mock(side_effect=NO_SPACE)
        found["full at last"] = error_of(folder, DiskList, rank == 0, flush=flush)

        def broken(data, name, num_rows):
            yield from list(read_pieces(data, name, num_rows))[:-1]
            raise DatasetError("row 15 is bad")

        found["bad row"] = error_of(folder, task_module, rank == 1, read_pieces=broken)
        files = [machine_list(folder, "f") for _ in range(2)]
        for number, records in enumerate(files):
            records.append(f"record {number}")
            records.flush()
        dist.barrier()
        found["shared"] = [records[0] for records in files]
        found["file"] = os.fstat(files[0]._file.fileno()).st_ino
        found["afterwards"] = content(policy(folder))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifteen trajectories, of which the policy's limit leaves some out."""
    path = tmp_path_factory.mktemp("ranks")
    write_byte_tokenizer(path / "tokenizer")
    trees = [
        make_tree(
            code(f"good = {n}  # {'long ' * (n % 5) * 9}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n:02d}", text=f"{n}?"),
        )
        for n in range(NUM_TEXTS)
    ]
    config = DatasetConfig(validation_share=0.0)
    select_dataset(trees, path / "data", template=SHORT_TEMPLATE, config=config)
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    return on_two_ranks(scenarios, folder, folder)


@pytest.mark.parametrize("kind", ["policy", "ppm"])
def test_two_ranks_hold_what_one_rank_holds(folder, ranks, kind):
    alone = content({"policy": policy, "ppm": ppm}[kind](folder))
    assert alone["left_out"]["too_long"] > 0 and alone["ids"]
    assert [rank[kind] for rank in ranks] == [alone, alone]


def test_each_rank_tokenises_its_share(ranks):
    # of 15 texts, four by four
    assert [rank["num_tokenised"] for rank in ranks] == [8, 7]


def test_what_fails_on_one_rank_is_the_same_error_on_both(folder, ranks):
    said = {name: rank[name] for rank in ranks for name in rank if isinstance(rank[name], str)}
    assert len(said) == 5
    for name, message in said.items():
        assert [rank[name] for rank in ranks] == [message, message]
        if name.startswith("full"):
            assert message.startswith(f"fit 'f': cannot write {folder}: [Errno 28] No space left")
            assert message.endswith("TMPDIR names the folder that token ids go to")
    assert said["bad row"] == "fit 'f': row 15 is bad"


def test_ranks_of_a_machine_share_one_file_which_has_no_name(folder, ranks):
    assert [rank["shared"] for rank in ranks] == [["record 0", "record 1"]] * 2
    assert ranks[0]["file"] == ranks[1]["file"]
    assert not list(folder.glob("tmp*"))


def test_group_goes_on_after_an_error(ranks):
    assert [rank["afterwards"] for rank in ranks] == [rank["policy"] for rank in ranks]


def test_one_rank_makes_no_collective(folder, monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", None)
    assert len(policy(folder)) > 0
    assert from_all_ranks(lambda: 3, "f") == [3]


def test_items_are_worked_on_few_at_a_time_and_taken_in_order():
    sizes, taken = [], []

    def work(items):
        sizes.append(len(items))
        return [10 * item for item in items]

    share_out(iter(range(7)), work, taken.append, size=3, fit_id="f")
    assert (sizes, taken) == ([3, 3, 1], [0, 10, 20, 30, 40, 50, 60])


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives its heap back on demand"
)
def test_what_a_fit_held_goes_back_to_the_machine():
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    # too small to be mapped one by one, and the last one keeps the heap from shrinking by itself
    blocks = [torch.ones(16_000) for _ in range(4_000)]
    size = len(blocks) * blocks[0].nbytes
    del blocks[:-1]
    held = resident()
    release_memory()
    assert held - resident() > 0.5 * size
