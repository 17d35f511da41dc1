"""`rstar regrade RUN`: the verdicts of this program's grader on everything a run has stored.

    RUN/trajectories/round=R/                the rows as they were searched; never touched
                            /regrades/0001/  the same rows with new verdicts, sealed or ignored
    RUN/regrades/round=R-0001.jsonl          each answer judged otherwise
    RUN/regrades/round=R-0001.json           how many, by level

Each shard is graded, written and claimed on its own, by creating one key; the manifest, written
last, makes the generation the one that readers take (the learner, `rstar report`, `rstar tree`,
the next rounds). So a stop or a kill loses one shard's work, the same command goes on, and once a
round has this grader's verdicts there is nothing to do. What is recomputed, and what is not, says
`rollout.regrade`.

Afterwards the records that count solved problems are brought up to date: the stage record of the
rollout, the lineage, `report.json`. Datasets and checkpoints stay: they say what was trained. The
command names those that were made from other verdicts.

Not covered: held-out verdicts of `rstar evolve`, which stores no answers to grade again; rounds
that are not finished; several machines at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.evaluation.shares import COLUMNS, problems_by_level, shares_by_level
from cluster.folder.lineage import lineage_name
from cluster.folder.run_folder import REPORT, RunFolder, RunFolderError
from cluster.telemetry.progress import say
from rollout.regrade import VerdictChange, compare_verdicts, regrade_table, regraded_commit
from rollout.store import RunStore, TrajectoryStore, stored_rounds
from verifier import GRADER_VERSION, Verdict, verify_answer
from verifier.verify import start_symbolic_worker

Grade = Callable[[str, str], Verdict]
OnShard = Callable[[int, int], None]

EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRegrade:
    """What a round's newest verdicts changed against those before."""

    round: int
    generation: int
    """0: the round had this grader's verdicts from the start."""
    written: bool
    """False: it was there already."""
    grader: str
    from_graders: tuple[str, ...] = ()
    answers: int = 0
    changes: tuple[VerdictChange, ...] = ()
    solved_before: int = 0
    """Problems."""
    solved: int = 0

    @property
    def turned(self) -> list[VerdictChange]:
        """Right before and wrong now, or the other way round."""
        return [change for change in self.changes if change.turned]

    def by_level(self) -> dict[str, dict[str, int]]:
        """Level (and "all") -> counts of changes."""
        names = ("to_right", "to_wrong", "reason_only")
        counts = {column: dict.fromkeys(names, 0) for column in COLUMNS}
        for change in self.changes:
            name = "reason_only"
            if change.turned:
                name = "to_right" if change.to_correct else "to_wrong"
            for column in (change.level, "all"):
                counts[column][name] += 1
        return counts


def regrade_run(
    run: str | Path,
    *,
    grade: Grade = verify_answer,
    grader: str = GRADER_VERSION,
    on_shard: Callable[[int], OnShard] = lambda round: lambda done, total: None,
) -> list[RoundRegrade]:
    """Bring every finished round of a run up to a grader's verdicts.

    Args:
        on_shard: round -> what is told (done, total) shards of it.
    Raises:
        RunFolderError: no finished round, or the run is in use.
        StoreError: a file is missing or changed.
    """
    folder = RunFolder(run)
    store = folder.store
    if not store.exists(""):
        raise RunFolderError(f"{store.root}: no such run folder")
    rounds = [
        trees
        for number in stored_rounds(store)
        if (trees := TrajectoryStore(store, number)).manifest() is not None
    ]
    if not rounds:
        raise RunFolderError(f"{store.root}: no finished round to grade again")
    with folder.locked():
        start_symbolic_worker()
        found = [
            _regrade_round(folder, trees, grade, grader, on_shard(trees.round)) for trees in rounds
        ]
        _refresh_report(folder, rounds, found)
    return found


def _regrade_round(
    folder: RunFolder, trees: TrajectoryStore, grade: Grade, grader: str, on_shard: OnShard
) -> RoundRegrade:
    written = not _graded_by(trees, grader)
    if written:
        generation = trees.begin_regrade(grader)
        done = trees.commits(generation=generation)
        manifest = trees.manifest()
        assert manifest is not None
        before = trees.commits()
        for number, file in enumerate(manifest.files, start=1):
            if file.shard not in done:
                table = regrade_table(trees.read_table(file), grade=grade, grader=grader)
                commit = regraded_commit(before[file.shard], table, grader=grader)
                trees.commit_regrade(generation, commit, table)
            on_shard(number, len(manifest.files))
        trees.seal_regrade(generation)
    generation = trees.generation()
    known = folder.read(_record_name(trees.round, generation)) if generation else None
    if known is not None:
        return _from_record(folder, known, written=written)
    if not generation:
        return RoundRegrade(round=trees.round, generation=0, written=False, grader=grader)
    result = _compare(trees, generation, grader, written=written)
    _refresh_records(folder, trees, result)
    _write_record(folder, result)
    return result


