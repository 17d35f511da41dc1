"""Where everything of a run comes from: which code, models, grader and data made what.

    each start  --> RUN/versions.json         code commit, packages, machine, digests of the inputs
    each stage  --> RUN/lineage/round=R.json  searched_by -> trajectories -> dataset -> policy, ppm

Everything but the inputs' digests is read from what the stages committed (markers, manifests,
checkpoint records), so a lineage that was lost can be made again, and a part of a later start
never overwrites what an earlier one recorded.

Not covered: data and models outside the run folder that are changed after their digest was taken.
"""

from __future__ import annotations

import calendar
import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.folder.machine import code_version, command_line, hardware, versions
from cluster.folder.run_folder import BASE, MARKED_BASE, RunFolder, dataset_name
from cluster.folder.staging import at_hand
from learner.checkpoint import CheckpointStore, Kind, directory_digest
from rollout.run_store import absolute
from rollout.store import TrajectoryStore, folder_of
from verifier import GRADER_VERSION

VERSIONS = "versions.json"


def record_start(folder: RunFolder, inputs: Iterable[Path]) -> None:
    """Add this start of the run to `versions.json`.

    Args:
        inputs: problem and demonstration files, and model directories, that are read.
    Raises:
        RunFolderError: it cannot be written.
    """
    record = folder.read(VERSIONS) or {"starts": []}
    known = {entry["path"]: entry for start in record["starts"] for entry in start["inputs"]}
    record["starts"].append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "command": command_line(),
            "code": code_version(),
            "grader": GRADER_VERSION,
            "versions": versions(),
            "hardware": hardware(),
            "inputs": [_input(path, known) for path in inputs],
        }
    )
    folder.write(VERSIONS, record)


def first_start_s(folder: RunFolder) -> float | None:
    """When a run was started for the first time, seconds since 1970; None: it is not recorded."""
    starts = (folder.read(VERSIONS) or {"starts": []})["starts"]
    if not starts:
        return None
    return calendar.timegm(time.strptime(starts[0]["time"], "%Y-%m-%dT%H:%M:%SZ"))


