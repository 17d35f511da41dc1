"""`rstar report RUN`: what a run showed, in the terminal and as one page for a person.

    RUN/report.json, stages/, checkpoints/*/metrics.jsonl, trajectories/ --> RunFacts --> charts,
    tables, sample trees --> RUN/report.html

Everything is read from what the stages committed; nothing is measured and the run is not changed
but for the page. Of a large round at most `MAX_FILES` data files, evenly spread, are read for the
charts of trees; the page says so. Coverage, accuracy, cost and lost work are of all of it.

Throughput over time comes from the times of the data files: of a run that was copied without them
the chart is left out.

Not covered: runs that have not finished (`rstar status` shows those).
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from cluster.evaluation import paper
from cluster.evaluation.reliability import Bins, BinSums
from cluster.evaluation.shares import COLUMNS, percent
from cluster.evaluation.tables import REPORT, read_evaluation, read_report
from cluster.folder.run_folder import RunFolderError, why_not_written
from cluster.reports import plots
from cluster.reports.evaluation_page import counts_text, print_evaluation
from cluster.reports.evaluation_page import page as evaluation_page
from cluster.reports.page import (
    Section,
    escape,
    html_table,
    paragraph,
    render_report,
    tiles,
)
from cluster.reports.run_report import print_report, rounds_figure
from cluster.reports.tree_view import num_passes, snippet
from cluster.telemetry.progress import duration
from rollout.store import Commit, ManifestFile, RunStore, StoreError, TrajectoryStore
from rollout.table import table_to_trees
from rollout.tree import Node, Outcome, Terminal, Tree

MAX_FILES = 64
"""Data files of a round that charts are made of."""

Q_EDGES = tuple(round(-1.0 + 0.1 * n, 1) for n in range(21))

MAX_TREE_NODES = 60
"""Of a sample tree that are shown."""

HELD_OUT = {
    "greedy": "greedy",
    "majority": "majority",
    "best_of_n": "best-of-N by PPM",
    "search": "MCTS + PPM",
    "any_sample": "some sample (oracle)",
}

_COLUMNS = (
    *("problem_id", "tree", "node", "parent", "terminal", "discard", "multiplicity"),
    *("correct", "value", "visit_count", "value_sum", "execution_status"),
)


def show_report(run: Path, console: Console, *, page: Path | None = None) -> None:
    """Print the tables of a run or an evaluation and write its page.

    Args:
        page: None: report.html in the folder.
    Raises:
        RunFolderError: nothing is finished there, or the page cannot be written.
        StoreError: its trees cannot be read.
    """
    target = page or run / "report.html"
    if (run / REPORT).is_file():
        evaluation = read_evaluation(run)
        print_evaluation(evaluation, console)
        text = evaluation_page(evaluation)
    else:
        report = read_report(
            run / "report.json", "no report; has `rstar evolve` finished this run?"
        )
        if "rounds" in report:
            print_report(report, console)
            facts = read_run(run, report)
            text = run_page(facts)
            if page is None:
                plots.write_png(rounds_figure(report), run / "report.png")
                for name, figure in _figures(facts).items():
                    plots.write_png(figure, run / f"report-{name}.png")
        else:
            from cluster.runs.rollout import print_rollout_report

            print_rollout_report(report, console)
            return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{target}: {why_not_written(error)}") from error
    console.print(f"page {target}", markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------- what is read


@dataclass(slots=True, kw_only=True)
class RoundFacts:
    """What the trees of one round say."""

    files_read: int = 0
    files: int = 0
    terminals: Counter[str] = field(default_factory=Counter)
    discards: Counter[str] = field(default_factory=Counter)
    """Candidates left out by reason, identical ones counted each."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Step codes that did not end well, by sandbox status."""
    q_right: list[int] = field(default_factory=list)
    """Visited steps with a right answer below, by bin of Q; `q_wrong`: without."""
    q_wrong: list[int] = field(default_factory=list)
    answer_bins: Bins = field(default_factory=list)
    step_bins: Bins = field(default_factory=list)
    commits: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since 1970, generated tokens) of each commit, by time."""
    quarantined: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class RunFacts:
    """Everything the page is made of."""

    report: Mapping[str, Any]
    stages: Mapping[tuple[int, str], Mapping[str, Any]]
    rounds: dict[int, RoundFacts] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """Kind of model -> name of the round -> (step, loss)."""
    samples: list[tuple[str, Tree]] = field(default_factory=list)
    """(why it is shown, tree)."""


def read_run(run: Path, report: Mapping[str, Any]) -> RunFacts:
    """Read what a finished run committed.

    Raises:
        StoreError: a data file is missing or changed.
    """
    store = RunStore(run)
    facts = RunFacts(report=report, stages=_stages(run))
    for entry in report["rounds"]:
        trees = TrajectoryStore(store, entry["round"])
        if trees.manifest() is not None:
            facts.rounds[entry["round"]] = read_round(trees)
    for kind in ("policy", "ppm"):
        facts.curves[kind] = {
            f"round {folder.name.removeprefix('round=')}": curve
            for folder in _round_folders(run / "checkpoints")
            if (curve := read_curve(folder / kind / "metrics.jsonl"))
        }
    if facts.rounds:
        facts.samples = sample_trees(TrajectoryStore(store, max(facts.rounds)))
    return facts


def _stages(run: Path) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    for path in (run / "stages").glob("round=*.json"):
        number, _, stage = path.stem.removeprefix("round=").partition("-")
        try:
            found[int(number), stage] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path}: cannot be read: {error}") from error
    return found


def _round_folders(checkpoints: Path) -> list[Path]:
    folders = [path for path in checkpoints.glob("round=*") if path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("round=")))


def read_curve(path: Path, num_points: int = 120) -> list[tuple[float, float]]:
    """(step, loss) of a training run, each the mean of its neighbours; [] if it has no log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # a last line that was cut off
            continue
        if isinstance(row, dict) and "step" in row and math.isfinite(row.get("loss", math.nan)):
            rows.append((float(row["step"]), float(row["loss"])))
    size = max(math.ceil(len(rows) / num_points), 1)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [
        (sum(step for step, _ in g) / len(g), sum(loss for _, loss in g) / len(g)) for g in groups
    ]


