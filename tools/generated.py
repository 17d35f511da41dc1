"""Files that are made from the code and kept beside it: written, or checked.

python -m tools.NAME          write what differs
python -m tools.NAME --check  name what is out of date, and end with 1 if anything is

Tests make the same comparison for each tool.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def main(name: str, files: Mapping[Path, str]) -> int:
    """The command of a tool.

    Args:
        name: of its module under tools/.
        files: what each should hold.
    Returns:
        Exit status.
    """
    stale = {
        path: text
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    check = "--check" in sys.argv[1:]
    for path, text in stale.items():
        if check:
            print(f"{path} is out of date; run python -m tools.{name}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))
