"""API keys: who may ask, and as whom.

    sk-one-line-is-a-key
    team-b  sk-another      # a name before it appears in logs and shares the queue

Keys are held as digests, so that looking one up takes as long for a wrong one as for a right one,
and that no dump or log holds one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from cluster.folder.config_file import ConfigError

VARIABLE = "RSTAR_API_KEYS"
"""Environment variable with keys, as lines of a key file or separated by commas."""

MIN_LENGTH = 16


class Keys:
    """The keys that are let in; none at all: everybody is."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """
        Args:
            names: of each key, by its digest.
        """
        self._names = dict(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's."""
        return self._names.get(_digest(key))


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Keys of a file, or without one of the environment.

    Raises:
        ConfigError: the file cannot be read or holds none, or a key is too short; no key is told.
    """
    if file is not None:
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"{where}: API keys cannot be read: {why}") from error
    else:
        where = VARIABLE
        text = environment.get(VARIABLE, "").replace(",", "\n")
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2:
            raise ConfigError(f"{where}, line {number}: expected KEY or NAME KEY")
        if len(words[-1]) < MIN_LENGTH:
            raise ConfigError(f"{where}, line {number}: a key has at least {MIN_LENGTH} characters")
        names[_digest(words[-1])] = words[0] if len(words) == 2 else f"key-{number}"
    if file is not None and not names:
        raise ConfigError(f"{where}: no API key in it")
    return Keys(names)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