def read_round(trees: TrajectoryStore, *, max_files: int = MAX_FILES) -> RoundFacts:
    """What the trees of a sealed round say, from at most `max_files` of its files.

    Raises:
        StoreError: a file is missing or changed.
    """
    manifest = trees.manifest()
    assert manifest is not None
    files = [file for file in manifest.files if file.num_rows]
    chosen = _spread(files, max_files)
    facts = RoundFacts(files_read=len(chosen), files=len(files), quarantined=manifest.failed)
    facts.commits = _commit_times(trees, {file.shard for file in files})
    bins = {"answers": BinSums(), "steps": BinSums()}
    right, wrong = np.zeros(len(Q_EDGES) - 1, int), np.zeros(len(Q_EDGES) - 1, int)
    for file in chosen:
        table = trees.read_table(file, _COLUMNS)
        _count(table, facts)
        below, right_below = answers_below(table)
        visits = _numbers(table, "visit_count")
        visited = (visits > 0) & (_numbers(table, "node") > 0)
        q = np.divide(
            _numbers(table, "value_sum"), visits, where=visits > 0, out=np.zeros(len(visits))
        )
        for counts, which in ((right, right_below > 0), (wrong, right_below == 0)):
            counts += np.histogram(q[visited & which], bins=np.array(Q_EDGES))[0]
        value = _numbers(table, "value")
        is_answer = np.array([t == Terminal.ANSWER for t in table["terminal"].to_pylist()], bool)
        told = np.isfinite(value) & (below > 0)
        share = np.divide(right_below, below, where=below > 0, out=np.zeros(len(below)))
        for name, which in (("answers", told & is_answer), ("steps", told & ~is_answer)):
            bins[name].add(value[which], share[which])
    facts.q_right, facts.q_wrong = right.tolist(), wrong.tolist()
    facts.answer_bins, facts.step_bins = bins["answers"].bins(), bins["steps"].bins()
    return facts


