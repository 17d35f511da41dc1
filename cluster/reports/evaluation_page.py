"""What an evaluation showed, for people: tables laid out as the paper's, Markdown, plots, a page.

    evaluation.json --> the terminal: accuracy (methods x benchmarks) and cost
                    --> evaluation.md: the same, and every number with its interval and cost
                    --> accuracy.png, report.html

The paper's rows stand under ours where it has a row for the method. Shares are percent here and
fractions of 1 in the files.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.evaluation import paper
from cluster.evaluation.results import MCTS_PASS_AT_K, METHODS, PASS_AT_K, method_label
from cluster.reports import plots
from cluster.reports.page import Section, html_table, paragraph, render_report

_LABEL_WIDTH, _COLUMN_WIDTH = 34, 12
"""Characters of the accuracy table in a terminal; benchmarks that do not fit get a table more."""

ORACLES = (PASS_AT_K, MCTS_PASS_AT_K)

Report = Mapping[str, Any]
Summary = Mapping[str, Any]


def benchmark_names(report: Report) -> list[str]:
    """The benchmarks of a report in the paper's order, others behind."""
    names = [benchmark["name"] for benchmark in report["benchmarks"]]
    known = list(paper.BENCHMARKS)
    return sorted(names, key=lambda n: known.index(n) if n in known else len(known))


