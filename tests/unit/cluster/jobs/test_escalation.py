"""Which unsolved problems are searched on, read back from committed trees."""

from __future__ import annotations

import pytest

from cluster.jobs.escalation import StageCost, plan_escalation, rollout_share
from rollout.difficulty import SuspectConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import answer, answered, code, failed, make_problem, make_tree

WRONG = ["8"] * 4


def committed(tmp_path, answers_by_tree):
    """A round whose trees (problem id, index, answers, tokens) are committed, a shard each; no
    rollout reached an answer in brackets."""
    trees = TrajectoryStore(RunStore(str(tmp_path)), 1)
    for number, (problem_id, index, answers, tokens) in enumerate(answers_by_tree):
        found = [answer(a.strip("()"), correct="7" in a, visited="(" not in a) for a in answers]
        problem = make_problem(problem_id, answer="7")
        tree = make_tree(*(found or [failed()]), problem=problem, index=index)
        tree.generated_tokens = tokens
        trees.commit(f"shard-{number}", [tree], info={})
    names = {problem_id for problem_id, *_ in answers_by_tree} | {"never-searched"}
    return trees, {name: make_problem(name, answer="7") for name in sorted(names)}


def plan(trees, problems, **changes):
    settings = {"leave_suspects": True, "max_generated_tokens": 500, **changes}
    return plan_escalation(trees, problems, suspect=SuspectConfig(), **settings)


ROUND = [
    ("agreed", 0, WRONG, 10),
    ("agreed", 1, WRONG, 10),
    ("costly", 0, ["9"], 600),
    ("open", 0, ["9", "10"], 10),
    ("nothing", 0, [], 10),
    ("unreached", 0, ["9", "(7)"], 10),
    ("solved", 0, ["9"], 10),
    ("solved", 1, ["7"], 10),
]


def test_solved_suspect_and_costly_problems_are_not_searched_on(tmp_path):
    trees, problems = committed(tmp_path, ROUND)
    made = plan(trees, problems)
    assert made.search == ["never-searched", "nothing", "open", "unreached"]
    assert dict(made.ended) == {"suspect": 1, "out_of_budget": 1}
    (suspect,) = made.suspects
    assert (suspect.problem_id, suspect.gold, suspect.answer) == ("agreed", "7", "8")
    assert (suspect.votes, suspect.num_answers, suspect.num_trees) == (8, 8, 2)
    assert suspect.generated_tokens == 20


def test_answers_in_shards_that_a_listing_lacks_count(tmp_path, monkeypatch):
    trees, problems = committed(tmp_path, ROUND)
    whole = plan(trees, problems)
    files = RunStore.files
    monkeypatch.setattr(
        RunStore, "files", lambda self, folder: [f for f in files(self, folder) if "-7" not in f]
    )
    assert "solved" in plan(trees, problems).search, "of what is listed alone"
    assert plan(trees, problems, shards=[f"shard-{n}" for n in range(len(ROUND))]) == whole


def test_suspects_are_searched_on_and_named_by_default(tmp_path):
    trees, problems = committed(tmp_path, ROUND)
    made = plan(trees, problems, leave_suspects=False, max_generated_tokens=None)
    assert made.search == ["agreed", "costly", "never-searched", "nothing", "open", "unreached"]
    assert [s.problem_id for s in made.suspects] == ["agreed"]
    assert not made.ended


def test_wordings_of_one_program_do_not_add_up_to_a_suspect(tmp_path):
    trees = TrajectoryStore(RunStore(str(tmp_path)), 1)
    problem = make_problem(answer="7")

    def commit(name, index, sources):
        found = [code("a = 1", *(answered("8", correct=False, source=s) for s in sources))]
        trees.commit(name, [make_tree(*found, problem=problem, index=index)], info={})

    commit("first", 0, [f"print(8) # {n}" for n in range(8)])
    commit("second", 1, ["print(8)", "print(4 + 4)"])
    made = plan_escalation(
        trees,
        {problem.id: problem},
        suspect=SuspectConfig(min_answers=3),
        leave_suspects=False,
        max_generated_tokens=None,
    )
    (suspect,) = made.suspects
    assert (suspect.votes, suspect.num_answers, suspect.num_trees) == (3, 3, 2)


def test_share_of_a_rollout_counts_the_escalation_to_come() -> None:
    base = StageCost(rollouts=16)
    again = StageCost(rollouts=64, unsolved_only=True)
    # 100 problems x 16, then a quarter of them x 64 as long: half of the work is the base stage.
    assert rollout_share(0, [base], 100, 50, 0.25) == 0.5
    assert rollout_share(0, [base, again], 100, 100, 0.25) == pytest.approx(0.5)
    assert rollout_share(1600, [again], 25, 0, 1.0) == pytest.approx(0.5)
    assert rollout_share(1600, [again], 25, 25, 0.4) == 1.0
    # A second one has what the first one leaves.
    assert rollout_share(1600, [again, again], 25, 25, 0.4) == pytest.approx(3200 / 3840)
