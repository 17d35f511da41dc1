"""Trees in, training files out: which trajectories and pairs a round trains on.

    trees (any rounds) --> per problem: correct trajectories, one per program, best mean Q first
                       |     --> `trajectories_per_problem` of them  --> sft_{train,validation}
                       +-> preference pairs of each tree             --> pairs_{train,validation}
    demonstrations     --> repeated                                  --> sft_train

The split is by problem: a hash of the problem id says "validation", the same in every round. A
validation problem is neither in the policy's nor in the PPM's training data, so a PPM whose trunk
is that policy is judged on problems its weights never met. (A trunk that was fine-tuned on the
accepted solutions of the same problems ranks their steps by memory.)

A dataset is a directory of four Parquet files and `manifest.json`, each written whole and the
manifest last: where it is, the dataset is complete. It says how many were taken and, for whatever
was not, why. Texts are stored rendered: what search prompts with is what training reads.

Not covered: datasets larger than memory. Trees are streamed one by one, but the selected
trajectories and pairs are held until they are written.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from learner.pairs import PairConfig, PairKind, PreferencePair, program_key, tree_pairs
from rollout.problem import Problem
from rollout.prompt import PromptTemplate, Segment, Step, parse_response, render_segments
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Tree

MANIFEST = "manifest.json"

_SFT_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("level", pa.string()),
        ("origin", pa.string()),
        ("round", pa.int32()),
        ("mean_q", pa.float64()),
        ("segments", pa.list_(pa.struct([("text", pa.string()), ("trained", pa.bool_())]))),
    ]
)
_PAIR_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("level", pa.string()),
        ("round", pa.int32()),
        ("tree_index", pa.int32()),
        ("node", pa.int32()),
        ("kind", pa.string()),
        ("prefix", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_q", pa.float64()),
        ("rejected_q", pa.float64()),
        ("weight", pa.float64()),
    ]
)


class DatasetError(RuntimeError):
    """Training data is missing, incomplete or not in the expected form."""


class DatasetConfig(BaseModel):
    """How trees become training data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trajectories_per_problem: int = Field(
        2, ge=1, description="Correct trajectories kept per problem, highest mean Q first."
    )
    validation_share: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the problems no model is trained on."
    )
    split_seed: int = Field(0, description="Which problems those are; keep it for a whole run.")
    synthetic_sources: tuple[str, ...] = Field(
        (), description="Problem sources whose reference answers may be wrong."
    )
    min_synthetic_accuracy: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Problems of synthetic sources answered right less often than this are left "
        "out as mislabelled.",
    )
    demonstration_repeat: int = Field(
        1, ge=0, description="How often each demonstration enters the policy's data."
    )
    pairs: PairConfig = Field(default_factory=PairConfig, description="Preference pairs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """One trajectory to imitate."""

    problem_id: str
    level: str
    origin: str
    """"tree", "demonstration" or "file"."""
    round: int
    """Round that found it; -1 where no round did."""
    mean_q: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A worked solution from outside the searches."""

    id: str
    level: str
    problem: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What one round trains on, before it is written."""

    template: str | None
    """Name of the prompt template all texts were rendered with; None: of none of ours."""
    sft_train: list[SFTExample]
    sft_validation: list[SFTExample]
    pairs_train: list[PreferencePair]
    pairs_validation: list[PreferencePair]
    counts: dict[str, dict[str, int]]
    """Level (and "all") -> name -> count. Names: problems, solved, trees, trajectories_correct,
    trajectories_kept, sft_train, sft_validation, demonstrations, pairs_train, pairs_validation."""
    excluded: dict[str, dict[str, int]]
    """Level (and "all") -> reason -> count. Of problems: unsolved, low_accuracy. Of correct
    trajectories: same_program, beyond_top. Of pairs: duplicate_pair, contradicted_pair."""


@dataclass(slots=True, kw_only=True)
class _ProblemRecord:
    """What all trees of one problem said so far."""

    problem: Problem
    answered: int = 0
    correct: int = 0
    programs: dict[str, Trajectory] = field(default_factory=dict)
    """Program -> its best correct trajectory."""


def is_validation(problem_id: str, config: DatasetConfig) -> bool:
    """True if a problem is held out from all training; depends on the id and `split_seed` only."""
    digest = hashlib.sha256(f"{config.split_seed}:{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < config.validation_share


def build_dataset(
    trees: Iterable[Tree],
    *,
    template: PromptTemplate,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    pair_rounds: Container[int] | None = None,
) -> Dataset:
    """Select what to train on.

    Args:
        trees: finished trees of one or several rounds, each once, in any order; the result does
            not depend on the order.
        pair_rounds: rounds whose trees give preference pairs; None: all of them.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    excluded: defaultdict[str, Counter[str]] = defaultdict(Counter)
    records: dict[str, _ProblemRecord] = {}
    pairs: list[PreferencePair] = []
    for tree in trees:
        level = tree.problem.level.value
        counts[level]["trees"] += 1
        record = records.setdefault(tree.problem.id, _ProblemRecord(problem=tree.problem))
        _note_trajectories(record, tree, counts[level], excluded[level])
        if pair_rounds is None or tree.round in pair_rounds:
            pairs += tree_pairs(tree, template=template, config=config.pairs)

    sft_train: list[SFTExample] = []
    sft_validation: list[SFTExample] = []
    mislabelled: set[str] = set()
    for problem_id, record in sorted(records.items()):
        level = record.problem.level.value
        counts[level]["problems"] += 1
        if not record.programs:
            excluded[level]["unsolved"] += 1
            continue
        counts[level]["solved"] += 1
        if _mislabelled(record, config):
            excluded[level]["low_accuracy"] += 1
            mislabelled.add(problem_id)
            continue
        kept = _best(record, config)
        counts[level]["trajectories_kept"] += len(kept)
        excluded[level]["beyond_top"] += len(record.programs) - len(kept)
        validation = is_validation(problem_id, config)
        target = sft_validation if validation else sft_train
        target += [_example(trajectory, template) for trajectory in kept]
        counts[level]["sft_validation" if validation else "sft_train"] += len(kept)

    for demonstration in demonstrations:
        counts[demonstration.level]["demonstrations"] += 1
        counts[demonstration.level]["sft_train"] += config.demonstration_repeat
        segments = render_segments(demonstration.problem, demonstration.steps, template)
        example = SFTExample(
            problem_id=demonstration.id,
            level=demonstration.level,
            origin="demonstration",
            round=-1,
            mean_q=1.0,
            segments=tuple(segments),
        )
        sft_train += [example] * config.demonstration_repeat

    pairs_train: list[PreferencePair] = []
    pairs_validation: list[PreferencePair] = []
    for pair in _consistent(pairs, excluded):
        if pair.problem_id in mislabelled:
            excluded[pair.level]["low_accuracy_pair"] += 1
        elif is_validation(pair.problem_id, config):
            pairs_validation.append(pair)
            counts[pair.level]["pairs_validation"] += 1
        else:
            pairs_train.append(pair)
            counts[pair.level]["pairs_train"] += 1
    return Dataset(
        template=template.name,
        sft_train=sft_train,
        sft_validation=sft_validation,
        pairs_train=pairs_train,
        pairs_validation=pairs_validation,
        counts=_with_total(counts),
        excluded=_with_total(excluded),
    )


def chosen_trajectories(trees: Iterable[Tree], config: DatasetConfig) -> list[Trajectory]:
    """The trajectories of one problem that `build_dataset` keeps, given all its trees; best first.

    Empty where no answer is correct, or the problem is left out as mislabelled.
    """
    record: _ProblemRecord | None = None
    for tree in trees:
        record = record or _ProblemRecord(problem=tree.problem)
        _note_trajectories(record, tree, Counter(), Counter())
    return [] if record is None or _mislabelled(record, config) else _best(record, config)


def _mislabelled(record: _ProblemRecord, config: DatasetConfig) -> bool:
    """True if a made problem is answered right so rarely that its reference must be wrong."""
    return (
        record.problem.source in config.synthetic_sources
        and record.correct < config.min_synthetic_accuracy * record.answered
    )


def _best(record: _ProblemRecord, config: DatasetConfig) -> list[Trajectory]:
    """The correct trajectories to keep, best first."""
    ranked = sorted(record.programs.values(), key=_rank)
    return ranked[: config.trajectories_per_problem]


def _note_trajectories(
    record: _ProblemRecord, tree: Tree, counts: Counter[str], excluded: Counter[str]
) -> None:
    """Add a tree's answers to what is known of its problem."""
    for trajectory in trajectories(tree):
        if trajectory.correct is None:
            continue
        record.answered += 1
        if not trajectory.correct:
            continue
        record.correct += 1
        counts["trajectories_correct"] += 1
        key = program_key(trajectory.steps)
        known = record.programs.get(key)
        if known is None:
            record.programs[key] = trajectory
            continue
        excluded["same_program"] += 1
        record.programs[key] = min(known, trajectory, key=_rank)


def _rank(trajectory: Trajectory) -> tuple[float, float, int, int, int]:
    """Best first: mean Q, then min Q, then the later round; the rest makes the order total."""
    return (
        -trajectory.mean_q,
        -trajectory.min_q,
        -trajectory.round,
        trajectory.tree_index,
        trajectory.node,
    )


def _example(trajectory: Trajectory, template: PromptTemplate) -> SFTExample:
    return SFTExample(
        problem_id=trajectory.problem.id,
        level=trajectory.problem.level.value,
        origin="tree",
        round=trajectory.round,
        mean_q=trajectory.mean_q,
        segments=tuple(render_segments(trajectory.problem.text, trajectory.steps, template)),
    )


def _consistent(
    pairs: Sequence[PreferencePair], excluded: Mapping[str, Counter[str]]
) -> list[PreferencePair]:
    """Pairs in a fixed order, without repetitions and without those another tree turned round."""
    ordered = sorted(
        pairs, key=lambda p: (p.problem_id, p.round, p.tree_index, p.kind, p.node, -p.margin)
    )
    known = {(p.problem_id, p.prefix, p.chosen, p.rejected) for p in ordered}
    kept, seen = [], set()
    for pair in ordered:
        key = (pair.problem_id, pair.prefix, pair.chosen, pair.rejected)
        if (pair.problem_id, pair.prefix, pair.rejected, pair.chosen) in known:
            excluded[pair.level]["contradicted_pair"] += 1
        elif key in seen:
            excluded[pair.level]["duplicate_pair"] += 1
        else:
            seen.add(key)
            kept.append(pair)
    return kept


def _with_total(counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    total: Counter[str] = Counter()
    for level in counts.values():
        total.update(level)
    return {
        **{level: dict(sorted(counts[level].items())) for level in sorted(counts)},
        "all": dict(sorted(total.items())),
    }


def write_dataset(
    dataset: Dataset, directory: str | Path, *, info: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a dataset directory, each file whole and the manifest last; returns the manifest.

    The manifest holds `template`, `counts`, `excluded`, `files` (name -> rows, sha256), `digest`
    over all files and `info`. An existing dataset in the directory is replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    tables = {
        "sft_train": _sft_table(dataset.sft_train),
        "sft_validation": _sft_table(dataset.sft_validation),
        "pairs_train": _pair_table(dataset.pairs_train),
        "pairs_validation": _pair_table(dataset.pairs_validation),
    }
    files = {}
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        _replace(directory / f"{name}.parquet", data)
        files[name] = {"rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256("".join(f["sha256"] for f in files.values()).encode()).hexdigest()
    manifest = {
        "template": dataset.template,
        "counts": dataset.counts,
        "excluded": dataset.excluded,
        "files": files,
        "digest": digest,
        "info": dict(info or {}),
    }
    _replace(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset directory; None if there is none."""
    try:
        return json.loads((Path(directory) / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def read_sft(directory: str | Path, split: str) -> list[SFTExample]:
    """The SFT examples of a split ("train" or "validation").

    Raises:
        DatasetError: the directory holds no complete dataset.
    """
    return [
        SFTExample(**row | {"segments": tuple(Segment(**s) for s in row["segments"])})
        for row in _read(directory, f"sft_{split}", _SFT_SCHEMA).to_pylist()
    ]


def read_pairs(directory: str | Path, split: str) -> list[PreferencePair]:
    """The preference pairs of a split ("train" or "validation").

    Raises:
        DatasetError: the directory holds no complete dataset.
    """
    return [
        PreferencePair(**row | {"kind": PairKind(row["kind"])})
        for row in _read(directory, f"pairs_{split}", _PAIR_SCHEMA).to_pylist()
    ]


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """Worked solutions from a Parquet or JSONL file.

    Columns: id, problem, solution (in the trajectory grammar of `rollout.prompt`), and level if
    there is one.

    Raises:
        DatasetError: the file or a column is missing, or a solution cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise DatasetError(f"no demonstration file {path}") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read demonstrations from {path}: {error}") from error
    demonstrations = []
    for number, row in enumerate(rows, start=1):
        missing = [name for name in ("id", "problem", "solution") if not row.get(name)]
        if missing:
            raise DatasetError(f"{path}, row {number}: no {', '.join(missing)}")
        try:
            steps = parse_response(row["solution"])
        except ValueError as error:
            raise DatasetError(f"{path}, row {number} (id {row['id']!r}): {error}") from error
        demonstrations.append(
            Demonstration(
                id=str(row["id"]),
                level=str(row.get("level") or "unknown"),
                problem=row["problem"],
                steps=tuple(steps),
            )
        )
    if not demonstrations:
        raise DatasetError(f"{path} holds no demonstration")
    return demonstrations


def _sft_table(examples: Sequence[SFTExample]) -> pa.Table:
    return pa.Table.from_pylist([asdict(e) for e in examples], schema=_SFT_SCHEMA)


def _pair_table(pairs: Sequence[PreferencePair]) -> pa.Table:
    return pa.Table.from_pylist([asdict(p) for p in pairs], schema=_PAIR_SCHEMA)


def _read(directory: str | Path, name: str, schema: pa.Schema) -> pa.Table:
    directory = Path(directory)
    if read_manifest(directory) is None:
        raise DatasetError(f"no complete training data in {directory} ({MANIFEST} is missing)")
    try:
        return pq.read_table(directory / f"{name}.parquet", schema=schema)
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read {name} from {directory}: {error}") from error


def _replace(path: Path, data: bytes) -> None:
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    hidden.write_bytes(data)
    hidden.replace(path)
