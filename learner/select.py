"""Trees in, training files out: which trajectories and pairs a round trains on.

    trees of `sft_rounds`  --> per problem: correct trajectories, one per program, best mean Q first
                             --> `trajectories_per_problem` of them  --> sft_{train,validation}
    trees of `pair_rounds` --> preference pairs of each tree         --> pairs_{train,validation}
    demonstrations         --> repeated                              --> sft_train

Which rounds matters more than how they are ranked. Q-values of two rounds do not compare: without
a PPM every step of a path that was tried once and was right has Q = 1, with one it is (PPM + 1) / 2
(Eq. 3), so by mean Q alone what round 1 found would be trained on for ever. The paper's later
rounds are better because they train on what a better search found; therefore a problem's
trajectories are those of the newest round that solved it. Pairs are those of this round:
they show what the present policy gets wrong, judged by as many rollouts as this round has.

The split is by problem: a hash of its id says "validation", the same in every round. A variation of
another problem (a rewording) goes where that one goes. A validation problem is neither in the
policy's nor in the PPM's training data, so a PPM whose trunk is that policy is judged on problems
its weights never met. (A trunk that was fine-tuned on the accepted solutions of the same problems
ranks their steps by memory.) The pairs of training problems are ranked by memory just so, and
teach the PPM to trust it: `ppm_only_share` keeps problems out of the policy's data and takes pairs
of these alone, as in cross-fitting (Chernozhukov et al. 2018), where what a model is fitted on is
not what another one was fitted on before it.

What a tree may give is known without the others (`learner.candidates`): workers write it as they
commit, and where they did not it is made of the trees. Here it is sorted by problem, on disk, and
one problem after the other is decided, all its trees together, by counts; texts pass by as columns:

    trees or their candidates --write_runs--> sorted runs --merged--> one problem --> row groups

Memory is bounded: `memory_bytes` of texts three times over while a run is sorted, then one to two
MiB of each run (a round of 747,000 trees has about 150 runs of 128 MiB). Not covered: one problem
whose candidates do not fit into memory; demonstrations are held.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from learner.candidates import (
    MANY_VISITS,
    SCHEMA,
    TEXTS,
    TOP,
    Recipe,
    candidates,
    find,
    kept_pairs,
    row_of,
    unusable_solution,
)
from learner.dataset import (
    DatasetError,
    DatasetWriter,
    Demonstration,
    SFTExample,
    writing_dataset,
)
from learner.pairs import PairConfig, PairKind, PreferencePair
from learner.spill import merged, no_room, write_run
from rollout.difficulty import difficulty_of
from rollout.prompt import PromptTemplate, render_segments
from rollout.trajectory import Trajectory
from rollout.tree import Tree

MEMORY_BYTES = 128 << 20
"""Of what trees may give, in a run."""

_TREES = 64
"""Whose candidates are one table, where no worker wrote it."""

_KEYS = ("problem_id", "round", "tree_index")

_VISITS = (*map(str, range(1, MANY_VISITS)), f"{MANY_VISITS}+")

Rounds = Literal["all", "newest_solved", "this"]


class DatasetConfig(BaseModel):
    """How trees become training data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trajectories_per_problem: int = Field(
        2, ge=1, description="Correct trajectories kept per problem, highest mean Q first."
    )
    sft_rounds: Rounds = Field(
        "newest_solved",
        description="Rounds whose trajectories the policy is trained on. newest_solved: of each "
        "problem the newest round that solved it; this: the newest round alone; all: every round "
        "so far, though their Q-values do not compare.",
    )
    pair_rounds: Rounds = Field(
        "this",
        description="Rounds whose trees give the PPM its pairs; as sft_rounds. all: more pairs, "
        "of earlier policies too, where a round has few.",
    )
    validation_share: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the problems no model is trained on."
    )
    split_seed: int = Field(
        0, description="Which problems those are, and those of the PPM; keep it for a whole run."
    )
    ppm_only_share: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training problems that the policy is not trained on and that "
        "alone give the PPM its pairs; 0: both learn from all.",
    )
    synthetic_sources: tuple[str, ...] = Field(
        (), description="Problem sources whose reference answers may be wrong."
    )
    min_synthetic_accuracy: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Problems of synthetic sources that the policy answers right less often than "
        "this, in the newest round with an answer, are left out as mislabelled.",
    )
    demonstration_repeat: int = Field(
        1, ge=0, description="How often each demonstration enters the policy's data."
    )
    pairs: PairConfig = Field(default_factory=PairConfig, description="Preference pairs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What training takes of one problem."""

    held_out: bool
    """True: the problem judges the models and never trains them."""
    ppm_only: bool
    """True: the policy is not trained on it."""
    trajectories: list[Trajectory]
    """For the policy, best first; none where no answer is correct, the problem is left out as
    mislabelled, or is the PPM's alone."""
    pairs: list[PreferencePair]
    """For the PPM."""


@dataclass(slots=True, kw_only=True)
class Runs:
    """What trees may give, on disk, sorted by problem."""

    paths: list[Path]
    reached: Counter[int]
    """Round -> trajectories of its trees; each round has an entry."""
    correct: Counter[int]
    """Of these."""

    def __add__(self, other: Runs) -> Runs:
        return Runs(
            paths=self.paths + other.paths,
            reached=_sum(self.reached, other.reached),
            correct=_sum(self.correct, other.correct),
        )

    @classmethod
    def none(cls) -> Runs:
        return cls(paths=[], reached=Counter(), correct=Counter())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A tree in a table of candidates, but for its texts; fields as of `learner.candidates.SCHEMA`,
    and its row."""

    row: int
    problem_id: str
    original: str
    source: str
    level: str
    labelled: bool
    round: int
    tree_index: int
    reached: int
    answered: int
    correct: int
    right_share: float | None
    empty: int
    unrenderable: int
    empty_pairs: int
    unrenderable_pairs: int
    visits: list[int]
    programs: list[bytes]
    num_pairs: int
    pairs_agree: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What training takes of one problem, by where it stands in a table."""

    split: str
    ppm_only: bool
    trajectories: list[int]
    """Numbers among all of the table, best first."""
    pairs: np.ndarray
    """Likewise, in order."""
    nodes: np.ndarray


def is_validation(original: str, config: DatasetConfig) -> bool:
    """True if a problem is held out from all training.

    Args:
        original: `Problem.original`; beside it the result depends on `split_seed` only.
    """
    return _draw(f"{config.split_seed}:{original}") < config.validation_share


def is_ppm_only(original: str, config: DatasetConfig) -> bool:
    """True if a training problem is kept from the policy; arguments as of `is_validation`, of
    whose draw this one is independent."""
    return _draw(f"{config.split_seed}:ppm:{original}") < config.ppm_only_share


def _draw(name: str) -> float:
    """Uniform in [0, 1), the same for a name everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def recipe_of(
    config: DatasetConfig, template: PromptTemplate, *, valued_steps: bool = False
) -> Recipe:
    """What of a config is decided tree by tree."""
    top = max(config.trajectories_per_problem, TOP)
    return Recipe(template=template, pairs=config.pairs, valued_steps=valued_steps, top=top)


def columns_of(config: DatasetConfig, *, newest: bool) -> list[str]:
    """What of the candidates of a round may enter a dataset.

    Args:
        newest: it is the round that the dataset is for.
    """
    unread = set()
    if not newest:
        unread |= {"trajectories"} if config.sft_rounds == "this" else set()
        unread |= {"pairs", "nodes"} if config.pair_rounds == "this" else set()
    return [name for name in SCHEMA.names if name not in unread]


def select_dataset(
    trees: Iterable[Tree],
    directory: str | Path,
    *,
    template: PromptTemplate,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    valued_steps: bool = False,
    info: Mapping[str, Any] | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """Write what to train on as a dataset; what was there before is replaced.

    Args:
        trees: finished trees of one or several rounds, each once, in any order; the files do not
            depend on the order. The newest round among them is "this" one.
        directory: gets the dataset; meanwhile its disk holds what all trees may give as well.
        valued_steps: also write every step of `pair_rounds` with its Q-value, for objective
            q_regression: about as much again as all the rest.
        memory_bytes: held at a time of what trees may give.
    Returns:
        The manifest, as `select_runs`.
    Raises:
        DatasetError: the disk is full.
    """
    recipe = recipe_of(config, template, valued_steps=valued_steps)
    with working_folder(directory) as folder:
        return select_runs(
            write_runs(candidates_of(trees, recipe), folder, "run", memory_bytes=memory_bytes),
            directory,
            template=template,
            config=config,
            demonstrations=demonstrations,
            info=info,
        )


def candidates_of(trees: Iterable[Tree], recipe: Recipe) -> Iterator[pa.Table]:
    """Tables of what trees may give, a few trees in memory at a time."""
    left = iter(trees)
    while some := list(islice(left, _TREES)):
        yield candidates(some, recipe)


@contextlib.contextmanager
def working_folder(directory: str | Path) -> Iterator[Path]:
    """A hidden folder in that of a dataset, gone at the end.

    Raises:
        DatasetError: the disk is full.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".", dir=directory, ignore_cleanup_errors=True
        ) as hidden:
            yield Path(hidden)
    except OSError as error:
        raise DatasetError(no_room(error, directory)) from error


