"""What an evaluation is asked to do: from the command line to config, problems and prompt.

    command line, a run's config --evaluate_config-->      EvaluateConfig
    problem files ----------------read_benchmark---------> problems with ids of their own
    tokenizer --------------------choose_prompting-------> how the policy is asked:

    steps   our prompt: programs in steps, executed, then the answer (all methods)
    chat    the chat template of the model's tokenizer: a plain chain of thought (greedy, majority)
    plain   question and answer, for a base model without either

Nothing is started here: what is wrong is said before a machine is asked for.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.evaluation.config import EvaluateConfig, search_of_run
from cluster.fleet.given_models import chat_prompt, with_checkpoint_directories
from cluster.folder.config_file import ConfigError, make_config, read_yaml
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.folder.staging import at_hand
from learner.checkpoint import CheckpointStore
from rollout.problem import Problem
from rollout.problems.reader import read_problems
from rollout.problems.rows import SUFFIXES
from rollout.prompt import MARKERS
from rollout.run_store import RunStore, absolute
from verifier.comparable import is_comparable

RUN_SECTIONS = ("seed", "cluster", "policy_engine", "ppm_engine", "sandbox", "search", "cost")
"""What a run's config tells about serving its models."""

SUBSET_SHARE = 0.5
"""From this share of common statements on, the smaller of two benchmarks is called a part of the
other."""


