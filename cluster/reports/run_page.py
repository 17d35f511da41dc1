"""The page of a run: what its report and its trees say, as sections of tables and charts.

RunFacts --> run_page: HTML
         --> figures: the charts that are written as pictures too
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.evaluation import paper
from cluster.evaluation.reliability import Bins
from cluster.evaluation.shares import (
    COLUMNS,
    counts_text,
    interval,
    percent,
    set_aside_lines,
    token_ratio,
)
from cluster.machines.cost import cost_lines
from cluster.reports import plots
from cluster.reports.marked_tree import snippet
from cluster.reports.page import (
    Section,
    escape,
    html_table,
    paragraph,
    render_report,
    tiles,
)
from cluster.reports.run_facts import RoundFacts, RunFacts, rate_over_time
from cluster.telemetry.progress import duration
from learner.pairs import deep_share
from rollout.difficulty import Difficulty
from rollout.self_correction import corrections
from rollout.tree import Node, Terminal, Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TREE_NODES = 60
"""Of a sample tree that are shown."""

STAGES = {
    "rollout": "search",
    "select": "select",
    "train_policy": "SFT",
    "train_ppm": "PPM",
    "ruler": "ruler",
    "evaluate": "held out",
}
"""Of a round, in order: name of the record -> name for people."""


UNPASSED = "*"


def mark_of(entry: Mapping[str, Any]) -> str:
    """Behind what was chosen with the PPM of a round's entry, if it did not pass its ruler."""
    return "" if (entry.get("ruler") or {}).get("passes", True) else UNPASSED


UNPASSED_NOTE = (
    "* The PPM of this round did not pass its ruler: it steers no search of the run, and what it "
    "chooses here (best-of-N, MCTS) is shown all the same."
)


def run_page(facts: RunFacts) -> str:
    """One self-contained HTML page."""
    report = facts.report
    sections = [
        Section(title="Results", body=_results(facts)),
        Section(title="Coverage", body=_coverage(facts)),
        Section(title="Held-out accuracy", body=_accuracy(facts)),
        Section(title="The PPM", body=_ppm(facts)),
        Section(title="Q-values", body=_q_values(facts)),
        Section(title="Depth of the trees", body=_depth(facts)),
        Section(title="Self-correction", body=_self_correction(facts)),
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
        what = f"held out, MCTS + PPM{mark_of(last)}"
        shown.append((f"{percent(last['search']['all'])} %", what))
    tokens = sum(entry["generated_tokens"] for entry in rounds)
    shown.append((f"{tokens:,}", "tokens generated in search"))
    if report.get("seconds_total") is not None:
        shown.append((duration(report["seconds_total"]), "from start to end"))
    lost = sum(e["lost"] for e in rounds), sum(e["doubled"] for e in rounds)
    shown.append((f"{lost[0]} / {lost[1]}", "trees lost / doubled"))
    return tiles(shown)


def figures(facts: RunFacts) -> dict[str, Figure]:
    """The charts that are written as pictures, by name of the file."""
    found = {
        "report": plots.rounds_figure(facts.report),
        "report-coverage": plots.coverage_by_round(facts.report["rounds"]),
    }
    if any(entry.get("ruler") for entry in facts.report["rounds"]):
        found["report-ruler"] = plots.ruler_by_round(facts.report["rounds"])
    bins = _reliability_bins(facts)
    if bins:
        found["report-reliability"] = plots.reliability(bins)
    if facts.rounds:
        found["report-q-values"] = plots.q_histograms(facts.rounds)
    return found


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
        + _difficulty(facts)
    )


def _difficulty(facts: RunFacts) -> str:
    """How many problems each round found easy, medium, hard and unsolved."""
    rows = []
    for entry in facts.report["rounds"]:
        classes = (entry.get("difficulty") or {}).get("all")
        if classes:
            counts = (f"{classes.get(name.value, 0):,}" for name in Difficulty)
            rows.append([f"round {entry['round']}", *counts])
    if not rows:
        return ""
    return html_table(["problems", *(name.value for name in Difficulty)], rows) + paragraph(
        "By the first search of the round: every answer right (easy), some (medium), none (hard); "
        "unsolved: searched again and still none."
    )


def _share(shares: Mapping[str, float | None] | None, column: str) -> str:
    return percent(shares.get(column)) if shares else ""