def print_evaluation(report: Report, console: Console) -> None:
    """Accuracy and cost as tables, then what is to be known about them."""
    names = benchmark_names(report)
    room = max((console.width - _LABEL_WIDTH) // _COLUMN_WIDTH, 1)
    for start in range(0, len(names), room):
        console.print(_accuracy_table(report, names[start : start + room]))
    console.print(_cost_table(report))
    for line in notes(report):
        console.print(line, markup=False, highlight=False)


def write_evaluation(root: Path, report: Report) -> None:
    """Write evaluation.md, accuracy.png and report.html beside the data."""
    (root / "evaluation.md").write_text(markdown(report), encoding="utf-8")
    names = benchmark_names(report)
    figure = plots.accuracy_against_tokens(report["summaries"], names, report["vote_top_k"])
    plots.write_png(figure, root / "accuracy.png")
    bins = _reliability(report)
    if bins:
        plots.write_png(plots.reliability(bins), root / "reliability.png")
    (root / "report.html").write_text(page(report), encoding="utf-8")


# ------------------------------------------------------------------------------------ rows


def method_rows(report: Report) -> list[tuple[str, str, dict[str, Summary]]]:
    """(method, label, summary by benchmark) of each row of the accuracy table."""
    rows: dict[tuple[str, int], dict[str, Summary]] = {}
    for summary in report["summaries"]:
        key = (summary["method"], summary["budget"])
        rows.setdefault(key, {})[summary["benchmark"]] = summary
    ordered = sorted(rows, key=lambda key: (METHODS.index(key[0]), key[1]))
    top_k = report["vote_top_k"]
    return [(method, method_label(method, k, top_k), rows[method, k]) for method, k in ordered]


def _reliability(report: Report) -> dict[str, list[tuple[int, float, float]]]:
    """Bins of the arms whose answers the PPM valued."""
    found = {}
    for arm, facts in report["arms"].items():
        bins = [(int(n), float(chance), float(share)) for n, chance, share in facts["reliability"]]
        if any(n for n, _, _ in bins):
            found[f"answers of {arm}"] = bins
    return found


def _short(rows: Sequence[tuple[str, str, dict[str, Summary]]]) -> list[Any]:
    """Without votes of one, which are pass@1 of a single sample."""
    alone = ("majority", "best-of-n", "top-k-vote")
    return [row for row in rows if not (row[0] in alone and _budget(row[2]) == 1)]


def _budget(cells: Mapping[str, Summary]) -> int:
    return next(iter(cells.values()))["budget"]


def _accuracy_table(report: Report, names: Sequence[str]) -> Table:
    table = Table(
        title=escape(f"{report['name']}: % right (95 % interval over problems)"),
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for name in names:
        shown_name = escape(paper.BENCHMARKS.get(name, name))
        table.add_column(shown_name, justify="right", no_wrap=True)
    counts = {b["name"]: b["num_problems"] for b in report["benchmarks"]}
    table.add_row("problems", *(f"{counts[name]:,}" for name in names), style="dim")
    rows = _short(method_rows(report))
    for place, (method, label, cells) in enumerate(rows):
        table.add_row(label, *(_cell(cells.get(name)) for name in names))
        if place + 1 == len(rows) or rows[place + 1][0] != method:
            for beside in paper.rows_beside(method):
                if any(name in beside.accuracy for name in names):
                    shown = (beside.accuracy.get(name) for name in names)
                    table.add_row(
                        f"paper T{beside.table}: {beside.name}",
                        *("" if v is None else f"{v:.1f}" for v in shown),
                        style="dim",
                    )
    return table


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return ""
    accuracy = summary["accuracy"]
    low, high = 100 * accuracy["low"], 100 * accuracy["high"]
    return f"{100 * accuracy['mean']:.1f}\n{low:.1f}-{high:.1f}"


def _cost_table(report: Report) -> Table:
    table = Table(
        title="what an answer took: tokens and seconds, mean over the problems",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    table.add_column("benchmark", no_wrap=True)
    for name in ("% right", "generated", "scored", "s", "GPU-s"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, label, cells in method_rows(report):
        for name in benchmark_names(report):
            if name in cells:
                summary = cells[name]
                right = f"{100 * summary['accuracy']['mean']:.1f}"
                shown_name = escape(paper.BENCHMARKS.get(name, name))
                table.add_row(label, shown_name, right, *_costs(summary))
                label = ""
    return table


def _costs(summary: Summary) -> tuple[str, str, str, str]:
    gpu = summary["gpu_seconds"]
    return (
        f"{summary['generated_tokens']:,.0f}",
        f"{summary['scored_tokens']:,.0f}",
        f"{summary['seconds']:,.2f}",
        "-" if gpu is None else f"{gpu:,.2f}",
    )


def notes(report: Report) -> list[str]:
    """What is to be known about the numbers, a line each."""
    lines = [f"warning: {warning}" for warning in report["warnings"]]
    for benchmark in report["benchmarks"]:
        said = []
        if benchmark["num_sentences"]:
            said.append(
                f"{benchmark['num_sentences']} answers are sentences a machine can only "
                "compare letter by letter"
            )
        if benchmark["num_repeated"]:
            said.append(f"{benchmark['num_repeated']} statements stand there twice")
        if benchmark["skipped"]:
            said.append("left out: " + counts_text(benchmark["skipped"]))
        if said:
            lines.append(f"{benchmark['name']}: {'; '.join(said)}")
    for arm, facts in report["arms"].items():
        lines.append(
            f"{arm}: {facts['answered_problems']:,} of {facts['problems']:,} problems answered, "
            f"{facts['solutions']:,} solutions, {facts['undecided']:,} answers the grader could "
            f"not decide (counted wrong), {len(facts['quarantined'])} quarantined, "
            f"lost {facts['lost']}, doubled {facts['doubled']}; {facts['seconds']:,.0f} s"
        )
        if facts["failures"]:
            lines.append(f"{arm}, solutions without an answer: {counts_text(facts['failures'])}")
    return lines


def counts_text(counts: Mapping[str, int]) -> str:
    """`unfinished 12, code failed 3`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"


# -------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The whole evaluation as Markdown."""
    names = benchmark_names(report)
    parts = [f"# {report['name']}\n", *(f"- {line}" for line in _about(report)), ""]
    parts += ["## Accuracy, %\n", *_markdown_table(*accuracy_cells(report, names)), ""]
    parts += ["## Every number\n", *_markdown_table(*long_cells(report, names)), ""]
    parts += ["## Notes\n", *(f"- {line}" for line in notes(report)), ""]
    return "\n".join(parts)


def _about(report: Report) -> Iterator[str]:
    for kind, model in report["models"].items():
        yield f"{kind}: {model['version']} ({model['path']})"
    yield f"prompt: {report['prompt']}; seed {report['config']['seed']}"
    machine = report["hardware"]
    gpus = ", ".join(machine.get("gpus", ())) or "no GPU"
    yield f"{machine['cores']} cores of {machine['cpu']}, {gpus}; {report['seconds_total']:,.0f} s"


def accuracy_cells(report: Report, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the accuracy table, the paper's rows under those of their method."""
    header = ["", *(paper.BENCHMARKS.get(name, name) for name in names)]
    rows: list[list[str]] = []
    found = _short(method_rows(report))
    for place, (method, label, cells) in enumerate(found):
        shown = (_cell(cells.get(name)).replace("\n", " (") for name in names)
        rows.append([label, *(f"{cell})" if cell else "" for cell in shown)])
        if place + 1 == len(found) or found[place + 1][0] != method:
            for beside in paper.rows_beside(method):
                if any(name in beside.accuracy for name in names):
                    values = (beside.accuracy.get(name) for name in names)
                    shown_values = ["" if v is None else f"{v:.1f}" for v in values]
                    rows.append([beside.label, *shown_values])
    return header, rows


def long_cells(report: Report, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of everything: a row a benchmark, method and budget."""
    header = ["benchmark", "method", "%", "95 % interval", "problems", "generated tokens"]
    header += ["scored tokens", "s", "GPU-s", "outcomes"]
    rows = []
    for name in names:
        for summary in report["summaries"]:
            if summary["benchmark"] != name:
                continue
            accuracy = summary["accuracy"]
            label = method_label(summary["method"], summary["budget"], report["vote_top_k"])
            rows.append(
                [
                    paper.BENCHMARKS.get(name, name),
                    label + (" (oracle)" if summary["method"] in ORACLES else ""),
                    f"{100 * accuracy['mean']:.2f}",
                    f"{100 * accuracy['low']:.2f}-{100 * accuracy['high']:.2f}",
                    f"{accuracy['num_problems']:,}",
                    *_costs(summary),
                    counts_text(summary["outcomes"]),
                ]
            )
    return header, rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if n == 0 else "---:" for n in range(len(header))) + "|",
    ]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


# ------------------------------------------------------------------------------------ page


def page(report: Report) -> str:
    """One self-contained HTML page."""
    names = benchmark_names(report)
    figure = plots.accuracy_against_tokens(report["summaries"], names, report["vote_top_k"])
    header, cells = accuracy_cells(report, names)
    rows = [[cell.replace(" (", "\n(") for cell in row] for row in cells]
    sections = [
        Section(
            title="Accuracy",
            body=html_table(header, rows, quiet=lambda row: row[0].startswith("paper"))
            + paragraph(
                "Percent right, with the 95 % interval of a bootstrap over problems. Rows of the "
                "paper (arXiv 2501.04519) are of its own models and budgets."
            ),
        ),
        Section(
            title="Accuracy against tokens",
            body=plots.as_svg(figure)
            + paragraph(
                "A point is a budget; its generated tokens are the mean over problems of what that "
                "budget's solutions took. All budgets of a curve choose among the same solutions."
            ),
        ),
        *_ppm_section(report),
        Section(title="Every number", body=html_table(*long_cells(report, names)), folded=True),
        Section(
            title="Notes",
            body="<ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in notes(report)) + "</ul>",
        ),
    ]
    return render_report(f"Evaluation {report['name']}", list(_about(report)), sections)


def _ppm_section(report: Report) -> Iterator[Section]:
    bins = _reliability(report)
    if bins:
        chart = plots.as_svg(plots.reliability(bins), "reliability of the PPM")
        yield Section(
            title="The PPM",
            body=f'<div class="charts"><figure>{chart}</figure></div>'
            + paragraph(
                "What the PPM said of an answer against the share that was right; a dot's size is "
                f"the number of answers, and bins of fewer than {plots.MIN_BIN} are left out."
            ),
        )
