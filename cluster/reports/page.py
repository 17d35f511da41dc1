"""The frame of every page for people: one HTML file without outside assets.

    sections (title, HTML) --> page.html with styles for light and dark --> one file

Whatever a model wrote is escaped before it gets here, and the policy (CSP) of page.html forbids
every script and every request, so that a page that is passed on can do nothing. Charts are inline
SVG whose text and axes take the page's colours (`cluster.reports.plots.as_svg`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.folder.run_folder import RunFolderError, why_not_written
from rollout.files import atomic_write

_PAGE = Path(__file__).with_name("page.html")

_NUMBER = re.compile(r"-|[-+]?[$]?[0-9][0-9,.]*(?:[ %].*| ?\(.*\)|-[0-9.,]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a page."""

    title: str
    body: str
    """HTML; text of models and users in it is escaped."""
    folded: bool = False
    """Closed until it is clicked."""


def render_report(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        about: lines under the title, plain text.
    """
    anchored = [(f"s{number}", section) for number, section in enumerate(sections)]
    return fill(
        _PAGE.read_text(encoding="utf-8"),
        TITLE=escape(title),
        ABOUT="".join(f"<p>{escape(line)}</p>" for line in about),
        LINKS=" ".join(f'<a href="#{a}">{html.escape(s.title)}</a>' for a, s in anchored),
        SECTIONS="\n".join(_section(anchor, section) for anchor, section in anchored),
    )


def fill(page: str, **fillings: str) -> str:
    """A page with every `{{NAME}}` of it replaced; one in what is filled in stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fillings[match[1]], page)


def write_page(path: Path, text: str) -> None:
    """Write a page whole.

    Raises:
        RunFolderError: it cannot be written.
    """
    try:
        atomic_write(path, text)
    except OSError as error:
        raise RunFolderError(f"{path}: {why_not_written(error)}") from error


def _section(anchor: str, section: Section) -> str:
    title = html.escape(section.title)
    if section.folded:
        inner = f"<details><summary><h2>{title}</h2></summary>{section.body}</details>"
    else:
        inner = f"<h2>{title}</h2>{section.body}"
    return f'<section id="{anchor}">{inner}</section>'


_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters as backslash escapes."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def escape(text: object) -> str:
    """Text for HTML; control and direction characters are made visible."""
    return html.escape(visible(str(text)))


def paragraph(text: str) -> str:
    """A remark under a table or a chart."""
    return f'<p class="remark">{escape(text)}</p>'


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    quiet: Callable[[Sequence[str]], bool] = lambda row: False,
) -> str:
    """A table; numbers stand at the right, and a wide one scrolls by itself.

    Args:
        rows: what follows a line end in a cell stands small under the rest.
        quiet: rows to be shown in the background.
    """
    if not rows:
        return '<p class="remark">nothing to show</p>'
    right = [
        all(_NUMBER.fullmatch(row[n].replace("\n", " ")) or not row[n] for row in rows)
        and any(row[n] for row in rows)
        for n in range(len(header))
    ]
    sides = [' class="number"' if numbers else "" for numbers in right]
    head = "".join(f"<th{side}>{escape(h)}</th>" for h, side in zip(header, sides, strict=True))
    body = "".join(
        f"<tr{' class=quiet' if quiet(row) else ''}>"
        + "".join(f"<td{side}>{_cell(cell)}</td>" for cell, side in zip(row, sides, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(text: str) -> str:
    first, mark, rest = text.partition("\n")
    return f"{escape(first)}<small>{escape(rest)}</small>" if mark else escape(text)


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """A few numbers to see first: (value, what it is)."""
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in facts
    )
    return f'<div class="tiles">{cells}</div>'
