"""Finished trees on any fsspec store, exactly once.

    worker:  data/<shard>-<attempt>.parquet   a unique name, never written twice
             derived/<kind>/<shard>-<attempt> what was made of it for a later stage
             commits/<shard>.json             create-only: the first to create it has committed
    reader:  gathered/<digest>.jsonl.gz       copies of many markers, read in the place of these
    round:   manifest.json                    create-only: what readers and the learner read

    <root>/trajectories/round=R/plans/<stage>.json     which problems a stage searches
                               /data/<shard>-<attempt>.parquet
                               /derived/<kind>/<shard>-<attempt>
                               /commits/<shard>.json
                               /gathered/<digest>.jsonl.gz
                               /manifest.json
                               /regrades/<NNNN>/plan.json, data/, commits/, ..., manifest.json
    <root>/evaluations/round=R/...                     likewise, of the evaluation of round R
    <root>/rulers/round=R/...                          likewise, of what its PPM is measured on

The one decision, who has committed a shard, is the creation of one key, which a store either grants
once or is refused at the start (`RunStore.self_check`). Two workers that hold the same shard, a
worker that lost its lease long ago and a retry after an unclear answer can therefore do no harm:
the loser deletes its own data. No database, no lock and no memory of any process is needed.

A sealed round never changes. A newer grader writes its verdicts beside it, as a generation of their
own (`rollout.regrade`) with the same shards and rules; readers take the newest one that is sealed.

What is derived from a data file bears its name and is written before its marker, so it is of the
same commit: that of a loser has another name and is never read. It can be made again, so it may be
missing. Each generation has its own.

A commit may cover only a part of its shard: `remaining` then names the groups of problems that
were handed back, each the problems of one new shard. Part and rest are decided by the same marker.

What a killed worker left, a data file no marker names, is removed once the round is sealed and the
file is older than any lease (`TrajectoryStore.remove_orphans`).

A marker never changes, so a copy of it says the same. Whoever reads each as it comes
(`gathered_commit`: the coordinator) writes every `GATHERED` of them into one file, so that a round
of ten thousand shards is read in dozens of requests. Without these files nothing but time is lost.

The store itself is `rollout.run_store`, the records of markers and manifests `rollout.commits`;
other packages take them from here.

A listing on a network file system may be a minute old, so what has to be complete goes by names: a
seal looks each shard up that a listing lacks, and so does whoever knows which are committed
(`named_commits`); the markers of a sealed round are those of the files in its manifest.

Not covered: local file systems without hard links, which `self_check` refuses; what is listed of a
round that is not sealed may lack the commits of the last minute, and never shows wrong ones.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import logging
import posixpath
import time
import uuid
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.commits import Commit, Manifest, ManifestFile, Totals, TreeKey, to_json
from rollout.run_store import RunStore, StoreError
from rollout.table import table_to_bytes, table_to_trees, trees_to_table
from rollout.tree import Tree

__all__ = [
    "Commit",
    "Manifest",
    "ManifestFile",
    "RunStore",
    "StoreError",
    "Totals",
    "TrajectoryStore",
    "TreeKey",
    "evaluation_of",
    "folder_of",
    "ruler_of",
    "stored_rounds",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", Commit, ManifestFile)

LISTING_S = 60.0
"""What a listing lacks is looked up by name for so long before it counts as missing."""

LOOK_UP_PAUSE_S = 2.0

GATHERED = 128
"""Markers of one gathered file."""

_MARKERS_AT_ONCE = 4096
"""Bounds the memory of reading a round's markers, which are many times larger than what is kept."""


