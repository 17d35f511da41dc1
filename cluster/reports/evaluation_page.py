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
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.evaluation import paper
from cluster.evaluation.results import MCTS_PASS_AT_K, METHODS, PASS_AT_K, method_label
from cluster.evaluation.shares import counts_text, percent, token_ratio
from cluster.folder.run_folder import PAGE, RunFolder
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


def write_evaluation(folder: RunFolder, report: Report) -> None:
    """Write evaluation.md, accuracy.png and report.html beside the data."""
    folder.write_bytes("evaluation.md", markdown(report).encode())
    names = benchmark_names(report)
    figure = plots.accuracy_against_tokens(report["summaries"], names, report["vote_top_k"])
    folder.write_bytes("accuracy.png", plots.as_png(figure))
    bins = _reliability(report)
    if bins:
        folder.write_bytes("reliability.png", plots.as_png(plots.reliability(bins)))
    folder.write_bytes(PAGE, page(report).encode())


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


_OF_SAMPLES = ("majority", "best-of-n", "top-k-vote", "weighted-majority")


def _accuracy_rows(
    report: Report, names: Sequence[str]
) -> Iterator[tuple[str | paper.PaperRow, list[str]]]:
    """Label and cells of each row, with the paper's rows under those of their method.

    Votes of one are left out: they are pass@1 of a single sample.
    """
    for method, rows in groupby(method_rows(report), key=itemgetter(0)):
        for _, label, cells in rows:
            budget = next(iter(cells.values()))["budget"]
            if budget > 1 or not method.startswith(_OF_SAMPLES):
                yield label, [_cell(cells.get(name)) for name in names]
        for beside in paper.rows_beside(method):
            if any(name in beside.accuracy for name in names):
                values = (beside.accuracy.get(name) for name in names)
                yield beside, ["" if v is None else f"{v:.1f}" for v in values]


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
    for row, cells in _accuracy_rows(report, names):
        if isinstance(row, str):
            table.add_row(row, *cells)
        else:
            table.add_row(f"paper T{row.table}: {row.name}", *cells, style="dim")
    return table


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return ""
    mean, low, high = (percent(summary["accuracy"][name]) for name in ("mean", "low", "high"))
    return f"{mean}\n{low}-{high}"


def _cost_table(report: Report) -> Table:
    table = Table(
        title="what an answer took: tokens and seconds, mean over the problems",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    table.add_column("benchmark", no_wrap=True)
    for name in ("% right", "generated", "/ samples", "scored", "s", "GPU-s"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, label, cells in method_rows(report):
        for name in benchmark_names(report):
            if name in cells:
                summary = cells[name]
                right = percent(summary["accuracy"]["mean"])
                shown_name = escape(paper.BENCHMARKS.get(name, name))
                table.add_row(label, shown_name, right, *_costs(summary))
                label = ""
    return table


def _costs(summary: Summary) -> tuple[str, ...]:
    gpu = summary["gpu_seconds"]
    return (
        f"{summary['generated_tokens']:,.0f}",
        token_ratio(summary["tokens_over_samples"]),
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
    rows = []
    for row, cells in _accuracy_rows(report, names):
        shown = (c.replace("\n", " (") + ")" if "\n" in c else c for c in cells)
        rows.append([row if isinstance(row, str) else row.label, *shown])
    return header, rows


def long_cells(report: Report, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of everything: a row a benchmark, method and budget."""
    header = ["benchmark", "method", "%", "95 % interval", "problems", "generated tokens"]
    header += ["over as many samples", "scored tokens", "s", "GPU-s", "outcomes"]
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
                    percent(accuracy["mean"], 2),
                    f"{percent(accuracy['low'], 2)}-{percent(accuracy['high'], 2)}",
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
