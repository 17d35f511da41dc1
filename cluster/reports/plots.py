"""Charts of runs and evaluations: drawn once, written as PNG or set into a page as inline SVG.

    figure --as_png--> a picture on white
           --as_svg-----> SVG whose text and axes take the page's colour, light or dark

The series colours tell apart with every common kind of colour blindness, on white and on black;
markers and line styles differ as well. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.evaluation import paper
from cluster.evaluation.reliability import Bins
from cluster.evaluation.results import METHODS, WITH_LOGPROB, method_label
from cluster.evaluation.shares import COLUMNS
from cluster.reports.run_facts import Q_EDGES, RoundFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d97726", "#2a9d6e", "#b45fc2", "#c2514f", "#8f8a2a", "#7d8794", "#1f9fb0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_INK = "#010203"
"""Text and axes; the page's own colour in an SVG."""

_FAINT = "#8b95a1"
"""Grids and what stands in the background; reads on white and on black."""

MIN_BIN = 5
"""Cases below which a bin of a reliability diagram says nothing and is left out."""

HELD_OUT = {
    "greedy": "greedy",
    "majority": "majority",
    "best_of_n": "best-of-N by PPM",
    "weighted_majority": "weighted majority",
    "search": "MCTS + PPM",
    "weighted_search": "MCTS + PPM, weighted vote",
    "any_sample": "some sample (oracle)",
}
"""Method, as a round's entry of a run's report has it -> its name for people."""


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.patch.set_alpha(0.0)
    for one in axes.flat:
        one.patch.set_alpha(0.0)
        one.tick_params(which="both", colors=_INK, labelsize=9)
        for spine in one.spines.values():
            spine.set_color(_FAINT)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.grid(color=_FAINT, alpha=0.25, linewidth=0.7)
        for text in (one.xaxis.label, one.yaxis.label, one.title):
            text.set_color(_INK)
            text.set_fontsize(10)
    return figure, axes


def _panel(height: float = 3.8) -> tuple[Figure, Axes]:
    """A figure of one chart."""
    figure, axes = _figure(6.2, height)
    return figure, axes[0, 0]


def _legend(axes: Axes, **options: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8.5, **options)


def _legend_below(axes: Axes, columns: int) -> None:
    """Where it covers no line."""
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def _percent(axes: Axes, *, top: float | None = 1.0) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    small = top is not None and top < 0.05
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if small else 0))
    axes.set_ylim(0, top)


def as_png(figure: Figure) -> bytes:
    """A figure as a picture on white, and close it."""
    import matplotlib.pyplot as plt

    sink = io.BytesIO()
    figure.savefig(sink, dpi=130, format="png", facecolor="white")
    plt.close(figure)
    return sink.getvalue()


def as_svg(figure: Figure, label: str = "chart") -> str:
    """A figure as an SVG element for a page, and close it.

    Args:
        label: read out in place of the picture.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    plain = io.StringIO()
    # Ids are hashes of what they name: two charts of a page must not share one.
    salt = hashlib.sha256(repr((label, id(figure))).encode()).hexdigest()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(plain, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = plain.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # As large as it was drawn for, and smaller where the page is.
    style = f"max-width:{1.45 * 72 * figure.get_figwidth():.0f}px"
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _svg_head(label, style), text, count=1)
    text = re.sub(r"font: ([^;\"']*?) '[^\"]*?sans-serif", r"font: \1 sans-serif", text)
    return text.replace(_INK, "currentColor")


def _svg_head(label: str, style: str) -> str:
    return rf'<svg viewBox="\1" role="img" aria-label="{label}" style="{style}">'


# ------------------------------------------------------------------------------ evaluation


def accuracy_against_tokens(
    summaries: Sequence[Mapping[str, Any]], names: Sequence[str], top_k: int
) -> Figure:
    """Accuracy over generated tokens per problem, one panel a benchmark, one line a method.

    Args:
        summaries: records of `cluster.evaluation.results.Summary`.
        names: benchmarks to show, in order.
    """
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    wide = 7.0 if columns == 1 else 3.9 * columns
    known = [method for method in METHODS if any(s["method"] == method for s in summaries)]
    legend_columns = 3 if columns == 1 else 2 * columns - 1
    foot = 0.25 + 0.22 * -(-len(known) // legend_columns)
    height = 3.1 * rows + foot
    figure, axes = _figure(wide, height, rows, columns)
    shown: dict[str, Any] = {}
    for place, panel in enumerate(axes.flat):
        if place >= len(names):
            panel.set_visible(False)
            continue
        top = 0.0
        for method in known:
            points = sorted(
                (s["generated_tokens"], s["accuracy"])
                for s in summaries
                if (s["benchmark"], s["method"]) == (names[place], method)
            )
            if not points:
                continue
            style = METHODS.index(method)
            colour = COLOURS[style % len(COLOURS)]
            xs = [max(tokens, 1.0) for tokens, _ in points]
            means = [accuracy["mean"] for _, accuracy in points]
            top = max(top, *(accuracy["high"] for _, accuracy in points))
            (line,) = panel.plot(
                xs,
                means,
                color=colour,
                marker=MARKERS[style % len(MARKERS)],
                markersize=4.5,
                linewidth=1.5,
                linestyle="--" if method.endswith("pass@k") else "-",
            )
            lows = [accuracy["low"] for _, accuracy in points]
            highs = [accuracy["high"] for _, accuracy in points]
            panel.vlines(xs, lows, highs, color=colour, linewidth=1.1, alpha=0.4)
            shown.setdefault(method, line)
        panel.set_title(paper.BENCHMARKS.get(names[place], names[place]))
        panel.set_xscale("log")
        panel.set_xlabel("generated tokens per problem")
        _percent(panel, top=min(1.0, max(1.15 * top, 0.02)))
    labels = [_family(method, top_k) for method in shown]
    figure.tight_layout(rect=(0, foot / height, 1, 1))
    figure.legend(
        list(shown.values()),
        labels,
        loc="lower center",
        ncols=min(len(labels), legend_columns) or 1,
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
    )
    return figure


def _family(method: str, top_k: int) -> str:
    """A method without its budget."""
    names = {"majority": "majority", "best-of-n": "best-of-N by PPM", "pass@k": "pass@k (oracle)"}
    names |= {"mcts": f"mcts, top-{top_k} vote", "mcts pass@k": "mcts pass@k (oracle)"}
    names |= {"top-k-vote": f"top-{top_k} vote", "beam": f"beam, top-{top_k} vote"}
    names |= {"weighted-majority": "weighted majority"}
    if method.endswith(WITH_LOGPROB):
        return f"{_family(method.removesuffix(WITH_LOGPROB), top_k)}{WITH_LOGPROB}"
    return names.get(method) or method_label(method, 1, top_k)


# ----------------------------------------------------------------------------------- rounds


def coverage_by_round(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of the problems solved by round and level; the paper's Table 2 dotted beside."""
    figure, panel = _panel(4.3)
    _draw_coverage(panel, rounds)
    figure.tight_layout()
    return figure