def write_runs(
    tables: Iterable[pa.Table], folder: Path, name: str, *, memory_bytes: int = MEMORY_BYTES
) -> Runs:
    """Sort what trees may give into files of about `memory_bytes`.

    Args:
        tables: as `learner.candidates.candidates` makes them; columns of `TEXTS` may be missing.
        name: of the files, before a number.
    Raises:
        OSError: the disk is full.
    """
    runs = Runs.none()
    held: list[pa.Table] = []
    size = 0

    def write() -> None:
        nonlocal held, size
        path = folder / f"{name}-{len(runs.paths):05d}.arrow"
        write_run(held, path, keys=_KEYS)
        runs.paths.append(path)
        held, size = [], 0

    for table in map(_with_all_columns, tables):
        sums = table.group_by("round").aggregate([("reached", "sum"), ("correct", "sum")])
        for row in sums.to_pylist():
            runs.reached[row["round"]] += row["reached_sum"]
            runs.correct[row["round"]] += row["correct_sum"]
        held.append(table)
        size += table.nbytes
        if size >= memory_bytes:
            write()
    if held:
        write()
    return runs


def _with_all_columns(table: pa.Table) -> pa.Table:
    """The table with empty lists for the texts that were not read."""
    for name in TEXTS:
        if name not in table.column_names:
            none = pa.ListArray.from_arrays(
                pa.array(np.zeros(len(table) + 1, dtype=np.int32)),
                pa.array([], type=SCHEMA.field(name).type.value_type),
            )
            table = table.append_column(SCHEMA.field(name), none)
    return table.select(SCHEMA.names)