def record_lineage(
    folder: RunFolder, round: int, steering: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Bring the lineage of a round up to date with what is committed, and return it.

    Parts: `steering` (ppm, steers, why: whether the PPM takes part, where the config asks for it),
    `searched_by` (policy, ppm, grader), `trajectories`, `dataset`, `policy`, `ppm`; a part is
    absent until its product is there.

    Args:
        steering: what was decided before the round's search; the first decision stands.
    Raises:
        RunFolderError, StoreError, CheckpointError: something of the run cannot be read or written.
    """
    name = lineage_name(round)
    record = folder.read(name) or {"round": round}
    before = dict(record)
    if steering is not None:
        record.setdefault("steering", dict(steering))
    trees = TrajectoryStore(folder.store, round)
    if "trajectories" not in record and round > 0 and trees.manifest() is not None:
        record |= _of_search(folder, trees)
    if "dataset" not in record:
        record |= _of_dataset(folder, round)
    for kind in ("policy", "ppm"):
        # Cheap, and another one may have been promoted since.
        record |= _of_checkpoint(folder, kind, round)
    if record != before:
        folder.write(name, record)
    return record


def lineage_name(round: int) -> str:
    """Of the record, under the run."""
    return f"lineage/round={round}.json"


def _input(path: Path, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Path, size, time and digest; the digest of an earlier start if size and time are the same."""
    place, path = absolute(path), at_hand(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    entry: dict[str, Any] = {
        "path": place,
        "is_directory": path.is_dir(),
        "bytes": sum(stat.st_size for stat in stats),
        "modified_unix_s": max((stat.st_mtime for stat in stats), default=0.0),
    }
    earlier = known.get(place, {})
    same = all(earlier.get(key) == value for key, value in entry.items())
    entry["sha256"] = earlier.get("sha256") if same else _digest(path)
    return entry


def _digest(path: Path) -> str:
    if path.is_dir():
        return directory_digest(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_search(folder: RunFolder, trees: TrajectoryStore) -> dict[str, Any]:
    said: dict[str, Counter[str]] = {"policy": Counter(), "ppm": Counter(), "grader": Counter()}
    first = ""
    for commit in trees.commits(trees=False).values():
        if not commit.totals.trees:
            continue
        first = first or commit.path
        for kind, counts in said.items():
            if commit.info.get(kind):
                counts[str(commit.info[kind])] += commit.totals.trees
    if not said["grader"] and first:
        table = folder.read_table(first, ["grader_version"])
        assert table is not None
        said["grader"].update(filter(None, set(table["grader_version"].to_pylist())))
    manifest = trees.store.read(f"{trees.prefix}/manifest.json")
    sealed = trees.manifest()
    assert sealed is not None
    return {
        "searched_by": {
            "policy": [_model(folder, version) for version in sorted(said["policy"])],
            "ppm": [_model(folder, version) for version in sorted(said["ppm"])],
            "grader": sorted(said["grader"]),
        },
        "trajectories": {
            "manifest": f"{trees.prefix}/manifest.json",
            "sha256": hashlib.sha256(manifest).hexdigest(),
            "schema_version": sealed.schema_version,
            "files": len(sealed.files),
            "trees": sealed.totals.trees,
        },
    }


def _model(folder: RunFolder, version: str) -> dict[str, Any]:
    """What a version in a commit marker stands for; path and digest are null where unknown."""
    found: dict[str, Any] = {"version": version, "path": None, "sha256": None}
    kind, _, rest = version.partition("-r")
    number, _, _ = rest.partition("-")
    if kind in ("policy", "ppm") and number.isdigit():
        checkpoint = CheckpointStore(folder.checkpoints).current(kind, int(number))  # type: ignore[arg-type]
        if checkpoint is not None and checkpoint.version == version:
            found |= {"path": _relative(folder, checkpoint.path), "sha256": checkpoint.digest}
        else:
            found |= _given(folder, version.rpartition("-")[2])
    elif version == "base":
        for name in (MARKED_BASE, BASE):
            if folder.store.exists(name):
                digest = directory_digest(at_hand(folder.place(name)))
                found |= {"path": name, "sha256": digest}
                break
        else:
            found |= _given(folder, "")
    return found


def _given(folder: RunFolder, digest: str) -> dict[str, Any]:
    """The model directory given to a start whose digest begins so; {} if there was none."""
    for start in reversed((folder.read(VERSIONS) or {"starts": []})["starts"]):
        for entry in start["inputs"]:
            if entry["is_directory"] and entry["sha256"].startswith(digest):
                return {"path": entry["path"], "sha256": entry["sha256"]}
    return {}


def _of_dataset(folder: RunFolder, round: int) -> dict[str, Any]:
    manifest = folder.dataset_manifest(round)
    if manifest is None:
        return {}
    rounds: Sequence[int] = manifest["info"].get("rounds", [])
    made_from = {f"round={number}": _manifest_digest(folder, number) for number in rounds}
    return {
        "dataset": {
            "path": dataset_name(round),
            "sha256": manifest["digest"],
            "template": manifest["template"],
            "trajectories": made_from,
        }
    }


def _manifest_digest(folder: RunFolder, round: int) -> str | None:
    manifest = folder.read_bytes(f"{folder_of(round)}/manifest.json")
    return None if manifest is None else hashlib.sha256(manifest).hexdigest()


def _of_checkpoint(folder: RunFolder, kind: Kind, round: int) -> dict[str, Any]:
    store = CheckpointStore(folder.checkpoints)
    checkpoint = store.current(kind, round)
    if checkpoint is None:
        return {}
    info = store.info(kind, round)
    return {
        kind: {
            "version": checkpoint.version,
            "path": _relative(folder, checkpoint.path),
            "sha256": checkpoint.digest,
            "started_from": _relative(folder, info["base"]) if info.get("base") else None,
            "dataset_sha256": info.get("data_digest"),
            "seed": info.get("seed"),
            "held": store.held(kind, round),
        }
    }


def _relative(folder: RunFolder, path: str | os.PathLike[str]) -> str:
    """Under the run where it is there, so that a run can be moved."""
    return absolute(path).removeprefix(f"{folder.store.root}/")
