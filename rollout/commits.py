"""What stands in the markers and manifests of a round: commits of shards, and sums over trees.

    Commit      a shard: its data file, its trees, what of it failed or was handed back
    Manifest    a sealed round: its data files, fixed

Records and their JSON, no store; `rollout.store` says when which of them is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from rollout.table import SCHEMA_VERSION
from rollout.tree import Tree


class TreeKey(NamedTuple):
    """Which tree of a round, and whether it solved its problem.

    A tuple: a status reads hundreds of thousands, and a dataclass takes three times as long.
    """

    problem_id: str
    index: int  # type: ignore[assignment]  # no one looks for values in it
    solved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over trees."""

    trees: int = 0
    solved: int = 0
    nodes: int = 0
    rollouts: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    scored_tokens: int = 0
    executions: int = 0
    trees_by_level: Mapping[str, int] = field(default_factory=dict)
    solved_by_level: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, trees: Iterable[Tree]) -> Totals:
        """Count trees."""
        return cls.sum(cls._of_one(tree) for tree in trees)

    @classmethod
    def sum(cls, parts: Iterable[Totals]) -> Totals:
        """Add totals up."""
        sums: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | {name: {} for name in _COUNTS_BY_LEVEL}
        for part in parts:
            for name in _COUNTS:
                sums[name] += getattr(part, name)
            for name in _COUNTS_BY_LEVEL:
                levels = sums[name]
                for level, count in getattr(part, name).items():
                    levels[level] = levels.get(level, 0) + count
        return cls(**sums)

    @classmethod
    def _of_one(cls, tree: Tree) -> Totals:
        level = str(tree.problem.level)
        return cls(
            trees=1,
            solved=int(tree.solved),
            nodes=len(tree.nodes),
            rollouts=tree.num_rollouts,
            generated_tokens=tree.generated_tokens,
            prompt_tokens=tree.prompt_tokens,
            cached_tokens=tree.cached_tokens,
            scored_tokens=tree.scored_tokens,
            executions=tree.num_executions,
            trees_by_level={level: 1},
            solved_by_level={level: int(tree.solved)},
        )


_COUNTS_BY_LEVEL = [f.name for f in fields(Totals) if f.name.endswith("_by_level")]
_COUNTS = [f.name for f in fields(Totals) if f.name not in _COUNTS_BY_LEVEL]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The marker of a committed shard: what stands in its data file, and what does not."""

    shard: str
    attempt: str
    """Unique to the writer; tells one's own marker from another's."""
    path: str
    """Of the data file, relative to the store's root."""
    num_rows: int
    num_bytes: int
    sha256: str
    """Of the data file."""
    schema_version: int = SCHEMA_VERSION
    trees: tuple[TreeKey, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Quarantined problems of the shard: id -> error."""
    remaining: tuple[tuple[str, ...], ...] = ()
    """Problems handed back, in groups; each group is a new shard."""
    totals: Totals = field(default_factory=Totals)
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the writer said of itself: versions, worker, stage."""

    def to_json(self) -> bytes:
        return to_json(
            {
                **asdict(self),
                "trees": [[t.problem_id, t.index, int(t.solved)] for t in self.trees],
            }
        )

    @classmethod
    def from_json(cls, data: bytes, *, trees: bool = True) -> Commit:
        """Read a marker.

        Args:
            trees: False leaves `trees` empty, where only sums and parts are asked for.
        Raises:
            ValueError: the bytes are not a commit marker.
        """
        parsed = _from_json(data, "commit marker")
        try:
            keys = parsed["trees"] if trees else ()
            parsed["trees"] = tuple(
                TreeKey(problem_id, index, bool(solved)) for problem_id, index, solved in keys
            )
            parsed["remaining"] = tuple(tuple(group) for group in parsed["remaining"])
            parsed["totals"] = Totals(**parsed["totals"])
            return cls(**parsed)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a commit marker: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One data file of a sealed round."""

    shard: str
    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    num_trees: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a sealed round consists of; never changes once it exists."""

    round: int
    schema_version: int = SCHEMA_VERSION
    files: tuple[ManifestFile, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Quarantined problems: id -> error."""
    totals: Totals = field(default_factory=Totals)

    def to_json(self) -> bytes:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError if the bytes are not a manifest."""
        parsed = _from_json(data, "manifest")
        try:
            parsed["files"] = tuple(ManifestFile(**f) for f in parsed["files"])
            parsed["totals"] = Totals(**parsed["totals"])
            return cls(**parsed)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def to_json(record: Mapping[str, Any]) -> bytes:
    # ASCII escapes keep whatever a model wrote, lone surrogates included.
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _from_json(data: bytes, what: str) -> dict[str, Any]:
    parsed = json.loads(data)
    if not isinstance(parsed, dict):
        raise ValueError(f"not a {what}: a JSON object was expected")
    return parsed