def evaluate_config(
    *,
    what: Path | None = None,
    policy: Path | None = None,
    ppm: Path | None = None,
    round: int | None = None,
    benchmarks: str = "",
    data: Path | None = None,
    methods: str = "",
    trajectories: str = "",
    limit: int | None = None,
    out: Path | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> EvaluateConfig:
    """The config of an evaluation; the later of run, config file, command line, --set wins.

    Args:
        what: a run, or a policy's directory.
        round: of a run; None: its last with both models.
        benchmarks: names of files in `data`, or paths, with commas between; likewise `methods` and
            `trajectories`.
    Raises:
        ConfigError, RunFolderError, CheckpointError: what is missing or wrong, named.
    """
    budgets = set()
    for word in _listed(trajectories):
        if not word.isdigit() or not int(word):
            raise ConfigError(f"--trajectories {word!r}: expected whole numbers, as 1,2,4,8")
        budgets.add(int(word))
    made: dict[str, Any] = {}
    name = "models"
    if what is not None:
        name = absolute(what).rpartition("/")[2]
        if RunStore(what).exists("config.json") or what.parent.name.startswith("round="):
            if policy is not None:
                raise ConfigError(f"{what} is a policy already: leave --policy out")
            policy = what
        else:
            if policy is not None or ppm is not None:
                raise ConfigError("give a run, or --policy and --ppm, not both")
            policy, ppm = pair_of_run(what, round)
            made |= _settings_of_run(what)
            name += f"-round{round}" if round is not None else ""
    elif policy is not None:
        name = absolute(policy).rpartition("/")[2]
    if config is not None:
        made |= read_yaml(config)
    made |= {key: path for key, path in (("policy", policy), ("ppm", ppm)) if path is not None}
    if "policy" not in made:
        raise ConfigError("no policy: give a run, a model's directory, or --policy DIR")
    if _listed(benchmarks) or "benchmarks" not in made:
        made["benchmarks"] = find_benchmarks(_listed(benchmarks), data)
    given = {"methods": _listed(methods), "trajectories": sorted(budgets), "limit": limit}
    made |= {key: value for key, value in given.items() if value}
    made["run_dir"] = out or made.get("run_dir") or Path("runs") / f"evaluate-{name}"
    source = str(config or what or "rstar evaluate")
    checked = make_config(made, overrides, kind=EvaluateConfig, source=source)
    checked = with_checkpoint_directories(checked)
    missing = [m for m in checked.methods if m.needs_preference and checked.ppm is None]
    if missing:
        raise ConfigError(
            f"method {missing[0]} needs a PPM: give --ppm DIR, or choose another --method"
        )
    return checked


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def pair_of_run(run: Path, round: int | None) -> tuple[Path, Path | None]:
    """Policy and PPM of one round of a run; of round 0, and before any PPM, the policy alone.

    Raises:
        RunFolderError: there is no such run, or no such round; says which there are.
    """
    folder = RunFolder(run)
    store = CheckpointStore(folder.checkpoints)
    if round is None:
        latest = store.latest("ppm") or store.latest("policy")
        if latest is None:
            what = "no checkpoints" if folder.store.exists("") else "no such folder"
            raise RunFolderError(f"{run}: {what}; expected a run, or a model's directory")
        round = latest.round
    policy, ppm = store.current("policy", round), store.current("ppm", round)
    if policy is None:
        there = [r for r in range(100) if store.current("policy", r) is not None]
        raise RunFolderError(
            f"{run}: no policy of round {round}; there are rounds {', '.join(map(str, there))}"
        )
    return Path(policy.path), Path(ppm.path) if ppm is not None else None


def _settings_of_run(run: Path) -> dict[str, Any]:
    """Serving settings of a run, and those its own evaluation uses the methods with."""
    stored = RunFolder(run).config() or {}
    settings = {name: stored[name] for name in RUN_SECTIONS if name in stored}
    if "search" in settings:
        settings["search"] = search_of_run(stored)
    evaluation = stored.get("evaluation") or {}
    for name in ("max_solution_tokens", "vote_top_k"):
        if name in evaluation:
            settings[name] = evaluation[name]
    return settings


def find_benchmarks(names: Sequence[str], data: Path | None) -> list[Path]:
    """The problem files that are meant: paths, or names in a folder.

    Raises:
        ConfigError: no such file (with the nearest name), or nothing was named at all.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder")
    there = sorted(data.iterdir()) if data is not None else []
    known = {path.stem: path for path in there if path.suffix in SUFFIXES}
    if not names:
        raise ConfigError(
            "no benchmark: give --benchmarks NAME,... with --data DIR, or paths of problem files"
            + (f"; in {data}: {', '.join(known)}" if known else "")
        )
    found = []
    for name in names:
        path = Path(name)
        if path.suffix in SUFFIXES and path.is_file():
            found.append(path)
        elif name in known:
            found.append(known[name])
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = f"; in {data}: {', '.join(known)}" if known else "; give its folder by --data"
            raise ConfigError(f"benchmark {name!r}: no such file{hint or listed}")
    stems = Counter(path.stem for path in found)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise ConfigError(f"two benchmarks are called {twice[0]!r}; each file needs its own name")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One problem file, as it was read."""

    name: str
    file: str
    num_rows: int
    num_problems: int
    """That are evaluated."""
    skipped: Mapping[str, int]
    """Rows left out, by reason."""
    num_repeated: int
    """Problems whose statement stands in the file before."""
    num_sentences: int
    """Answers that are sentences: equal to the same text only, so hardly ever found."""


def read_benchmark(
    path: Path, config: EvaluateConfig
) -> tuple[list[Problem], Benchmark, list[str]]:
    """The problems of a file, with ids that no other file has; what it is; lines for people.

    Raises:
        ProblemFileError: it cannot be used.
    """
    problems, report = read_problems(at_hand(path), default_level=config.default_level)
    problems = [
        replace(problem, id=f"{path.stem}:{problem.id}", source=path.stem)
        for problem in problems[: config.limit]
    ]
    texts = Counter(_words(problem) for problem in problems)
    about = Benchmark(
        name=path.stem,
        file=str(path),
        num_rows=report.num_rows,
        num_problems=len(problems),
        skipped=dict(report.skipped),
        num_repeated=sum(count - 1 for count in texts.values()),
        num_sentences=sum(not any(map(is_comparable, p.golds)) for p in problems),
    )
    return problems, about, report.lines()


def overlaps(problems: Mapping[str, Sequence[Problem]]) -> list[str]:
    """A warning for each two benchmarks of which one is largely a part of the other."""
    texts = {name: {_words(problem) for problem in some} for name, some in problems.items()}
    names = sorted(texts, key=lambda name: len(texts[name]))
    warnings = []
    for position, small in enumerate(names):
        for large in names[position + 1 :]:
            common = len(texts[small] & texts[large])
            if common >= SUBSET_SHARE * len(texts[small]):
                warnings.append(
                    f"{common} of {len(texts[small])} problems of {small} stand in {large} too: "
                    "do not report them as two samples"
                )
    return warnings


def _words(problem: Problem) -> str:
    return " ".join(problem.text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How the policy is asked."""

    kind: str
    """steps | chat | plain"""
    text: str | None
    """With `{question}`; None for steps."""


def choose_prompting(config: EvaluateConfig, tokenizer: Any) -> Prompting:
    """The prompt of `config.prompt`, for "auto" what the tokenizer suggests.

    Raises:
        ConfigError: chat is asked of a tokenizer without a chat template.
    """
    kind = config.prompt
    if kind == "auto":
        taught = all(len(tokenizer(m, add_special_tokens=False).input_ids) == 1 for m in MARKERS)
        shown = config.search.prompt_template.repairs
        kind = "steps" if taught or shown else "chat" if tokenizer.chat_template else "plain"
    if kind == "steps":
        return Prompting(kind=kind, text=None)
    if kind == "plain":
        return Prompting(kind=kind, text=f"Question: {{question}}\n{config.instruction}\nAnswer:")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{config.policy}: prompt chat, but its tokenizer has no chat template; choose "
            "--set prompt=plain or prompt=steps"
        )
    turn = {"role": "user", "content": f"{{question}}\n{config.instruction}"}
    return Prompting(kind=kind, text=chat_prompt(tokenizer, [turn], where=config.policy))