class TrajectoryStore:
    """The trees of one round: committed by shard, sealed once, read from the manifest."""

    def __init__(self, store: RunStore, round: int) -> None:
        self.store = store
        self.round = round
        self.prefix = folder_of(round)
        self._loose: dict[str, bytes] = {}
        """Markers by shard that this one is to write into a gathered file."""

    # -- writing

    def commit(
        self,
        shard_id: str,
        trees: Sequence[Tree],
        *,
        info: Mapping[str, Any] | None = None,
        failed: Mapping[str, str] | None = None,
        remaining: Sequence[Sequence[str]] = (),
        derived: Mapping[str, bytes] | None = None,
        attempt: str | None = None,
    ) -> bool:
        """Write the trees of a shard and claim it.

        Args:
            attempt: unique to this result, letters and digits; given again with a second call for
                the same trees after a failure, it tells one's own marker. None: a new one.
            info: anything JSON can hold, kept in the marker.
            failed: quarantined problems of the shard, id -> error.
            remaining: problems of the shard handed back, in groups.
            derived: kind -> what was made of these trees; see `read_derived`.
        Returns:
            False if somebody else had committed the shard; the data written here is deleted.
        Raises:
            StoreError: the store failed; nothing is committed by this call, unless the answer to
                the last request was lost, which calling again with the same `attempt` finds out.
        """
        attempt = attempt or _new_attempt()
        if self.store.exists(self._marker(shard_id)):
            return self._is_own(shard_id, attempt, derived or (), generation=0)
        table = trees_to_table(trees)
        commit = Commit(
            shard=shard_id,
            attempt=attempt,
            path="",
            num_rows=table.num_rows,
            num_bytes=0,
            sha256="",
            trees=tuple(
                TreeKey(problem_id=t.problem.id, index=t.index, solved=t.solved) for t in trees
            ),
            failed=dict(failed or {}),
            remaining=tuple(tuple(group) for group in remaining),
            totals=Totals.of(trees),
            info=dict(info or {}),
        )
        return self._commit_table(commit, table, generation=0, derived=derived)

    def _commit_table(
        self,
        commit: Commit,
        table: pa.Table,
        *,
        generation: int,
        derived: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Write the data file of a commit and claim its shard; as `commit`."""
        data = table_to_bytes(table)
        path = self._data(commit.shard, commit.attempt, generation)
        commit = replace(
            commit,
            path=path,
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        self.store.put_new(path, data)
        beside = {_derived(path, kind): made for kind, made in (derived or {}).items()}
        for name, made in beside.items():
            self.store.put_new(name, made)
        if self.store.create(self._marker(commit.shard, generation), commit.to_json()):
            return True
        return self._is_own(commit.shard, commit.attempt, derived or (), generation=generation)

    def _is_own(
        self, shard_id: str, attempt: str, kinds: Iterable[str], *, generation: int
    ) -> bool:
        """Whether the marker that stands is of this attempt; what it wrote goes if not."""
        if self.read_commit(shard_id, trees=False, generation=generation).attempt == attempt:
            return True
        path = self._data(shard_id, attempt, generation)
        # A key that may only create leaves them to `remove_orphans`.
        with contextlib.suppress(StoreError):
            for name in (path, *(_derived(path, kind) for kind in kinds)):
                self.store.delete(name)
        return False

    def seal(self, shard_ids: Iterable[str] | None = None) -> Manifest:
        """Fix what the round consists of; the first seal stands and later ones return it.

        Args:
            shard_ids: the shards to include; None: all committed ones.
        Raises:
            StoreError: a shard is not committed, or two shards hold the same tree.
        """
        sealed = self.manifest()
        if sealed is not None:
            return sealed
        wanted = None if shard_ids is None else set(shard_ids)
        failed: dict[str, Mapping[str, str]] = {}
        names = array("Q")

        def taken() -> Iterator[Commit]:
            for commit in self._wanted(wanted, generation=0):
                names.extend(_short_name(tree) for tree in commit.trees)
                if commit.failed:
                    failed[commit.shard] = commit.failed
                yield commit

        files, totals = _listed(taken())
        files.sort(key=lambda file: file.shard)
        shards = {file.shard for file in files}
        missing = sorted((wanted or set()) - shards)
        if missing:
            raise StoreError(
                f"round {self.round} cannot be sealed: {len(missing)} of "
                f"{len(missing) + len(shards)} shards are not committed, the first is {missing[0]}"
            )
        if any(one == other for one, other in pairwise(sorted(names))):
            self._check_disjoint(shards)
        named = {p: error for shard in sorted(failed) for p, error in failed[shard].items()}
        return self._create_manifest(files, named, totals, generation=0)

    def _create_manifest(
        self,
        files: Sequence[ManifestFile],
        failed: Mapping[str, str],
        totals: Totals,
        *,
        generation: int,
    ) -> Manifest:
        """Write the manifest of a generation; the first one stands."""
        manifest = Manifest(round=self.round, files=tuple(files), failed=failed, totals=totals)
        if self.store.create(self._manifest_path(generation), manifest.to_json()):
            return manifest
        sealed = self.manifest(generation)
        assert sealed is not None
        return sealed

    # -- regrading

    def generation(self) -> int:
        """Number of the newest sealed regrade; 0: the verdicts are those of the searches."""
        sealed = (n for n in reversed(self._regrades()) if self.manifest(n) is not None)
        return next(sealed, 0)

    def begin_regrade(self, grader: str) -> int:
        """The generation that a grader is to write, new or left unfinished.

        Raises:
            StoreError: a plan cannot be read.
        """
        newest = self.generation()
        plan = {"grader": grader, "from_generation": newest}
        number = newest
        while True:
            number += 1
            path = f"{self._folder(number)}/plan.json"
            if self.store.create(path, to_json(plan)):
                return number
            if _parse(json.loads, self.store.read(path), path) == plan:
                return number

    def commit_regrade(self, generation: int, commit: Commit, table: pa.Table) -> bool:
        """Write the rows of a shard with new verdicts; False if somebody had, as `commit`.

        Args:
            commit: of the shard in the generation before, with what the verdicts changed.
        """
        if self.store.exists(self._marker(commit.shard, generation)):
            return False
        commit = replace(commit, attempt=_new_attempt())
        return self._commit_table(commit, table, generation=generation)

    def seal_regrade(self, generation: int) -> Manifest:
        """Make a generation the one that readers take; harmless if it is.

        Removes what a killed writer left of it.

        Raises:
            StoreError: shards of the round are missing.
        """
        sealed = self.manifest(generation)
        if sealed is not None:
            return sealed
        before = self.manifest()
        assert before is not None
        shards = {file.shard for file in before.files}
        commits = {c.shard: c for c in self._wanted(shards, generation=generation)}
        missing = [file.shard for file in before.files if file.shard not in commits]
        if missing:
            raise StoreError(
                f"regrade {generation} of round {self.round} cannot be sealed: {len(missing)} "
                f"shards are not graded, the first is {missing[0]}"
            )
        ordered = [commits[file.shard] for file in before.files]
        files, totals = _listed(ordered)
        manifest = self._create_manifest(files, before.failed, totals, generation=generation)
        named = {commit.path for commit in ordered}
        folder = f"{self._folder(generation)}/data"
        for path in [*self.store.files(folder), *self.store.unfinished(folder)]:
            if path not in named:
                self.store.delete(path)
        return manifest

    # -- reading

    def read_commit(self, shard_id: str, *, trees: bool = True, generation: int = 0) -> Commit:
        """The marker of a committed shard, looked up by name.

        Args:
            trees: as of `commits`.
        Raises:
            FileNotFoundError: the shard is not committed.
            StoreError: the marker cannot be read.
        """
        path = self._marker(shard_id, generation)
        return self._parse_commit(self.store.read(path), path, trees=trees)

    def gathered_commit(self, shard_id: str) -> Commit:
        """As `read_commit` without trees, for who reads each marker of the round once, as it comes:
        every `GATHERED` of them are written into one file for all who read them later."""
        path = self._marker(shard_id)
        data = self.store.read(path)
        commit = self._parse_commit(data, path, trees=False)
        self._loose[shard_id] = data
        self._gather()
        return commit

    def _gather(self) -> None:
        if len(self._loose) < GATHERED:
            return
        loose, self._loose = self._loose, {}
        name = hashlib.sha256(" ".join(sorted(loose)).encode()).hexdigest()[:16]
        data = gzip.compress(b"\n".join(loose.values()), compresslevel=1, mtime=0)
        try:
            self.store.put(f"{self.prefix}/gathered/{name}.jsonl.gz", data, durable=False)
        except StoreError as error:  # the markers stand
            logger.warning("Markers were not gathered: %s round=%d", error, self.round)

    def commits(self, *, trees: bool = True, generation: int | None = None) -> dict[str, Commit]:
        """All markers of the round by shard id.

        Args:
            trees: False leaves `Commit.trees` empty: half the time for a round of many shards.
            generation: of a regrade, 0 for the searches' own; None: the newest that is sealed.
        Raises:
            StoreError: a marker cannot be read; the message names it.
        """
        return {c.shard: c for c in self.each_commit(trees=trees, generation=generation)}

    def named_commits(self, shard_ids: Iterable[str]) -> dict[str, Commit]:
        """The markers of shards that are known to be committed, whatever a listing says.

        Raises:
            StoreError: a marker is missing or cannot be read; the message names it.
        """
        wanted = set(shard_ids)
        found = {commit.shard: commit for commit in self._wanted(wanted, generation=0)}
        if missing := sorted(wanted - found.keys()):
            raise StoreError(
                f"{len(missing)} commit markers of round {self.round} of {self.store.root} are "
                f"missing, the first is {self._marker(missing[0])}"
            )
        return found

    def each_commit(
        self, *, trees: bool = True, generation: int | None = None, gather: bool = False
    ) -> Iterator[Commit]:
        """The markers of the round one after the other, a bounded number of them in memory.

        Args:
            trees, generation: as of `commits`.
            gather: write those that are in no gathered file into some (of generation 0).
        Raises:
            StoreError: a marker cannot be read; the message names it.
        """
        number = self.generation() if generation is None else generation
        sealed = self.manifest(number)
        if sealed is not None:
            paths = [self._marker(file.shard, number) for file in sealed.files]
        else:
            listed = self.store.files(f"{self._folder(number)}/commits")
            paths = [path for path in listed if path.endswith(".json")]
        if not number and len(paths) >= GATHERED:
            wanted, known = set(paths), set[str]()
            for path, data in self._gathered_markers():
                commit = self._parse_commit(data, path, trees=trees)
                marker = self._marker(commit.shard)
                # What a listing lacks is committed all the same, unlike what a manifest lacks.
                if marker not in known and (sealed is None or marker in wanted):
                    known.add(marker)
                    yield commit
            paths = [path for path in paths if path not in known]
        for start in range(0, len(paths), _MARKERS_AT_ONCE):
            try:
                some = self.store.read_many(paths[start : start + _MARKERS_AT_ONCE])
            except FileNotFoundError as error:
                raise StoreError(
                    f"a commit marker of round {self.round} of {self.store.root} is missing: "
                    f"{error}"
                ) from error
            for path, data in some.items():
                commit = self._parse_commit(data, path, trees=trees)
                if gather:
                    self._loose[commit.shard] = data
                    self._gather()
                yield commit

    def _gathered_markers(self) -> Iterator[tuple[str, bytes]]:
        """Markers, each with the file that has it; some may come twice."""
        paths = self.store.files(f"{self.prefix}/gathered")
        step = _MARKERS_AT_ONCE // GATHERED
        for start in range(0, len(paths), step):
            for path, data in self.store.read_many(paths[start : start + step]).items():
                for marker in _parse(_unzipped, data, path).splitlines():
                    yield path, marker

    def _wanted(self, shard_ids: Set[str] | None, generation: int) -> Iterator[Commit]:
        """The markers of these shards (None: all that are listed), each once; those that a listing
        lacks by name, again and again for `LISTING_S`."""
        left = set(shard_ids or ())
        for commit in self.each_commit(generation=generation):
            if shard_ids is None or commit.shard in left:
                left.discard(commit.shard)
                yield commit
        give_up_s = time.monotonic() + LISTING_S
        while left:
            for shard_id in sorted(left):
                try:
                    yield self.read_commit(shard_id, generation=generation)
                except FileNotFoundError:
                    continue
                left.discard(shard_id)
            if not left or time.monotonic() > give_up_s:
                return
            time.sleep(min(LOOK_UP_PAUSE_S, LISTING_S))

    def _parse_commit(self, data: bytes, path: str, *, trees: bool = True) -> Commit:
        return self._inside(_parse(partial(Commit.from_json, trees=trees), data, path), path)

    def _inside(self, file: F, source: str) -> F:
        """A record of a data file, if the file is one of this round.

        Raises:
            StoreError: whoever wrote the record has named a file elsewhere.
        """
        path = file.path
        if not path.startswith(f"{self.prefix}/") or posixpath.normpath(path) != path:
            raise StoreError(
                f"file {source} of {self.store.root} names {path!r}, which is no data file of "
                f"round {self.round}"
            )
        return file

    def solved(self, generation: int | None = None) -> set[str]:
        """Problems that some committed tree solves, read from the markers alone.

        Args:
            generation: as of `commits`.
        """
        commits = self.each_commit(generation=generation)
        return {key.problem_id for commit in commits for key in commit.trees if key.solved}

    def manifest(self, generation: int | None = None) -> Manifest | None:
        """The manifest; None if the round, or this generation of it, is not sealed.

        Args:
            generation: as in `commits`.
        """
        path = self._manifest_path(self.generation() if generation is None else generation)
        try:
            data = self.store.read(path)
        except FileNotFoundError:
            return None
        manifest = _parse(Manifest.from_json, data, path)
        for file in manifest.files:
            self._inside(file, path)
        return manifest

    def trees(self) -> Iterator[Tree]:
        """All trees of a sealed round, one file in memory at a time.

        Raises:
            StoreError: the round is not sealed, or a file is missing, truncated or changed.
        """
        for file, table in self._files_and_tables(None):
            try:
                trees = table_to_trees(table)
            except ValueError as error:
                raise StoreError(f"data file {file.path} cannot be read: {error}") from error
            yield from trees

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The tables of a sealed round's files, in the manifest's order.

        Args:
            columns: read only these; None: all.
        Raises:
            StoreError: as `trees`.
        """
        return (table for _, table in self._files_and_tables(columns))

    def _files_and_tables(
        self, columns: Sequence[str] | None
    ) -> Iterator[tuple[ManifestFile, pa.Table]]:
        manifest = self.manifest()
        if manifest is None:
            raise StoreError(
                f"round {self.round} of {self.store.root} has no manifest: it is not finished"
            )
        for file in manifest.files:
            yield file, self.read_table(file, columns)

    def read_table(
        self, file: Commit | ManifestFile, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """One data file, checked against its marker.

        Raises:
            StoreError: it is missing, truncated or changed; the message names it.
        """
        try:
            data = self.store.read(file.path)
        except FileNotFoundError as error:
            raise StoreError(f"data file {file.path} of {self.store.root} is missing") from error
        if len(data) != file.num_bytes:
            raise StoreError(
                f"data file {file.path} of {self.store.root} has {len(data)} bytes, "
                f"{file.num_bytes} were written"
            )
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise StoreError(
                f"data file {file.path} of {self.store.root} has changed since it was written "
                "(its SHA-256 differs)"
            )
        return pq.read_table(io.BytesIO(data), columns=None if columns is None else list(columns))

    # -- what is derived from data files

    def read_derived(self, file: Commit | ManifestFile, kind: str) -> bytes | None:
        """What was made of a data file; None if nobody did."""
        try:
            return self.store.read(_derived(file.path, kind))
        except FileNotFoundError:
            return None

    def put_derived(self, file: Commit | ManifestFile, kind: str, data: bytes) -> None:
        """Keep what was made of a data file."""
        self.store.put(_derived(file.path, kind), data)

    # -- what killed workers left

    def remove_orphans(self, *, older_than_s: float, now_unix_s: float) -> list[str]:
        """Delete files of a sealed round that no marker names; returns their paths.

        Once a round is sealed each of its shards has its marker, so nobody can commit such a file
        any more. A young one is left alone all the same: a writer that is still at it deletes it
        itself when it finds the marker, and clocks differ.

        Args:
            older_than_s: seconds since a file was written, as the lease time.
            now_unix_s: seconds since 1970.
        Returns:
            Nothing if the round is not sealed.
        Raises:
            StoreError: the store failed, or a marker cannot be read.
        """
        if self.manifest() is None:
            return []
        # Listed before the markers are read: what is committed in between is then not among them.
        left = self.store.files(f"{self.prefix}/data")
        for folder in ("data", "commits", "plans"):
            left += self.store.unfinished(f"{self.prefix}/{folder}")
        left += self.store.unfinished(self.prefix)
        kinds = self.store.folders(f"{self.prefix}/derived")
        for kind in kinds:
            left += self.store.files(f"{self.prefix}/derived/{kind}")
            left += self.store.unfinished(f"{self.prefix}/derived/{kind}")
        named = set()
        for commit in self.each_commit(trees=False, generation=0):
            named |= {commit.path, *(_derived(commit.path, kind) for kind in kinds)}
        removed = []
        for path in left:
            if path in named:
                continue
            try:
                age_s = now_unix_s - self.store.modified_unix_s(path)
            except FileNotFoundError:  # its writer has just removed it
                continue
            if age_s > older_than_s:
                self.store.delete(path)
                removed.append(path)
        return removed

    # -- plans

    def create_plan(self, stage: str, data: bytes) -> bytes:
        """Fix what a stage is to search; returns the stored plan, which may be an earlier one."""
        path = f"{self.prefix}/plans/{stage}.json"
        self.store.create(path, data)
        return self.store.read(path)

    def plans(self) -> dict[str, bytes]:
        """All stored plans of the round by stage."""
        paths = [p for p in self.store.files(f"{self.prefix}/plans") if p.endswith(".json")]
        found = self.store.read_many(paths)
        return {p.rsplit("/", 1)[-1].removesuffix(".json"): found[p] for p in paths}

    def _folder(self, generation: int) -> str:
        return f"{self.prefix}/regrades/{generation:04d}" if generation else self.prefix

    def _regrades(self) -> list[int]:
        """Numbers of all regrades, sealed or not, ascending."""
        names = self.store.folders(f"{self.prefix}/regrades")
        return sorted(int(name) for name in names if name.isdigit())

    def _manifest_path(self, generation: int) -> str:
        return f"{self._folder(generation)}/manifest.json"

    def _data(self, shard_id: str, attempt: str, generation: int) -> str:
        return f"{self._folder(generation)}/data/{shard_id}-{attempt}.parquet"

    def _marker(self, shard_id: str, generation: int = 0) -> str:
        return f"{self._folder(generation)}/commits/{shard_id}.json"

    def _check_disjoint(self, shards: Container[str]) -> None:
        """Raises StoreError if two of these shards hold the same tree; names them."""
        owner: dict[tuple[str, int], str] = {}
        for commit in self.each_commit(generation=0):
            for tree in commit.trees if commit.shard in shards else ():
                other = owner.setdefault((tree.problem_id, tree.index), commit.shard)
                if other != commit.shard:
                    raise StoreError(
                        f"round {self.round} cannot be sealed: tree {tree.index} of problem "
                        f"{tree.problem_id} is in shards {other} and {commit.shard}"
                    )


def _new_attempt() -> str:
    return uuid.uuid4().hex[:16]


def _listed(commits: Iterable[Commit]) -> tuple[list[ManifestFile], Totals]:
    """What a manifest says of commits; none of them is kept."""
    files = []

    def totals() -> Iterator[Totals]:
        for commit in commits:
            files.append(
                ManifestFile(
                    shard=commit.shard,
                    path=commit.path,
                    num_rows=commit.num_rows,
                    num_bytes=commit.num_bytes,
                    sha256=commit.sha256,
                    num_trees=len(commit.trees),
                )
            )
            yield commit.totals

    total = Totals.sum(totals())
    return files, total


def _derived(path: str, kind: str) -> str:
    """Where what was made of a data file is."""
    folder, name = path.rsplit("/data/", 1)
    return f"{folder}/derived/{kind}/{name.removesuffix('.parquet')}"


def _short_name(tree: TreeKey) -> int:
    """A tree in eight bytes; of a million trees two have the same once in many million rounds."""
    name = f"{tree.index} {tree.problem_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


def evaluation_of(round: int) -> int:
    """The number of the round that keeps the trees of a round's evaluation; its own inverse.

    It is planned, leased, committed and sealed as any round is. It is below zero, and kept beside
    the others, so that nothing that reads the rounds of a run takes it for one.
    """
    return -1 - round


_RULERS = -(1 << 20)


def ruler_of(round: int) -> int:
    """Likewise of the trees that a round's PPM is measured on; below those of all evaluations."""
    return _RULERS - round


def folder_of(round: int) -> str:
    """Where a round is kept, under the store's root."""
    if round <= _RULERS:
        return f"rulers/round={ruler_of(round)}"
    if round < 0:
        return f"evaluations/round={evaluation_of(round)}"
    return f"trajectories/round={round}"


def stored_rounds(store: RunStore, *, evaluations: bool = False) -> list[int]:
    """Rounds that have anything stored, ascending.

    Args:
        evaluations: those of evaluations and rulers too, see `evaluation_of` and `ruler_of`.
    """

    def numbers(folder: str) -> list[int]:
        names = store.folders(folder)
        return [int(n.removeprefix("round=")) for n in names if n.startswith("round=")]

    found = numbers("trajectories")
    if evaluations:
        found += map(evaluation_of, numbers("evaluations"))
        found += map(ruler_of, numbers("rulers"))
    return sorted(found)


def _unzipped(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(str(error)) from error


def _parse(parse: Callable[[bytes], T], data: bytes, path: str) -> T:
    try:
        return parse(data)
    except ValueError as error:
        raise StoreError(f"file {path} cannot be read: {error}") from error
