"""Stored trees shown: which one is found, what is marked, and that model text can do no harm."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.folder.run_folder import RunFolderError
from cluster.reports.marked_tree import (
    TreeView,
    choose_tree,
    dataset_config,
    find_trees,
    snippet,
    view_tree,
)
from cluster.reports.page import visible
from cluster.reports.tree_page import page_data, render_page
from cluster.reports.tree_view import print_node, print_tree, show_tree
from learner.pairs import PairConfig
from learner.select import DatasetConfig
from rollout.prompt import RSTAR_TEMPLATE
from rollout.store import RunStore, StoreError, TrajectoryStore
from rollout.tree import Tree
from tests.builders import answered, code, discarded, failed, make_problem, make_tree
from tests.datasets import selected

HOSTILE = "x = 1  # </script><img src=x onerror=pwned()>\u202e\x1b]0;owned\x07&{{DATA}}"


def solved_tree(**kwargs: object) -> Tree:
    """Nodes: 1 leads to 6, correct; 2 to 8, wrong; 3 is left out; 4 no rollout has visited."""
    return make_tree(
        code("a = 1", answered("7", correct=True)),
        code("a = 2", answered("8", correct=False)),
        discarded("a = oops"),
        code("a = 3"),
        **kwargs,
    )


def run_with(tmp_path: Path, *rounds: list[Tree], seal: bool = True) -> Path:
    """A run folder whose rounds hold these trees."""
    for number, trees in enumerate(rounds, start=1):
        store = TrajectoryStore(RunStore(tmp_path), number)
        store.commit(f"s{number}", trees)
        if seal:
            store.seal()
    return tmp_path


def printed(view: TreeView, **options: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_tree(view, console, **options)
    return console.file.getvalue()


def viewed(tree: Tree) -> TreeView:
    return view_tree(tree, [tree], DatasetConfig())


def node_named(tree: Tree, source: str) -> int:
    return next(n.id for n in tree.nodes if n.step is not None and n.step.code == source)


# --------------------------------------------------------------------------------- finding


def test_a_problem_is_found_by_a_unique_beginning_of_its_id(tmp_path: Path) -> None:
    trees = [solved_tree(problem=make_problem(i)) for i in ("gsm-17", "gsm-171", "math-2")]
    store = RunStore(run_with(tmp_path, trees))
    assert [t.problem_id for t in find_trees(store, "mat")] == ["math-2"]
    assert [t.problem_id for t in find_trees(store, "gsm-17")] == ["gsm-17"]
    with pytest.raises(RunFolderError, match=r"2 problems begin with 'gsm' \(gsm-17, gsm-171\)"):
        find_trees(store, "gsm")


def test_an_unknown_problem_is_an_error_with_the_nearest_ids(tmp_path: Path) -> None:
    trees = [solved_tree(problem=make_problem(i)) for i in ("algebra-12", "geometry-3")]
    store = RunStore(run_with(tmp_path, trees))
    with pytest.raises(RunFolderError, match=r"no problem 'algbra-12' .*: algebra-12"):
        find_trees(store, "algbra-12")
    with pytest.raises(RunFolderError, match="'zzz' among 2; the nearest: algebra-12, geometry-3"):
        find_trees(store, "zzz")


def test_a_folder_without_trees_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no search tree is stored here"):
        find_trees(RunStore(tmp_path), "p1")


def test_the_last_round_and_the_first_tree_that_solved_it_are_shown(tmp_path: Path) -> None:
    unsolved = make_tree(code("b", answered("8", correct=False)), round=2, index=0)
    run = run_with(
        tmp_path, [solved_tree()], [unsolved, *(solved_tree(round=2, index=i) for i in (1, 2))]
    )
    stored = find_trees(RunStore(run), "p1")
    assert [(t.round, t.index) for t in stored] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    chosen = choose_tree(stored)
    assert (chosen.round, chosen.index) == (2, 1)
    assert choose_tree(stored, round=1).round == 1
    assert choose_tree(stored, index=2).index == 2
    with pytest.raises(RunFolderError, match="p1: no round 2 tree 7; there is round 1 tree 0, "):
        choose_tree(stored, index=7)


def test_trees_of_an_unfinished_round_are_shown(tmp_path: Path) -> None:
    run = run_with(tmp_path, [solved_tree()], seal=False)
    console = Console(file=io.StringIO(), width=100)
    show_tree(run, "p1", console)
    assert "solved" in console.file.getvalue()


def test_a_file_of_another_schema_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, [solved_tree()])
    monkeypatch.setattr("rollout.table.SCHEMA_VERSION", 4)
    with pytest.raises(StoreError, match="schema version 3, this program reads 4"):
        show_tree(run, "p1", Console(file=io.StringIO()))


def test_settings_come_from_the_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert dataset_config(store) == DatasetConfig()
    own = DatasetConfig(trajectories_per_problem=5, pairs=PairConfig(best=1))
    store.put("config.yaml", yaml.safe_dump({"dataset": own.model_dump(mode="json")}).encode())
    assert dataset_config(store) == own
    store.put("config.yaml", b"dataset: {wrong: 1}")
    with pytest.raises(RunFolderError, match=r"config\.yaml: cannot be read"):
        dataset_config(store)


# ----------------------------------------------------------------------------------- marks


def test_marks_are_what_the_dataset_takes() -> None:
    tree = solved_tree()
    view = viewed(tree)
    dataset = selected([tree], template=RSTAR_TEMPLATE, config=DatasetConfig())
    texts = {
        (pair.chosen, pair.rejected) for pair in dataset.pairs_train + dataset.pairs_validation
    }

    def rendered(node: int, kind: str) -> str:
        steps = tree.steps(tree.nodes[node]) if kind == "answer" else [tree.nodes[node].step]
        return "".join(step.rendered for step in steps)

    assert {(rendered(p.chosen, p.kind), rendered(p.rejected, p.kind)) for p in view.pairs} == texts
    assert [p.kind for p in view.pairs] == ["answer", "step"]
    step = view.pairs[1]
    assert (step.chosen, step.rejected) == (node_named(tree, "a = 1"), node_named(tree, "a = 2"))
    kept = dataset.sft_train + dataset.sft_validation
    assert [t.mean_q for t in view.chosen] == [example.mean_q for example in kept]


def test_chosen_trajectories_are_ranked_over_all_trees_of_the_problem() -> None:
    first = make_tree(code("a = 1", answered("7", correct=True)), index=0)
    mixed = make_tree(
        code("b = 1", answered("7", correct=True), answered("8", correct=False)), index=1
    )
    view = view_tree(mixed, [first, mixed], DatasetConfig())
    assert [(t.tree_index, t.node) for t in view.chosen] == [(0, 3), (1, 4)]
    answer = view.chosen[1].node
    assert view.chosen_here == {answer: 2}
    assert view.chosen_paths() == {n.id: [2] for n in mixed.path(mixed.nodes[answer])[1:]}
    only = view_tree(mixed, [first, mixed], DatasetConfig(trajectories_per_problem=1))
    assert only.chosen_here == {} and only.chosen_paths() == {}


def test_a_pair_that_another_tree_turns_round_is_not_marked() -> None:
    def tree(first: bool, index: int) -> Tree:
        return make_tree(
            code("a = 1", answered("7", correct=first)),
            code("a = 2", answered("7", correct=not first)),
            index=index,
        )

    both = [tree(True, 0), tree(False, 1)]
    assert len(viewed(both[0]).pairs) == 2
    assert view_tree(both[0], both, DatasetConfig()).pairs == ()


def test_the_visit_of_a_ppm_value_is_no_pass_of_a_rollout() -> None:
    tree = make_tree(
        code("a = 1", answered("7", correct=True), value=0.5), code("a = 2", value=-0.25)
    )
    assert [n.num_passes for n in tree.nodes] == [1, 1, 0, 1, 1]
    assert [n.visit_count for n in tree.nodes] == [1, 2, 1, 1, 1]


# -------------------------------------------------------------------------------- terminal


def test_the_terminal_shows_visited_paths_with_marks_and_folds_the_rest() -> None:
    text = printed(viewed(solved_tree()))
    lines = text.splitlines()
    (chosen,) = [line for line in lines if "a = 1" in line]
    assert re.search(r"#1 Q \+1\.00 N 1 ★1 \+1 a = 1", chosen)
    (rejected,) = [line for line in lines if "a = 2" in line]
    assert "−1" in rejected and "★" not in rejected
    assert any("✓ correct 7" in line for line in lines)
    assert any("2 more: 1 not visited, 1 code failed" in line for line in lines)
    assert "a = oops" not in text and "accepted answer: 7" in text


def test_everything_is_shown_when_asked_for() -> None:
    text = printed(viewed(solved_tree()), everything=True)
    assert "[code failed] a = oops" in text and "a = 3" in text and "more:" not in text


def test_deep_branches_are_folded_but_chosen_paths_stay() -> None:
    view = viewed(solved_tree())
    text = printed(view, depth=1)
    assert "✓ correct" in text.split("question")[1]
    assert "✗ wrong 8" not in text.split("question")[1]
    assert "1 more: 1 taken further, folded" in text


def test_a_long_tree_is_folded_by_itself_and_says_so() -> None:
    branches = [code(f"a = {n}", answered(str(n), correct=n == 7)) for n in range(60)]
    text = printed(viewed(make_tree(*branches)))
    assert "folded below depth 1; --depth N or --all shows more" in text
    drawn = text.split("question")[1].splitlines()
    assert sum("✓" in line for line in drawn) == 1 and not any("✗" in line for line in drawn)
    assert len(drawn) < 70


def test_one_node_is_printed_in_full() -> None:
    tree = make_tree(
        failed("raise ValueError"), code("x = 1\nprint(x)", answered("7", correct=True))
    )
    tree.nodes[1].execution_error = "ValueError: no"
    tree.nodes[2].stdout = "1\nand more"
    console = Console(file=io.StringIO(), width=100)
    view = viewed(tree)
    print_node(view, 1, console)
    print_node(view, 2, console)
    text = console.file.getvalue()
    assert "ValueError: no" in text and "raise ValueError" in text and "too_deep" in text
    assert "print(x)" in text and "and more" in text and "#0 > #2" in text
    assert "preferred to #1" in text


def test_an_unknown_node_is_an_error(tmp_path: Path) -> None:
    run = run_with(tmp_path, [solved_tree()])
    with pytest.raises(
        RunFolderError, match="no node 99 in round 1 tree 0, which has nodes 0 to 8"
    ):
        show_tree(run, "p1", Console(file=io.StringIO()), node=99)


def test_model_text_cannot_steer_the_terminal() -> None:
    tree = make_tree(code(HOSTILE, answered("7\x1b[31m", correct=True)), failed("b"))
    tree.nodes[1].stdout = "\x1b[2J\x9b31m"
    console = Console(file=io.StringIO(), width=200)
    view = viewed(tree)
    print_tree(view, console)
    print_node(view, 1, console)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
    assert "\\u001b[2J" in text
    assert visible("a\tb\nc\ud800") == "a\tb\nc\\ud800"


def test_rich_markup_in_model_text_is_shown_as_text() -> None:
    text = printed(viewed(make_tree(code("a = '[bold]x[/bold] [/]'", answered("7", correct=True)))))
    assert "[bold]x[/bold] [/]" in text


def test_a_snippet_is_comment_then_code() -> None:
    tree = make_tree(code("# Step 1: Add\nimport math\nx = 1"), failed("y = 2"))
    assert [snippet(n) for n in tree.nodes] == ["question", "Step 1: Add  import math", "y = 2"]


# ------------------------------------------------------------------------------------ page


class Elements(HTMLParser):
    """Tags of a page with their attributes, and the content of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open_script = tag == "script"
        if self.open_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open_script = False

    def handle_data(self, data: str) -> None:
        if self.open_script:
            self.scripts[-1] += data