def select_runs(
    runs: Runs,
    directory: str | Path,
    *,
    template: PromptTemplate,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    info: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write what to train on as a dataset, of candidates that a recipe of the config gave.

    Args:
        check: called again and again; what it raises ends the selection.
    Returns:
        The manifest. Its `counts` are level (and "all") -> name -> count, of problems, solved,
        trees, trajectories_correct, trajectories_kept, sft_train, sft_validation, demonstrations,
        pairs_train, pairs_validation, steps_train, and with `ppm_only_share` the training problems
        policy_problems and ppm_problems; its `excluded` are level -> reason -> count: of
        problems unsolved, solved_earlier (but not in `sft_rounds`), low_accuracy; of correct
        trajectories other_round, same_program, ppm_only, beyond_top; of these and of demonstrations
        empty, unrenderable (a lone surrogate, which no file can hold); of pairs other_round_pair,
        duplicate_pair, contradicted_pair, low_accuracy_pair, policy_pair (of problems the policy
        is trained on), empty_pair, unrenderable_pair.
        `origins` are file -> round -> rows that its trees gave, demonstrations left out;
        `newest_round_share` the share of this round in those of sft_train, None if there are none;
        `difficulty` is level -> class -> problems, as this round's trees found them; `shape` is
        `step_pairs` (round -> shared steps -> step pairs taken) and `node_visits` (round -> visits
        -> inner nodes below the root of all trees given).
    Raises:
        DatasetError: the disk is full.
    """
    selection = _Selection(config, max(runs.reached, default=-1))
    with writing_dataset(directory) as writer:
        for table in merged(runs.paths, keys=_KEYS):
            check()
            _write(writer, table, selection)
        for example in selection.demonstrations(demonstrations, template):
            writer.add("sft_train", example)
        return writer.commit(
            template=template.name,
            counts=_with_total(selection.counts),
            excluded=_with_total(selection.excluded),
            facts=selection.rounds() | {"shape": selection.shape()},
            info=info,
        )


def _write(writer: DatasetWriter, table: pa.Table, selection: _Selection) -> None:
    """Write what is chosen of the problems of a table."""
    texts = _Texts(table)
    choices = [
        selection.choose(list(members), texts)
        for _, members in groupby(_rows(table), key=attrgetter("problem_id"))
    ]
    for split in ("train", "validation"):
        own = [choice for choice in choices if choice.split == split]
        kept = np.array([n for choice in own for n in choice.trajectories], dtype=np.int64)
        pairs = np.concatenate([np.empty(0, np.int64), *(choice.pairs for choice in own)])
        writer.add_table(f"sft_{split}", texts.sft(kept))
        writer.add_table(f"pairs_{split}", taken := texts.pairs(pairs))
        selection.count_pairs(f"pairs_{split}", taken)
    nodes = np.concatenate([np.empty(0, np.int64), *(choice.nodes for choice in choices)])
    writer.add_table("steps_train", texts.steps(nodes))


def choose_of_problem(
    trees: Iterable[Tree], *, template: PromptTemplate, config: DatasetConfig
) -> Chosen:
    """What `select_dataset` takes of one problem, given all its trees (at least one)."""
    recipe = recipe_of(config, template)
    found = sorted(
        (find(tree, recipe) for tree in trees), key=lambda f: (f.tree.round, f.tree.index)
    )
    table = pa.Table.from_pylist([row_of(one, recipe) for one in found], schema=SCHEMA)
    texts = _Texts(table)
    choice = _Selection(config, found[-1].tree.round).choose(_rows(table), texts)
    trajectories = [t for one in found for _, t in one.programs[: recipe.top]]
    pairs = [pair for one in found for pair in one.pairs]
    return Chosen(
        held_out=choice.split == "validation",
        ppm_only=choice.ppm_only,
        trajectories=[trajectories[number] for number in choice.trajectories],
        pairs=[pairs[number] for number in choice.pairs],
    )


def _rows(table: pa.Table) -> list[_Row]:
    names = [field.name for field in fields(_Row) if field.name != "row"]
    return [_Row(row=n, **row) for n, row in enumerate(table.select(names).to_pylist())]


class _Texts:
    """The texts of a table of candidates, by their number among all of the table."""

    def __init__(self, table: pa.Table) -> None:
        table = table.combine_chunks()
        self._table = table
        lists = {name: _only_chunk(table[name]) for name in TEXTS}
        self._starts = {name: _starts(column) for name, column in lists.items()}
        self._values = {name: column.flatten() for name, column in lists.items()}
        self._steps = _starts(self._values["nodes"].field("steps"))

    def numbers(self, name: str, row: int) -> np.ndarray:
        """Of the texts of a tree; `name` is one of `TEXTS`."""
        starts = self._starts[name]
        return np.arange(starts[row], starts[row + 1])

    def ranked(self, row: _Row) -> list[tuple[tuple[float, float, int, int, int], int]]:
        """Trajectories of a tree: `learner.candidates.rank` and number."""
        found = []
        values = self._values["trajectories"]
        for number in self.numbers("trajectories", row.row):
            mean_q, min_q, node = (
                values.field(name)[number].as_py() for name in ("mean_q", "min_q", "node")
            )
            found.append(((-mean_q, -min_q, -row.round, row.tree_index, node), int(number)))
        return found

    def pair_texts(self, row: int) -> list[tuple[str, str, str]]:
        numbers = pa.array(self.numbers("pairs", row))
        values = self._values["pairs"]
        names = ("prefix", "chosen", "rejected")
        columns = (values.field(name).take(numbers).to_pylist() for name in names)
        return list(zip(*columns, strict=True))

    def num_steps(self, row: int) -> int:
        starts = self._starts["nodes"]
        return int(self._steps[starts[row + 1]] - self._steps[starts[row]])

    def sft(self, numbers: np.ndarray) -> pa.Table:
        """Rows of an SFT file."""
        table, values = self._taken("trajectories", numbers)
        return pa.table(
            {
                **{name: table[name] for name in ("problem_id", "level")},
                "origin": pa.repeat("tree", len(table)),
                "round": table["round"],
                **{name: values.field(name) for name in ("mean_q", "segments")},
            }
        )

    def pairs(self, numbers: np.ndarray) -> pa.Table:
        """Rows of a file of pairs."""
        return self._with_tree("pairs", numbers)

    def steps(self, numbers: np.ndarray) -> pa.Table:
        """Rows of a file of valued nodes."""
        return self._with_tree("nodes", numbers)

    def _with_tree(self, name: str, numbers: np.ndarray) -> pa.Table:
        table, values = self._taken(name, numbers)
        own = {field.name: values.field(field.name) for field in values.type}
        tree = ("problem_id", "level", "round", "tree_index")
        return pa.table({**{column: table[column] for column in tree}, **own})

    def _taken(self, name: str, numbers: np.ndarray) -> tuple[pa.Table, pa.StructArray]:
        """For each of some texts its tree, without texts, and the text itself."""
        rows = np.searchsorted(self._starts[name], numbers, side="right") - 1
        keys = self._table.select(["problem_id", "level", "round", "tree_index"])
        return keys.take(pa.array(rows)), self._values[name].take(pa.array(numbers))


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _starts(column: pa.ListArray) -> np.ndarray:
    """Where the list of each row begins among the flattened ones, and where the last ends."""
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0]


class _Selection:
    """Chooses among what the trees of a problem may give, one problem after the other."""

    def __init__(self, config: DatasetConfig, newest: int) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.excluded: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.difficulty: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.origins: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.step_pairs: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """Round -> shared steps -> step pairs taken."""
        self.node_visits: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._config = config
        self._newest = newest

    def choose(self, members: Sequence[_Row], texts: _Texts) -> _Choice:
        """What to take of the problem of some trees, which are all it has, in order."""
        config, problem = self._config, members[0]
        counts, excluded = self.counts[problem.level], self.excluded[problem.level]
        held_out = is_validation(problem.original, config)
        split = "validation" if held_out else "train"
        apart = config.ppm_only_share > 0 and not held_out
        ppm_only = apart and is_ppm_only(problem.original, config)
        counts["problems"] += 1
        if apart:
            counts["ppm_problems" if ppm_only else "policy_problems"] += 1
        counts["trees"] += len(members)
        self._classify(members)
        for tree in members:
            visits = self.node_visits[tree.round]
            for name, count in zip(_VISITS, tree.visits, strict=True):
                _add(visits, name, count)
        of_sft = self._of_rounds(members, config.sft_rounds)
        everywhere = sum(tree.correct for tree in members)
        correct = usable = 0
        for tree in of_sft:
            correct += tree.correct
            usable += tree.correct - tree.empty - tree.unrenderable
            _add(excluded, "empty", tree.empty)
            _add(excluded, "unrenderable", tree.unrenderable)
        num_programs = len({program for tree in of_sft for program in tree.programs})
        _add(counts, "trajectories_correct", everywhere)
        _add(excluded, "other_round", everywhere - correct)
        _add(excluded, "same_program", usable - num_programs)
        kept: list[tuple[int, int]] = []
        # A made problem answered right so rarely that its reference must be wrong.
        mislabelled = (
            everywhere > 0
            and problem.source in config.synthetic_sources
            and _accuracy(members) < config.min_synthetic_accuracy
        )
        if everywhere:
            counts["solved"] += 1
        if mislabelled:
            excluded["low_accuracy"] += 1
        elif num_programs and ppm_only:
            excluded["ppm_only"] += num_programs
        elif num_programs:
            kept = _best(of_sft, texts, config.trajectories_per_problem)
            counts["trajectories_kept"] += len(kept)
            excluded["beyond_top"] += num_programs - len(kept)
            counts[f"sft_{split}"] += len(kept)
            self.origins[f"sft_{split}"].update(round_ for round_, _ in kept)
        elif not everywhere:
            excluded["unsolved"] += 1
        elif not correct:
            excluded["solved_earlier"] += 1
        of_pairs = self._of_rounds(members, config.pair_rounds)
        pairs = self._pairs(members, of_pairs, texts, excluded)
        if len(pairs) and mislabelled:
            excluded["low_accuracy_pair"] += len(pairs)
            pairs = pairs[:0]
        teaches = ppm_only or not apart
        if not teaches:
            _add(excluded, "policy_pair", len(pairs))
            pairs = pairs[:0]
        _add(counts, f"pairs_{split}", len(pairs))
        nodes = [np.empty(0, np.int64)]
        for tree in of_pairs if teaches and not held_out and not mislabelled else ():
            own = texts.numbers("nodes", tree.row)
            if len(own):
                nodes.append(own)
                counts["steps_train"] += texts.num_steps(tree.row)
                self.origins["steps_train"][tree.round] += len(own)
        return _Choice(
            split=split,
            ppm_only=ppm_only,
            trajectories=[number for _, number in kept],
            pairs=pairs,
            nodes=np.concatenate(nodes),
        )

    def _pairs(
        self,
        members: Sequence[_Row],
        of_pairs: Sequence[_Row],
        texts: _Texts,
        excluded: Counter[str],
    ) -> np.ndarray:
        """Numbers of a problem's pairs, without repetitions and without those that another tree
        turned round."""
        for tree in of_pairs:
            _add(excluded, "empty_pair", tree.empty_pairs)
            _add(excluded, "unrenderable_pair", tree.unrenderable_pairs)
        with_pairs = [tree for tree in of_pairs if tree.num_pairs]
        everywhere = sum(tree.num_pairs for tree in members)
        _add(excluded, "other_round_pair", everywhere - sum(t.num_pairs for t in with_pairs))
        numbers = [texts.numbers("pairs", tree.row) for tree in with_pairs]
        found = np.concatenate([np.empty(0, np.int64), *numbers])
        if len(with_pairs) == 1 and with_pairs[0].pairs_agree:
            return found
        kept, reasons = kept_pairs([t for tree in with_pairs for t in texts.pair_texts(tree.row)])
        excluded.update(reasons)
        return found[np.array(kept, dtype=bool)]

    def count_pairs(self, name: str, pairs: pa.Table) -> None:
        """Count by round what was taken for one of the files of pairs."""
        for row in pairs.group_by("round").aggregate([([], "count_all")]).to_pylist():
            self.origins[name][row["round"]] += row["count_all"]
        steps = pairs.filter(pc.equal(pairs["kind"], PairKind.STEP.value))
        groups = steps.group_by(["round", "shared_steps"]).aggregate([([], "count_all")])
        for row in groups.to_pylist():
            self.step_pairs[row["round"]][row["shared_steps"]] += row["count_all"]

    def _of_rounds(self, members: Sequence[_Row], rounds: Rounds) -> Sequence[_Row]:
        """The trees of a problem that may be used."""
        if rounds == "all":
            return members
        number = self._newest
        if rounds == "newest_solved":
            number = max((tree.round for tree in members if tree.correct), default=-1)
        return [tree for tree in members if tree.round == number]

    def _classify(self, members: Sequence[_Row]) -> None:
        """Count how hard the problem of some trees was in the newest round."""
        of_round = [
            (tree.tree_index, tree.correct, tree.answered)
            for tree in members
            if tree.round == self._newest
        ]
        if of_round and members[0].labelled:
            self.difficulty[members[0].level][difficulty_of(of_round).value] += 1

    def rounds(self) -> dict[str, Any]:
        """What the manifest says of the rounds."""
        sft = self.origins["sft_train"]
        return {
            "newest_round_share": sft[self._newest] / sft.total() if sft.total() else None,
            "origins": {
                name: {str(number): count for number, count in sorted(rows.items())}
                for name, rows in sorted(self.origins.items())
                if rows.total()
            },
            "difficulty": _with_total(self.difficulty),
        }

    def shape(self) -> dict[str, Any]:
        """What the manifest says of the form of the trees."""
        return {
            "step_pairs": _by_round(self.step_pairs),
            "node_visits": _by_round(self.node_visits),
        }

    def demonstrations(
        self, demonstrations: Iterable[Demonstration], template: PromptTemplate
    ) -> Iterator[SFTExample]:
        """Each as often as it is to be repeated."""
        repeat = self._config.demonstration_repeat
        for demonstration in demonstrations:
            counts = self.counts[demonstration.level]
            counts["demonstrations"] += 1
            segments = render_segments(demonstration.problem, demonstration.steps, template)
            reason = unusable_solution(segments)
            if reason is not None:
                self.excluded[demonstration.level][reason] += 1
                continue
            counts["sft_train"] += repeat
            example = SFTExample(
                problem_id=demonstration.id,
                level=demonstration.level,
                origin="demonstration",
                round=-1,
                mean_q=1.0,
                segments=tuple(segments),
            )
            yield from [example] * repeat


def _accuracy(members: Sequence[_Row]) -> float:
    """How often the policy is right in the newest round with an answer: the mean over its trees."""
    graded = [(tree.round, tree.right_share) for tree in members]
    newest = max(number for number, share in graded if share is not None)
    shares = [share for number, share in graded if number == newest and share is not None]
    return sum(shares) / len(shares)


def _best(of_sft: Sequence[_Row], texts: _Texts, limit: int) -> list[tuple[int, int]]:
    """(round, number) of the best trajectories of some trees, one of each program, best first."""
    found = [tree for tree in of_sft if tree.programs]
    if len(found) == 1:
        numbers = texts.numbers("trajectories", found[0].row)[:limit]
        return [(found[0].round, int(number)) for number in numbers]
    # A program beyond those whose texts are kept has as many better ones in its own tree.
    best: dict[bytes, tuple[tuple[float, float, int, int, int], int]] = {}
    for tree in found:
        for program, ranked in zip(tree.programs, texts.ranked(tree), strict=False):
            best[program] = min(best.get(program, ranked), ranked)
    return [(-rank[2], number) for rank, number in sorted(best.values())[:limit]]


def _add(counts: Counter[str], name: str, count: int) -> None:
    """Count, but name nothing that never was."""
    if count > 0:
        counts[name] += count


def _sum(left: Counter[int], right: Counter[int]) -> Counter[int]:
    """As `+`, zeros kept."""
    return Counter({key: left[key] + right[key] for key in [*left, *right]})


def _with_total(counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    total: Counter[str] = Counter()
    for level in counts.values():
        total.update(level)
    return {
        **{level: dict(sorted(counts[level].items())) for level in sorted(counts)},
        "all": dict(sorted(total.items())),
    }


def _by_round(
    counts: Mapping[int, Counter[int]] | Mapping[int, Counter[str]],
) -> dict[str, dict[str, int]]:
    """As JSON has it, in order."""
    return {
        str(round_): {str(key): count for key, count in sorted(counts[round_].items())}
        for round_ in sorted(counts)
    }
