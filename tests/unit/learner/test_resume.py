from __future__ import annotations

from dataclasses import replace

import pytest

from learner.fit import FitRequest, GateConfig, LearnerError, PolicyTrainConfig
from learner.resume import FitState, ResumeFolder, fingerprint
from rollout.run_store import RunStore

REQUEST = FitRequest(
    fit_id="f",
    kind="policy",
    round=1,
    base="base",
    data="data",
    checkpoints="checkpoints",
    config=PolicyTrainConfig(),
)


def state(step: int) -> FitState:
    return FitState(step=step, losses=[1.0] * step, grad_norms=[], seconds=2.0)


def commit(folder: ResumeFolder, step: int) -> None:
    (folder.path / f"step={step}").mkdir(parents=True)
    folder.commit(state(step))


def test_latest_committed_state_is_read_and_older_ones_go(tmp_path):
    folder = ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=2)
    assert folder.read() is None
    commit(folder, 3)
    commit(folder, 6)
    assert folder.read() == state(6)
    assert [path.name for path in folder.path.glob("step=*")] == ["step=6"]


def test_writer_killed_before_the_commit_leaves_the_state_before(tmp_path):
    folder = ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=2)
    commit(folder, 3)
    (folder.path / "step=6").mkdir()
    assert folder.read() == state(3)


def test_state_whose_files_are_gone_or_unreadable_is_none(tmp_path):
    folder = ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=2)
    commit(folder, 3)
    (folder.path / "STATE.json").write_text("{")
    assert folder.read() is None
    commit(folder, 4)
    (folder.path / "step=4").rmdir()
    assert folder.read() is None


def test_clear_takes_the_states_of_all_fits(tmp_path):
    for world_size, fit in ((1, "e" * 64), (2, "f" * 64)):
        commit(ResumeFolder(RunStore(tmp_path), fit, world_size=world_size), 3)
    ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=2).clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"fit_id": "g", "previous": "p", "force": True}, True),
        ({"config": PolicyTrainConfig(gate=GateConfig(action="off"), num_threads=2)}, True),
        ({"config": PolicyTrainConfig(learning_rate=1e-5)}, False),
        ({"seed": 1}, False),
        ({"base": "other"}, False),
    ],
)
def test_fingerprint_covers_what_the_weights_depend_on(change, same):
    other = fingerprint(replace(REQUEST, **change), "digest")
    assert (other == fingerprint(REQUEST, "digest")) is same


def test_fingerprint_covers_the_data():
    assert fingerprint(REQUEST, "digest") != fingerprint(REQUEST, "other")


def test_another_number_of_ranks_is_refused_and_told_what_to_do(tmp_path):
    two = ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=2)
    commit(two, 3)
    one = ResumeFolder(RunStore(tmp_path), "f" * 64, world_size=1)
    with pytest.raises(LearnerError, match=r"cut off at step 3 with 2 ranks.*not with 1.*remove"):
        one.read()
    assert two.read() == state(3)
    assert ResumeFolder(RunStore(tmp_path), "e" * 64, world_size=1).read() is None
    commit(one, 6)  # further than the two ranks came
    assert one.read() == state(6)