def hostile_page() -> str:
    problem = make_problem("p</title><script>pwned()</script>", text=HOSTILE)
    tree = make_tree(code(HOSTILE, answered("7", correct=True)), failed(HOSTILE), problem=problem)
    tree.nodes[1].stdout = "</script><script>pwned()</script><!--"
    tree.nodes[1].execution_error = "<!-- <script>"
    return render_page(viewed(tree))


def test_hostile_text_adds_no_element_to_the_page() -> None:
    harmless = Elements(render_page(viewed(solved_tree())))
    hostile = Elements(hostile_page())
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    data = json.loads(hostile.scripts[0])
    assert data["nodes"][1]["stdout"] == "</script><script>pwned()</script><!--"
    assert data["problem"]["text"] == HOSTILE
    assert "{{" not in hostile_page().replace("{{DATA}}", "", hostile.scripts[0].count("{{DATA}}"))


def test_the_page_is_self_contained_and_allows_only_its_own_script() -> None:
    page = render_page(viewed(solved_tree()))
    elements = Elements(page)
    assert not [a for _, a in elements.tags if a.keys() & {"src", "href", "srcset", "action"}]
    (policy,) = [a["content"] for _, a in elements.tags if "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'")
    style = page.split("<style>")[1].split("</style>")[0]
    for text, rule in ((elements.scripts[1], "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


def test_the_page_holds_nodes_marks_and_facts() -> None:
    tree = solved_tree()
    tree.search_config = '{"num_rollouts": 16}'
    data = page_data(viewed(tree))
    assert [n["parent"] for n in data["nodes"]] == [n.parent for n in tree.nodes]
    assert [n.get("q") for n in data["nodes"]] == [
        n.q_value if n.visit_count else None for n in tree.nodes
    ]
    assert [(c["node"], c["here"]) for c in data["chosen"]] == [(6, True)]
    assert [(p["kind"], p["chosen"], p["rejected"]) for p in data["pairs"]] == [
        ("answer", 6, 8),
        ("step", 1, 2),
    ]
    assert data["config"] == {"num_rollouts": 16}
    assert data["outcome"] == "solved"


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    tree = solved_tree()
    tree.nodes[1].value = math.nan
    tree.nodes[1].value_sum = math.inf
    page = render_page(viewed(tree))
    json.loads(Elements(page).scripts[0], parse_constant=pytest.fail)


def test_the_page_of_a_stored_tree_is_written(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", [solved_tree()])
    target = tmp_path / "pages" / "p1.html"
    console = Console(file=io.StringIO(), width=200)
    show_tree(run, "p1", console, page=target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"wrote {target}" in console.file.getvalue()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        show_tree(run, "p1", console, page=tmp_path / "file" / "p1.html")


def test_a_browser_draws_the_hostile_page_as_text(tmp_path: Path) -> None:
    browser = next(
        (found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH")
    page = tmp_path / "page.html"
    page.write_text(hostile_page(), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        page.as_uri(),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{browser} did not answer within 60 s")
    tags = [tag for tag, _ in Elements(done.stdout).tags]
    assert "img" not in tags and tags.count("script") == 2
    assert 'id="node-3"' in done.stdout and "✓ correct" in done.stdout