def answers_below(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each node: visited answers at or below it, and how many of them are right, `[rows]`."""
    terminal = table["terminal"].to_pylist()
    visits = _numbers(table, "visit_count")
    correct = table["correct"].to_pylist()
    nodes, parents = _numbers(table, "node"), _numbers(table, "parent")
    rows = np.arange(len(nodes))
    parent_rows = (rows - nodes + parents).astype(int)
    below, right = np.zeros(len(rows), int), np.zeros(len(rows), int)
    for row in range(len(rows) - 1, -1, -1):
        # A parent stands before its children, so theirs are complete here.
        if terminal[row] == Terminal.ANSWER and visits[row] > 0 and correct[row] is not None:
            below[row] += 1
            right[row] += bool(correct[row])
        if nodes[row] > 0:
            below[parent_rows[row]] += below[row]
            right[parent_rows[row]] += right[row]
    return below, right


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, null as NaN."""
    return table[name].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)


def _count(table: pa.Table, facts: RoundFacts) -> None:
    facts.terminals.update(t for t in table["terminal"].to_pylist() if t)
    pairs = zip(table["discard"].to_pylist(), table["multiplicity"].to_pylist(), strict=True)
    for reason, count in pairs:
        if reason:
            facts.discards[reason] += count
    facts.statuses.update(
        status for status in table["execution_status"].to_pylist() if status not in ("", "ok")
    )


def _spread(files: Sequence[ManifestFile], most: int) -> list[ManifestFile]:
    if len(files) <= most:
        return list(files)
    return [files[round(n * (len(files) - 1) / (most - 1))] for n in range(most)]


def _commit_times(trees: TrajectoryStore, shards: set[str]) -> list[tuple[float, int]]:
    found = []
    commit: Commit
    for name, commit in trees.commits(trees=False).items():
        if name in shards:
            try:
                when = trees.store.modified_unix_s(commit.path)
            except FileNotFoundError:
                continue
            found.append((when, commit.totals.generated_tokens))
    return sorted(found)