def accuracy_by_round(
    cold: Mapping[str, Any] | None, rounds: Sequence[Mapping[str, Any]]
) -> Figure:
    """Held-out accuracy by round, a line a method; round 0 is the cold start."""
    figure, panel = _panel(4.3)
    _draw_accuracy(panel, cold, rounds)
    figure.tight_layout()
    return figure


def rounds_figure(report: Mapping[str, Any]) -> Figure:
    """Coverage by level and held-out accuracy by method, over the rounds, side by side."""
    figure, axes = _figure(11, 4.8, columns=2)
    left, right = axes[0]
    _draw_coverage(left, report["rounds"])
    _draw_accuracy(right, report.get("cold_start"), report["rounds"])
    left.set_title("training problems solved by search")
    sizes = report.get("evaluation", {})
    counts = f" (greedy: {sizes['num_problems']}, others: {sizes['num_search_problems']})"
    right.set_title("held-out problems solved" + (counts if sizes else ""))
    figure.suptitle(f"{report['name']} (seed {report['config']['seed']})", color=_INK)
    figure.tight_layout()
    return figure


def _draw_coverage(panel: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    numbers = [entry["round"] for entry in rounds]
    for place, level in enumerate(COLUMNS):
        values = [(entry.get("coverage") or {}).get(level) for entry in rounds]
        _line(panel, numbers, values, level, place, width=2.2 if level == "all" else 1.5)
        if any(value is not None for value in values):
            told = [paper.COVERAGE[n][level] / 100 for n in numbers if n in paper.COVERAGE]
            xs = [n for n in numbers if n in paper.COVERAGE]
            panel.plot(xs, told, ":", color=COLOURS[place], linewidth=1.2, alpha=0.85)
    panel.plot([], [], ":", color=_FAINT, label="the paper's 747k")
    _rounds_axis(panel)
    _percent(panel)
    _legend_below(panel, 5)


def _draw_accuracy(
    panel: Axes, cold: Mapping[str, Any] | None, rounds: Sequence[Mapping[str, Any]]
) -> None:
    entries = ([{"round": 0, **cold}] if cold else []) + list(rounds)
    for place, (method, name) in enumerate(HELD_OUT.items()):
        values = [(entry.get(method) or {}).get("all") for entry in entries]
        _line(panel, [entry["round"] for entry in entries], values, name, place)
    _rounds_axis(panel, "round (0: cold start)")
    _percent(panel)
    _legend_below(panel, 3)


def _line(
    panel: Axes,
    xs: Sequence[float],
    values: Sequence[float | None],
    name: str,
    place: int,
    width: float = 1.7,
) -> None:
    points = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
    if points:
        panel.plot(
            *zip(*points, strict=True),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=width,
            label=name,
            clip_on=False,  # a marker at 100 % is whole
        )


def _rounds_axis(panel: Axes, label: str = "round") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


# -------------------------------------------------------------------------------------- PPM


def reliability(bins: Mapping[str, Bins]) -> Figure:
    """Reliability diagram: what the PPM said against what came of it, by series."""
    figure, panel = _panel()
    panel.plot([0, 1], [0, 1], "--", color=_FAINT, linewidth=1, label="perfect")
    most = max((count for some in bins.values() for count, _, _ in some), default=1)
    for place, (name, some) in enumerate(bins.items()):
        told = [row for row in some if row[0] >= MIN_BIN]
        if not told:
            continue
        colour = COLOURS[place % len(COLOURS)]
        xs, ys = [row[1] for row in told], [row[2] for row in told]
        panel.plot(xs, ys, color=colour, linewidth=1.3)
        sizes = [16 + 110 * row[0] / most for row in told]
        panel.scatter(xs, ys, s=sizes, color=colour, alpha=0.75, linewidths=0, label=name)
    panel.set_xlabel("chance of a right answer by the PPM, (value + 1) / 2")
    panel.set_ylabel("share that was right")
    panel.set_xlim(0, 1)
    _percent(panel)
    _legend(panel, loc="upper left")
    figure.tight_layout()
    return figure


RANKINGS = {
    "ppm": "PPM",
    "logprob": "policy's log-probability",
    "blind": "PPM, question-blind",
}
"""Ranking, as a ruler's record has it -> its name for people."""


def ruler_by_round(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of held-out pairs ranked right, with intervals, by round; the gate and chance beside.

    Args:
        rounds: entries of a run's report.
    """
    figure, panel = _panel()
    measured = [entry for entry in rounds if entry.get("ruler")]
    for place, (ranking, name) in enumerate(RANKINGS.items()):
        told = [
            (entry["round"] + 0.06 * (place - 1), entry["ruler"]["rankings"][ranking])
            for entry in measured
            if ranking in entry["ruler"]["rankings"]
        ]
        _line(panel, [x for x, _ in told], [own["mean"] for _, own in told], name, place)
        lows, highs = [own["low"] for _, own in told], [own["high"] for _, own in told]
        panel.vlines([x for x, _ in told], lows, highs, color=COLOURS[place], alpha=0.5)
    panel.axhline(0.5, color=_FAINT, linestyle=":", linewidth=1.2, label="chance")
    gate = measured[-1]["ruler"]["min_pair_accuracy"] if measured else None
    if gate is not None:
        panel.axhline(
            gate,
            color=_FAINT,
            linestyle="--",
            linewidth=1.2,
            label="the PPM's lower bound has to be above",
        )
    panel.set_xlabel("round")
    panel.set_xticks([entry["round"] for entry in measured])
    panel.margins(x=0.15)
    _percent(panel)
    _legend(panel, loc="lower right")
    figure.tight_layout()
    return figure


def q_histograms(rounds: Mapping[int, RoundFacts]) -> Figure:
    """Q-values of visited steps, by round: those that led to a right answer and the others."""
    columns = min(max(len(rounds), 1), 4)
    rows = -(-max(len(rounds), 1) // columns)
    figure, axes = _figure(2.9 * columns + 0.4, 2.7 * rows, rows, columns)
    width = Q_EDGES[1] - Q_EDGES[0]
    centres = [edge + width / 2 for edge in Q_EDGES[:-1]]
    for panel, number in zip(axes.flat, sorted(rounds), strict=False):
        right, wrong = rounds[number].q_right, rounds[number].q_wrong
        panel.bar(centres, right, width=0.9 * width, color=COLOURS[0], label="right answer below")
        panel.bar(centres, wrong, width=0.9 * width, bottom=right, color=COLOURS[1], label="none")
        panel.set_title(f"round {number}")
        panel.set_xlabel("Q-value")
    for panel in list(axes.flat)[len(rounds) :]:
        panel.set_visible(False)
    axes[0, 0].set_ylabel("visited steps")
    _legend(axes[0, 0], loc="upper center")
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------- training, throughput


def training_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss over the steps, a line a round.

    Args:
        curves: name -> (step, loss), smoothed by whoever calls.
    """
    figure, panel = _panel(3.6)
    _curves(panel, curves)
    panel.set_xlabel("optimiser step")
    panel.set_ylabel("loss")
    losses = [loss for points in curves.values() for _, loss in points]
    if losses and 0 < 20 * min(losses) < max(losses):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    _legend(panel, loc="upper right")
    figure.tight_layout()
    return figure


def throughput(series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Generated tokens per second over the time of a round.

    Args:
        series: name -> (minutes since the round began, rate).
    """
    figure, panel = _panel(3.6)
    _curves(panel, series, drawstyle="steps-mid")
    panel.set_xlabel("minutes since the first commit of the round")
    panel.set_ylabel("generated tokens/s")
    panel.set_ylim(bottom=0)
    _legend(panel, loc="lower right")
    figure.tight_layout()
    return figure


def _curves(
    panel: Axes, series: Mapping[str, Sequence[tuple[float, float]]], **options: Any
) -> None:
    for place, (name, points) in enumerate(series.items()):
        if points:
            colour = COLOURS[place % len(COLOURS)]
            panel.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.5, label=name, **options
            )