def _graded_by(trees: TrajectoryStore, grader: str) -> bool:
    """Whether all newest verdicts of a round are of a grader, by markers or else by rows."""
    manifest = trees.manifest()
    assert manifest is not None
    commits = trees.commits(trees=False)
    for file in manifest.files:
        said = commits[file.shard].info.get("grader")
        if said is None:
            table = trees.read_table(file, ["grader_version"])
            if set(table["grader_version"].to_pylist()) - {grader}:
                return False
        elif said != grader:
            return False
    return True


def _compare(
    trees: TrajectoryStore, generation: int, grader: str, *, written: bool
) -> RoundRegrade:
    """What a sealed generation changed, read from the rows themselves."""
    new = trees.manifest(generation)
    assert new is not None
    number = json.loads(trees.store.read(f"{trees.prefix}/regrades/{generation:04d}/plan.json"))
    earlier: int = number["from_generation"]
    old = trees.manifest(earlier)
    assert old is not None
    answers = 0
    changes: list[VerdictChange] = []
    graders: set[str] = set()
    for old_file, new_file in zip(old.files, new.files, strict=True):
        before, after = trees.read_table(old_file), trees.read_table(new_file)
        count, found = compare_verdicts(before, after)
        graders |= set(before["grader_version"].to_pylist())
        answers += count
        changes += found
    return RoundRegrade(
        round=trees.round,
        generation=generation,
        written=written,
        grader=grader,
        from_graders=tuple(sorted(graders)),
        answers=answers,
        changes=tuple(changes),
        solved_before=len(trees.solved(earlier)),
        solved=len(trees.solved(generation)),
    )


# -------------------------------------------------------------------- records


def _record_name(round: int, generation: int) -> str:
    return f"regrades/round={round}-{generation:04d}.json"


def _write_record(folder: RunFolder, result: RoundRegrade) -> None:
    """The list of changes and, last, their summary, which says that all is done."""
    name = _record_name(result.round, result.generation)
    folder.write_lines(name.replace(".json", ".jsonl"), map(asdict, result.changes))
    record = asdict(result) | {"changes": result.by_level(), "round": result.round}
    del record["written"]
    folder.write(name, record)


def _from_record(folder: RunFolder, record: dict[str, Any], *, written: bool) -> RoundRegrade:
    name = _record_name(record["round"], record["generation"])
    lines = folder.read_lines(name.replace(".json", ".jsonl"))
    changes = tuple(VerdictChange(**line) for line in lines)
    return RoundRegrade(
        **record
        | {"changes": changes, "from_graders": tuple(record["from_graders"]), "written": written}
    )


def _refresh_records(folder: RunFolder, trees: TrajectoryStore, result: RoundRegrade) -> None:
    """Bring what the rollout's stage and the lineage say of the round up to date."""
    stage = folder.stage(trees.round, "rollout")
    manifest = trees.manifest()
    assert manifest is not None
    if stage:
        levels = problems_by_level(trees.commits(), folder.problem_levels())
        facts = {k: v for k, v in stage.items() if k != "seconds"}
        facts |= {"solved": result.solved, "totals": asdict(manifest.totals), **levels}
        folder.record_stage(trees.round, "rollout", stage["seconds"], **facts)
    lineage = folder.read(lineage_name(trees.round))
    if lineage is not None:
        lineage["regraded"] = {
            "generation": result.generation,
            "grader": result.grader,
            "manifest": f"{trees.prefix}/regrades/{result.generation:04d}/manifest.json",
            "verdicts_turned": len(result.turned),
        }
        folder.write(lineage_name(trees.round), lineage)


def _refresh_report(
    folder: RunFolder, rounds: Sequence[TrajectoryStore], found: Iterable[RoundRegrade]
) -> None:
    """Coverage in `report.json` by the newest verdicts; nothing where there is no report."""
    report = folder.read(REPORT)
    if report is None or not any(result.generation for result in found):
        return
    levels = folder.problem_levels()
    so_far: set[str] = set()
    by_round = {trees.round: trees for trees in rounds}
    for entry in report.get("rounds", ()):
        trees = by_round.get(entry.get("round"))
        if trees is None or not levels:
            continue
        solved = trees.solved()
        so_far |= solved
        for name, ids in (("coverage", solved), ("coverage_so_far", so_far)):
            if name in entry:
                entry[name] = shares_by_level((level, i in ids) for i, level in levels.items())
        if "correct_trajectories" in entry:
            entry["correct_trajectories"] = _correct_trajectories(trees)
    folder.write(REPORT, report)