def rate_over_time(
    commits: Sequence[tuple[float, int]], num_points: int = 24
) -> list[tuple[float, float]]:
    """(minutes since the first commit, tokens per second); [] if the times tell nothing.

    Each point is the tokens committed in its share of the time; what was committed first was made
    before that, so it is left out.
    """
    if len(commits) < 4:
        return []
    began_s, ended_s = commits[0][0], commits[-1][0]
    span_s = ended_s - began_s
    if span_s < 2.0:
        return []
    count = min(num_points, max(len(commits) // 4, 2))
    tokens = [0] * count
    for when_s, made in commits[1:]:
        tokens[min(int((when_s - began_s) / span_s * count), count - 1)] += made
    width_s = span_s / count
    return [((n + 0.5) * width_s / 60, tokens[n] / width_s) for n in range(count)]


def sample_trees(trees: TrajectoryStore, *, max_files: int = 4) -> list[tuple[str, Tree]]:
    """A few trees that show how the search went, with the reason each is shown.

    Raises:
        StoreError: a file cannot be read.
    """
    manifest = trees.manifest()
    assert manifest is not None
    best: dict[str, tuple[float, Tree]] = {}
    for file in _spread([f for f in manifest.files if f.num_rows], max_files):
        try:
            found = table_to_trees(trees.read_table(file))
        except ValueError as error:
            raise StoreError(f"data file {file.path} cannot be read: {error}") from error
        for tree in found:
            for why, worth in _worth_showing(tree):
                if worth > best.get(why, (0.0, tree))[0]:
                    best[why] = (worth, tree)
    shown: list[tuple[str, Tree]] = []
    for why, (_, tree) in best.items():
        if all(tree is not other for _, other in shown):
            shown.append((why, tree))
    return shown


def _worth_showing(tree: Tree) -> Iterator[tuple[str, float]]:
    answers = [node for node in tree.answers() if node.visit_count]
    right = sum(bool(node.correct) for node in answers)
    # Large enough to show something, small enough to read.
    size = 1.0 / (1.0 + abs(len(tree.nodes) - 24))
    if right and right < len(answers):
        yield "solved, after wrong answers too", size
    if tree.outcome is Outcome.UNSOLVED:
        yield "answered, but never rightly", size
    if tree.outcome is Outcome.NO_ANSWER:
        yield "no rollout reached an answer", size
    if right and right == len(answers):
        yield "every answer right", 0.5 * size


# -------------------------------------------------------------------------------- the page


def run_page(facts: RunFacts) -> str:
    """One self-contained HTML page."""
    report = facts.report
    sections = [
        Section(title="Results", body=_results(facts)),
        Section(title="Coverage", body=_coverage(facts)),
        Section(title="Held-out accuracy", body=_accuracy(facts)),
        Section(title="The PPM", body=_ppm(facts)),
        Section(title="Q-values", body=_q_values(facts)),
        Section(title="Training", body=_training(facts)),
        Section(title="Throughput and cost", body=_cost(facts)),
        Section(title="Failures", body=_failures(facts)),
        Section(title="Sample trees", body=_trees(facts)),
        Section(title="What was run", body=_what_was_run(report), folded=True),
    ]
    return render_report(report["name"], list(_about(report)), sections)


def _about(report: Mapping[str, Any]) -> Iterator[str]:
    config = report["config"]
    rounds = len(report["rounds"])
    searched = config.get("problems", {})
    world = searched.get("miniature")
    what = "the miniature's made-up problems" if world else ", ".join(searched.get("train", ()))
    yield f"{rounds} rounds of self-evolution on {what}; seed {config['seed']}"
    machine = report["hardware"]
    gpus = ", ".join(machine.get("gpus", ())) or "no GPU"
    memory = f"{machine['memory_gib']} GiB" if "memory_gib" in machine else ""
    yield ", ".join(
        filter(None, [f"{machine['cores']} cores of {machine['cpu'].strip()}", memory, gpus])
    )


def _results(facts: RunFacts) -> str:
    report = facts.report
    rounds = report["rounds"]
    if not rounds:
        return paragraph("no round is finished")
    last = rounds[-1]
    shown = [(f"{percent(last['coverage']['all'])} %", f"problems solved in round {last['round']}")]
    cold = (report.get("cold_start") or {}).get("greedy")
    if last.get("greedy"):
        before = f", {percent(cold['all'])} % after the cold start" if cold else ""
        shown.append((f"{percent(last['greedy']['all'])} %", f"held out, greedy{before}"))
    if last.get("search"):
        shown.append((f"{percent(last['search']['all'])} %", "held out, MCTS + PPM"))
    tokens = sum(entry["generated_tokens"] for entry in rounds)
    shown.append((f"{tokens:,}", "tokens generated in search"))
    if report.get("seconds_total") is not None:
        shown.append((duration(report["seconds_total"]), "from start to end"))
    lost = sum(e["lost"] for e in rounds), sum(e["doubled"] for e in rounds)
    shown.append((f"{lost[0]} / {lost[1]}", "trees lost / doubled"))
    return tiles(shown)


def _figures(facts: RunFacts) -> dict[str, Any]:
    """The charts that are also written as pictures, by name."""
    rounds = facts.report["rounds"]
    counts = {
        number: {"right": of_round.q_right, "wrong": of_round.q_wrong}
        for number, of_round in facts.rounds.items()
    }
    figures = {"coverage": plots.coverage_by_round(rounds)}
    bins = _reliability_bins(facts)
    if bins:
        figures["reliability"] = plots.reliability(bins)
    if counts:
        figures["q-values"] = plots.q_histograms(counts, Q_EDGES)
    return figures


def _coverage(facts: RunFacts) -> str:
    rows = []
    for entry in facts.report["rounds"]:
        number = entry["round"]
        rows.append([f"round {number}", *(_share(entry["coverage"], c) for c in COLUMNS)])
        told = paper.COVERAGE.get(number)
        if told:
            rows.append([f"paper, round {number}", *(f"{told[c]:.2f}" for c in COLUMNS)])
    figure = plots.coverage_by_round(facts.report["rounds"])
    return (
        f'<div class="charts"><figure>{plots.as_svg(figure, "coverage by round")}</figure><div>'
        + html_table(["% solved", *COLUMNS], rows, quiet=lambda row: row[0].startswith("paper"))
        + paragraph(
            "Share of the problems that some search of the round solved. The paper's (arXiv "
            "2501.04519, Table 2) are of 747k problems and a 7B policy; only the shape compares."
        )
        + "</div></div>"
    )


def _share(shares: Mapping[str, float | None] | None, column: str) -> str:
    return percent(shares.get(column)) if shares else ""


def _accuracy(facts: RunFacts) -> str:
    report = facts.report
    rounds = report["rounds"]
    if not any(entry.get("greedy") for entry in rounds):
        return paragraph("the run has no held-out problems")
    figure = plots.accuracy_by_round(report.get("cold_start"), rounds, HELD_OUT)
    rows = []
    cold = report.get("cold_start")
    if cold and cold.get("greedy"):
        rows.append(["cold start", percent(cold["greedy"]["all"]), *("" for _ in range(4)), ""])
    for entry in rounds:
        shares = [_share(entry.get(method), "all") for method in HELD_OUT]
        number = entry["round"]
        told = {row.name[-1]: row for row in paper.GREEDY_ROUNDS if row.name[-1].isdigit()}
        searched = {n + 1: row for n, row in enumerate(paper.SEARCH_ROUNDS)}
        beside = ""
        if str(number) in told and number in searched:
            math = told[str(number)].accuracy["math500"], searched[number].accuracy["math500"]
            beside = f"{math[0]} / {math[1]}"
        rows.append([f"round {number}", *shares, beside])
    header = ["% right", *HELD_OUT.values(), "paper, MATH-500: greedy / searched"]
    made = report.get("evaluation") or {}
    about = ""
    if made:
        about = (
            f"Greedy on {made['num_problems']} held-out problems; the others on "
            f"{made['num_search_problems']}, at one generated-token budget a problem "
            f"({made['num_samples']} samples). `rstar evaluate` gives intervals."
        )
    return (
        f'<div class="charts"><figure>{plots.as_svg(figure, "accuracy by round")}</figure></div>'
        + html_table(header, rows)
        + paragraph(about)
    )


def _reliability_bins(facts: RunFacts) -> dict[str, Bins]:
    """Of the last round that was searched with a PPM, and of the last PPM on held-out answers."""
    bins: dict[str, Bins] = {}
    valued = [n for n, f in facts.rounds.items() if any(b[0] for b in f.answer_bins)]
    if valued:
        number = max(valued)
        bins[f"answers of round {number}"] = facts.rounds[number].answer_bins
        bins[f"steps of round {number}"] = facts.rounds[number].step_bins
    trained = [n for n, stage in facts.stages if stage == "train_ppm"]
    if trained:
        told = facts.stages[max(trained), "train_ppm"].get("calibration") or []
        if told:
            rows = [(int(count), chance, share) for count, chance, share in told]
            bins[f"held-out answers, PPM of round {max(trained)}"] = rows
    return bins


def _ppm(facts: RunFacts) -> str:
    bins = _reliability_bins(facts)
    rows = []
    for entry in facts.report["rounds"]:
        metrics = entry.get("ppm_metrics") or {}
        if metrics:
            pairs = f"{metrics['num_pairs']:.0f}" if "num_pairs" in metrics else ""
            accuracy = (metrics.get(f"pair_accuracy{kind}") for kind in ("", "_step", "_answer"))
            error = metrics.get("calibration_error")
            rows.append(
                [
                    f"round {entry['round']}",
                    *(percent(share) for share in accuracy),
                    pairs,
                    "" if error is None else f"{error:.3f}",
                ]
            )
    header = ["held-out pairs, % right", "all", "steps", "answers", "pairs", "calibration error"]
    chart = ""
    if bins:
        svg = plots.as_svg(plots.reliability(bins), "reliability of the PPM")
        chart = f"<figure><figcaption>Reliability</figcaption>{svg}</figure>"
    return (
        f'<div class="charts">{chart}<div>{html_table(header, rows)}'
        + paragraph(
            "50 % of pairs is guessing. The chart sets what the PPM said of an answer or step "
            "against the share of right answers there (for a step: among the answers found below "
            "it); a dot's size is the number of cases, and bins of fewer than 5 are left out. The "
            "PPM is trained to rank, not to predict chances, so a curve that rises is what matters."
        )
        + "</div></div>"
    )


def _q_values(facts: RunFacts) -> str:
    if not facts.rounds:
        return paragraph("no trees")
    counts = {n: {"right": f.q_right, "wrong": f.q_wrong} for n, f in facts.rounds.items()}
    svg = plots.as_svg(plots.q_histograms(counts, Q_EDGES), "Q-values of visited steps")
    return svg + paragraph(
        "Q-values of the steps that rollouts went through; blue: a right answer was found at or "
        "below the step." + _read_note(facts)
    )


def _read_note(facts: RunFacts) -> str:
    parts = [
        f"round {n}: {f.files_read} of {f.files} files"
        for n, f in facts.rounds.items()
        if f.files_read < f.files
    ]
    return f" Read for this: {', '.join(parts)}." if parts else ""


def _training(facts: RunFacts) -> str:
    charts = []
    for kind, name in (("policy", "Policy, loss per token"), ("ppm", "PPM, pairwise loss")):
        curves = facts.curves.get(kind)
        if curves:
            svg = plots.as_svg(plots.training_curves(curves, "loss"), name)
            charts.append(f"<figure><figcaption>{name}</figcaption>{svg}</figure>")
    rows = []
    for (number, stage), record in sorted(facts.stages.items()):
        if stage in ("train_policy", "train_ppm") and "examples" in record:
            rows.append(
                [
                    f"round {number}, {'policy' if stage == 'train_policy' else 'PPM'}",
                    f"{record['examples']:,}",
                    f"{record.get('steps', 0):,}",
                    f"{record.get('useful_tokens', 0):,}",
                    f"{record.get('tokens_per_s', 0):,.0f}",
                    f"{record.get('final_loss', math.nan):.4f}",
                    "; ".join(record.get("warnings") or ())
                    + (f"; held back: {record['held']}" if record.get("held") else ""),
                ]
            )
    header = ["", "examples", "steps", "tokens", "tokens/s", "last loss", "warnings"]
    return f'<div class="charts">{"".join(charts)}</div>' + html_table(header, rows)


def _cost(facts: RunFacts) -> str:
    report = facts.report
    config = report["config"]
    series = {f"round {n}": rate_over_time(f.commits) for n, f in facts.rounds.items()}
    series = {name: points for name, points in series.items() if points}
    chart = ""
    if series:
        svg = plots.as_svg(plots.throughput(series, "generated tokens/s"), "throughput over time")
        chart = f'<div class="charts"><figure>{svg}</figure></div>'
    cluster = config.get("cluster", {})
    gpus = sum(
        cluster[pool].get("replicas", 1) * cluster[pool].get("num_gpus", 0)
        for pool in ("policy", "ppm")
        if pool in cluster
    )
    dollars = (config.get("cost") or {}).get("usd_per_hour")
    rows = []
    for entry in report["rounds"]:
        seconds = entry["seconds"]
        rollout = seconds.get("rollout") or 0.0
        problems = facts.stages.get((entry["round"], "rollout"), {}).get("expected")
        solved = facts.stages.get((entry["round"], "rollout"), {}).get("solved")
        total = sum(value for value in seconds.values() if value is not None)
        told = paper.GPU_SECONDS_PER_PROBLEM.get(entry["round"])
        rows.append(
            [
                f"round {entry['round']}",
                f"{entry['trees']:,}",
                f"{entry['generated_tokens']:,}",
                f"{entry['generated_tokens_per_s']:,.0f}",
                f"{entry['generated_tokens'] / solved:,.0f}" if solved else "",
                *(f"{seconds[s]:,.0f}" if seconds.get(s) is not None else "" for s in _STAGES),
                f"{rollout * gpus / problems:,.1f}" if gpus and problems else "-",
                "" if told is None else f"{told}",
                f"{total * dollars / 3600:,.2f}" if dollars is not None else "-",
            ]
        )
    header = ["", "trees", "tokens", "tokens/s", "per solved", *_STAGES.values()]
    header += ["GPU-s", "paper", "$"]
    about = (
        "Tokens generated in search, in all, per second and per solved problem; seconds of each "
        "stage; GPU-seconds of search per problem, of the GPUs that policy and PPM replicas "
        "reserve, beside those that follow from the machines and days the paper states. A commit "
        "counts in the chart when it was written, so the last ones pile up."
    )
    if dollars is None:
        about += " Set cost.usd_per_hour to see dollars."
    return chart + html_table(header, rows) + paragraph(about)


_STAGES = {
    "rollout": "search",
    "select": "select",
    "train_policy": "SFT",
    "train_ppm": "PPM",
    "evaluate": "held out",
}


def _failures(facts: RunFacts) -> str:
    rows = []
    for entry in facts.report["rounds"]:
        number = entry["round"]
        found = facts.rounds.get(number, RoundFacts())
        deaths = {
            kind: loss.get("deaths", 0) if isinstance(loss, Mapping) else int(loss)
            for kind, loss in (entry.get("deaths") or {}).items()
        }
        ends = {str(k): v for k, v in found.terminals.items() if k != Terminal.ANSWER}
        rows.append(
            [
                f"round {number}",
                f"{found.terminals[Terminal.ANSWER]:,}",
                _reasons(ends),
                _reasons(found.discards),
                _reasons(found.statuses),
                f"{entry.get('failed_problems', 0)}",
                _reasons(deaths),
            ]
        )
    header = ["", "answers", "other ends", "candidates left out", "code that failed"]
    header += ["quarantined", "actors that died"]
    lines = [
        f"<li>{escape(problem)}: {escape(error)}</li>"
        for found in facts.rounds.values()
        for problem, error in list(found.quarantined.items())[:5]
    ]
    listed = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return (
        html_table(header, rows)
        + listed
        + paragraph(
            "Counts of nodes and candidates; a failed candidate costs its tokens and nothing else."
            + _read_note(facts)
        )
    )


def _reasons(counts: Mapping[str, int]) -> str:
    return counts_text({name.replace("_", " "): count for name, count in counts.items() if count})


def _what_was_run(report: Mapping[str, Any]) -> str:
    rows = [[name, version] for name, version in report.get("versions", {}).items()]
    config = json.dumps(report["config"], indent=1, default=str)
    return (
        "<h3>Versions</h3>"
        + html_table(["package", "version"], rows)
        + f"<h3>Config</h3><pre>{html.escape(config)}</pre>"
    )


# --------------------------------------------------------------------------- sample trees


def _trees(facts: RunFacts) -> str:
    if not facts.samples:
        return paragraph("no trees")
    parts = []
    for why, tree in facts.samples:
        problem = tree.problem
        about = (
            f"{problem.id} ({problem.level}), round {tree.round}: {tree.num_rollouts} rollouts, "
            f"{len(tree.nodes) - 1} candidates, {tree.generated_tokens:,} tokens; accepted answer "
            f"{problem.answer}"
        )
        parts.append(
            f"<h3>{escape(why[0].upper() + why[1:])}</h3>"
            f'<p class="problem">{escape(problem.text)}</p>'
            f'<p class="remark">{escape(about)}</p>'
            f'<div class="tree"><ul>{_branch(tree, tree.root, _Budget(MAX_TREE_NODES))}</ul></div>'
        )
    return "".join(parts) + paragraph(
        "Only what rollouts went through; Q-value and number of visits before each step. A click "
        "opens its code. `rstar tree RUN PROBLEM --html FILE` shows a whole tree."
    )


@dataclass(slots=True)
class _Budget:
    left: int


def _branch(tree: Tree, node: Node, budget: _Budget) -> str:
    """List items of the visited children of a node, the most visited first."""
    children = [tree.nodes[n] for n in node.children]
    visited = sorted((c for c in children if num_passes(c) > 0), key=lambda c: -num_passes(c))
    items = []
    for child in visited:
        if budget.left <= 0:
            items.append('<li class="soft">...</li>')
            break
        budget.left -= 1
        below = _branch(tree, child, budget)
        nested = f"<ul>{below}</ul>" if below else ""
        items.append(f"<li>{_node(child)}{nested}</li>")
    return "".join(items)


def _node(node: Node) -> str:
    verdict = ""
    if node.terminal is Terminal.ANSWER:
        good = "good" if node.correct else "bad"
        word = "right" if node.correct else "wrong"
        verdict = f' <b class="{good}">{word}</b>'
    elif node.terminal is not None:
        verdict = f' <b class="bad">{escape(str(node.terminal).replace("_", " "))}</b>'
    head = (
        f'<span class="q">{node.q_value:+.2f}</span> <span class="soft">{num_passes(node)}x</span> '
        f"{escape(snippet(node))}{verdict}"
    )
    step = node.step
    code = step.code if step is not None else ""
    if not code.strip():
        return f'<div class="leaf">{head}</div>'
    output = f"<pre>{escape(node.stdout)}</pre>" if node.stdout.strip() else ""
    return f"<details><summary>{head}</summary><pre>{escape(code)}</pre>{output}</details>"