def _accuracy(facts: RunFacts) -> str:
    report = facts.report
    rounds = report["rounds"]
    if not any(entry.get("greedy") for entry in rounds):
        return paragraph("the run has no held-out problems")
    figure = plots.accuracy_by_round(report.get("cold_start"), rounds)
    rows = []
    cold = report.get("cold_start")
    if cold and cold.get("greedy"):
        rows.append(
            ["cold start", percent(cold["greedy"]["all"]), *[""] * (len(plots.HELD_OUT) + 2)]
        )
    for entry in rounds:
        shares = [_share(entry.get(method), "all") for method in plots.HELD_OUT]
        number = entry["round"]
        told = {row.name[-1]: row for row in paper.GREEDY_ROUNDS if row.name[-1].isdigit()}
        searched = {n + 1: row for n, row in enumerate(paper.SEARCH_ROUNDS)}
        beside = ""
        if str(number) in told and number in searched:
            math = told[str(number)].accuracy["math500"], searched[number].accuracy["math500"]
            beside = f"{math[0]} / {math[1]}"
        count = entry.get("samples_per_problem")
        samples = "" if count is None else f"{count:.1f}"
        ratio = token_ratio(entry.get("search_over_samples_tokens"))
        rows.append([f"round {number}{mark_of(entry)}", *shares, samples, ratio, beside])
    header = ["% right", *plots.HELD_OUT.values(), "samples a problem", "tokens, search / samples"]
    header.append("paper, MATH-500: greedy / searched")
    made = report.get("evaluation") or {}
    about = ""
    if made:
        about = (
            f"Greedy on {made['num_problems']} held-out problems; the others on "
            f"{made['num_search_problems']}: a search of {made['num_rollouts']} rollouts, and as "
            "many samples as its generated tokens pay for. `rstar evaluate` gives intervals."
        )
    return (
        f'<div class="charts"><figure>{plots.as_svg(figure, "accuracy by round")}</figure></div>'
        + html_table(header, rows)
        + paragraph(about)
        + (paragraph(UNPASSED_NOTE) if any(UNPASSED in row[0] for row in rows) else "")
        + "".join(map(paragraph, set_aside_lines(facts.report.get("set_aside", {}))))
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
        measured = {e["round"]: e["ruler"] for e in facts.report["rounds"] if e.get("ruler")}
        source = measured.get(max(trained)) or facts.stages[max(trained), "train_ppm"]
        told = source.get("calibration") or []
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
    header = ["validation pairs, % right", "all", "steps", "answers", "pairs", "calibration error"]
    chart = ""
    if bins:
        svg = plots.as_svg(plots.reliability(bins), "reliability of the PPM")
        chart = f"<figure><figcaption>Reliability</figcaption>{svg}</figure>"
    return (
        _ruler(facts)
        + f'<div class="charts">{chart}<div>{html_table(header, rows)}'
        + paragraph(
            "After the fit, on the validation problems of its data; 50 % of pairs is guessing. The "
            "chart sets what the PPM said of an answer or step "
            "against the share of right answers there (for a step: among the answers found below "
            "it); a dot's size is the number of cases, and bins of fewer than 5 are left out. The "
            "PPM is trained to rank, not to predict chances, so a curve that rises is what matters."
        )
        + "</div></div>"
    )


def _ruler(facts: RunFacts) -> str:
    """What each PPM ranks right of problems held out for pairs, and what came of that."""
    rounds = [entry for entry in facts.report["rounds"] if entry.get("ruler")]
    if not rounds:
        return ""
    rows, parts = [], []
    for entry in rounds:
        ruler, name = entry["ruler"], f"round {entry['round']}"
        found, error = ruler["rankings"], ruler["calibration_error"]
        rows.append(
            [
                name,
                *(interval(found.get(ranking)) for ranking in plots.RANKINGS),
                f"{ruler['num_pairs']:,}",
                f"{ruler['num_problems']:,} of {ruler['num_searched']:,}",
                "" if error is None else f"{error:.3f}",
                interval(entry.get("head_room")),
                "may" if ruler["passes"] else "no",
            ]
        )
        for group, own in ruler["groups"].items():
            shares = (interval(own["rankings"].get(ranking)) for ranking in plots.RANKINGS)
            parts.append([f"{name}, {group}", *shares, f"{own['num_pairs']:,}"])
    header = ["% of pairs right", "PPM", "log-probability", "blind", "pairs"]
    head = [*header, "problems with pairs", "calibration", "head-room", "steers"]
    source = (
        "Pairs of problems that are searched for this alone, with the round's policy and without "
        "the PPM, and never trained on."
        if rounds[-1]["ruler"]["source"] == "pair problems"
        else "The run has no problems held out for pairs (problems.pairs): these are the "
        "validation pairs of its data, of few problems and of earlier policies."
    )
    steered = [
        paragraph(
            f"Round {e['round']} stayed terminal-guided: {e['steering']['ppm']} did not pass, "
            f"{e['steering']['why']}."
        )
        for e in facts.report["rounds"]
        if e.get("steering") and not e["steering"]["steers"]
    ]
    svg = plots.as_svg(plots.ruler_by_round(rounds), "pairs ranked right by round")
    return (
        f'<div class="charts"><figure><figcaption>Ruler</figcaption>{svg}</figure></div>'
        + html_table(head, rows)
        + paragraph(
            f"{source} In brackets 95 % bootstrap intervals over problems; guessing is 50. The "
            "policy's log-probability is of the step or solution; blind is the PPM shown another "
            "problem's question. Calibration is the mean distance of its values from the shares "
            "that were right. Head-room, in points: what any sample has right beyond the majority "
            "of the held-out problems, and no choice among samples can exceed."
        )
        + "".join(steered)
        + f"<details><summary>by kind and shared steps</summary>{html_table(header, parts)}"
        "</details>"
    )


def _q_values(facts: RunFacts) -> str:
    if not facts.rounds:
        return paragraph("no trees")
    svg = plots.as_svg(plots.q_histograms(facts.rounds), "Q-values of visited steps")
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


def _depth(facts: RunFacts) -> str:
    rows = []
    for entry in facts.report["rounds"]:
        pairs, visits = entry.get("step_pairs") or {}, entry.get("node_visits") or {}
        deep = deep_share(pairs)
        rows.append(
            [
                f"round {entry['round']}",
                "" if deep is None else percent(deep),
                ", ".join(f"{steps}: {count:,}" for steps, count in pairs.items()),
                ", ".join(f"{times}: {count:,}" for times, count in visits.items()),
            ]
        )
    header = ["", "% deep", "step pairs by shared steps", "inner nodes by visits"]
    return html_table(header, rows) + paragraph(
        "Of each round's own trees. Deep pairs are behind two or more shared steps; a node needs "
        "two visits to compare its children. The authors say that 65.7 % of their PPM samples have "
        "three or more steps (microsoft/rStar, issue 32)."
    )


def _self_correction(facts: RunFacts) -> str:
    corrected = facts.corrected
    if not corrected.trajectories:
        return paragraph("no trajectories")
    parts = []
    for trajectory in corrected.examples:
        found = corrections(trajectory.steps)
        signs = "; ".join(f"step {c.step + 1}, {c.sign}: {c.evidence}" for c in found)
        verdict = "right" if trajectory.correct else "wrong"
        text = "\n".join(step.code or step.text for step in trajectory.steps)
        parts.append(
            f"<details><summary>{escape(trajectory.problem.id)}, {verdict} ({escape(signs)})"
            f"</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts) + paragraph(
        f"{corrected.correcting:,} of {corrected.trajectories:,} trajectories read of the last "
        f"round ({corrected.correcting_right:,} of them right) hold a step that takes back an "
        "earlier one: a comment says so, or a name is assigned anew that nothing had read. Both "
        "signs are meant to miss rather than to cry wolf."
    )


def _training(facts: RunFacts) -> str:
    charts = []
    for kind, name in (("policy", "Policy, loss per token"), ("ppm", "PPM, pairwise loss")):
        curves = facts.curves.get(kind)
        if curves:
            svg = plots.as_svg(plots.training_curves(curves), name)
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
    charts_of = f'<div class="charts">{"".join(charts)}</div>'
    return charts_of + html_table(header, rows) + _origins(facts)


def _origins(facts: RunFacts) -> str:
    """Which rounds' trees each round trained on."""
    rows = []
    for entry in facts.report["rounds"]:
        origins = entry.get("origins")
        if origins:
            share = percent(entry.get("newest_round_share"))
            sft, pairs = (
                ", ".join(f"{count:,} of round {n}" for n, count in origins.get(name, {}).items())
                for name in ("sft_train", "pairs_train")
            )
            rows.append([f"round {entry['round']}", sft or "none", share, pairs or "none"])
    if not rows:
        return ""
    header = ["training data", "trajectories", "% of this round", "preference pairs"]
    return html_table(header, rows) + paragraph(
        "Where what the models learned from was found; demonstrations are not counted. "
        "dataset.sft_rounds and dataset.pair_rounds say which rounds may give any."
    )


def _cost(facts: RunFacts) -> str:
    report = facts.report
    config = report["config"]
    series = {f"round {n}": rate_over_time(f.commits) for n, f in facts.rounds.items()}
    series = {name: points for name, points in series.items() if points}
    chart = ""
    if series:
        svg = plots.as_svg(plots.throughput(series), "throughput over time")
        chart = f'<div class="charts"><figure>{svg}</figure></div>'
    cluster = config.get("cluster", {})
    gpus = sum(
        cluster[pool].get("replicas", 1) * cluster[pool].get("num_gpus", 0)
        for pool in ("policy", "ppm")
        if pool in cluster
    )
    cost = report.get("cost") or {}
    dollars = {int(number): of["usd"] for number, of in cost.get("rounds", {}).items()}
    rows = []
    for entry in report["rounds"]:
        seconds = entry["seconds"]
        rollout = seconds.get("rollout") or 0.0
        problems = facts.stages.get((entry["round"], "rollout"), {}).get("expected")
        solved = facts.stages.get((entry["round"], "rollout"), {}).get("solved")
        told = paper.GPU_SECONDS_PER_PROBLEM.get(entry["round"])
        rows.append(
            [
                f"round {entry['round']}",
                f"{entry['trees']:,}",
                f"{entry['generated_tokens']:,}",
                f"{entry['generated_tokens_per_s']:,.0f}",
                f"{entry['generated_tokens'] / solved:,.0f}" if solved else "",
                *(f"{seconds[s]:,.0f}" if seconds.get(s) is not None else "" for s in STAGES),
                f"{rollout * gpus / problems:,.1f}" if gpus and problems else "-",
                "" if told is None else f"{told}",
                f"{dollars[entry['round']]:,.2f}" if entry["round"] in dollars else "-",
            ]
        )
    header = ["", "trees", "tokens", "tokens/s", "per solved", *STAGES.values()]
    header += ["GPU-s", "paper", "$"]
    about = (
        "Tokens generated in search, in all, per second and per solved problem; seconds of each "
        "stage; GPU-seconds of search per problem, of the GPUs that policy and PPM replicas "
        "reserve, beside those that follow from the machines and days the paper states. A commit "
        "counts in the chart when it was written, so the last ones pile up."
    )
    if not dollars:
        about += " Set cost.prices or cost.usd_per_hour to see dollars."
    lines = "".join(paragraph(line) for line in cost_lines(cost))
    return chart + html_table(header, rows) + paragraph(about) + lines


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
        branches = _branch(tree, tree.root, iter(range(MAX_TREE_NODES)))
        parts.append(
            f"<h3>{escape(why[0].upper() + why[1:])}</h3>"
            f'<p class="problem">{escape(problem.text)}</p>'
            f'<p class="remark">{escape(about)}</p>'
            f'<div class="tree"><ul>{branches}</ul></div>'
        )
    return "".join(parts) + paragraph(
        "Only what rollouts went through; Q-value and number of visits before each step. A click "
        "opens its code. `rstar tree RUN PROBLEM --html FILE` shows a whole tree."
    )


def _branch(tree: Tree, node: Node, places: Iterator[int]) -> str:
    """List items of the visited children of a node, the most visited first.

    Args:
        places: one for each item that may be shown yet.
    """
    children = [tree.nodes[n] for n in node.children]
    visited = sorted((c for c in children if c.num_passes > 0), key=lambda c: -c.num_passes)
    items = []
    for child in visited:
        if next(places, None) is None:
            items.append('<li class="soft">...</li>')
            break
        below = _branch(tree, child, places)
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
        f'<span class="q">{node.q_value:+.2f}</span> <span class="soft">{node.num_passes}x</span> '
        f"{escape(snippet(node))}{verdict}"
    )
    step = node.step
    code = step.code if step is not None else ""
    if not code.strip():
        return f'<div class="leaf">{head}</div>'
    output = f"<pre>{escape(node.stdout)}</pre>" if node.stdout.strip() else ""
    return f"<details><summary>{head}</summary><pre>{escape(code)}</pre>{output}</details>"