def _correct_trajectories(trees: TrajectoryStore) -> int:
    columns = ["terminal", "correct", "visit_count"]
    return sum(
        row["terminal"] == "answer" and bool(row["correct"]) and row["visit_count"] > 0
        for table in trees.tables(columns)
        for row in table.to_pylist()
    )


def stale_datasets(run: str | Path) -> list[int]:
    """Rounds of a run whose dataset was selected by other verdicts than the newest."""
    folder = RunFolder(run)
    newest = verdicts_of(folder.store, stored_rounds(folder.store))
    stale = []
    for number in folder.rounds("datasets"):
        manifest = folder.dataset_manifest(number)
        if manifest is not None and not dataset_is_current(manifest, newest):
            stale.append(number)
    return stale


def verdicts_of(store: RunStore, rounds: Iterable[int]) -> dict[str, int]:
    """Round -> number of its newest generation of verdicts, as a dataset's manifest keeps it."""
    return {str(number): TrajectoryStore(store, number).generation() for number in rounds}


def dataset_is_current(manifest: Mapping[str, Any], newest: Mapping[str, int]) -> bool:
    """Whether a dataset was selected by the newest verdicts.

    Args:
        manifest: of the dataset.
        newest: as `verdicts_of`.
    """
    info = manifest["info"]
    used = info.get("verdicts", {})
    rounds = map(str, info.get("rounds", ()))
    return all(used.get(number, 0) == newest.get(number, 0) for number in rounds)


# -------------------------------------------------------------------- the command


def run_regrade(run: str | Path, console: Console) -> list[RoundRegrade]:
    """Regrade a run with a progress bar, and print what changed."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    def on_shard(number: int) -> OnShard:
        task = bar.add_task(f"round {number}, shards", total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    with bar:
        found = regrade_run(run, on_shard=on_shard)
    print_regrade(run, found, console)
    return found


def print_regrade(run: str | Path, found: Sequence[RoundRegrade], console: Console) -> None:
    """What changed, by round and level, with a few examples."""
    for result in found:
        if not result.generation:
            say(console, f"round {result.round}: graded by {result.grader} already")
        elif not result.written:
            say(
                console,
                f"round {result.round}: regraded by {result.grader} already, nothing to do",
            )
    graded = [result for result in found if result.generation]
    if not graded:
        return
    table = Table(box=box.SIMPLE, title="verdicts that changed", padding=(0, 0, 0, 1))
    table.add_column("round")
    for name in ("answers", *COLUMNS, "problems solved"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in graded:
        levels = result.by_level()
        table.add_row(
            str(result.round),
            f"{result.answers:,}",
            *(f"+{levels[c]['to_right']} -{levels[c]['to_wrong']}" for c in COLUMNS),
            f"{result.solved_before} -> {result.solved}",
        )
    table.caption = "+ wrong before and right now, - right before and wrong now"
    console.print(table)
    graders = sorted({grader for result in graded for grader in result.from_graders})
    same = sum(result.by_level()["all"]["reason_only"] for result in graded)
    say(
        console,
        f"graded by {', '.join(graders)}, now by {graded[0].grader}; {same} more answers are "
        "judged alike for another reason",
    )
    turned = [(result.round, change) for result in graded for change in result.turned]
    for number, change in turned[:EXAMPLES]:
        before, after = (
            f"{'right' if right else 'wrong'} ({verdict})"
            for right, verdict in (
                (change.from_correct, change.from_verdict),
                (change.to_correct, change.to_verdict),
            )
        )
        say(
            console,
            f"  round {number} {change.problem_id} tree {change.tree} node {change.node}: "
            f"{change.answer!r} for {change.gold!r}: {before} -> {after}",
        )
    if len(turned) > EXAMPLES:
        say(console, f"  and {len(turned) - EXAMPLES} more")
    say(console, f"every change: {RunFolder(run).at('regrades')}/round=*.jsonl")
    stale = [f"round={number}" for number in stale_datasets(run)]
    if stale:
        say(
            console,
            f"selected by the earlier verdicts: datasets/{{{', '.join(stale)}}}; `rstar train` "
            "selects anew, `rstar evolve` keeps what it has trained on",
        )
