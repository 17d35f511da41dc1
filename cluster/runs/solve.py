"""`rstar solve`: one problem, one answer, and how it was found.

    problem text --> embedded Ray: policy replica, PPM replica, sandbox worker
                 --> a method of `rollout.methods` --events--> lines while it goes
                 --> steps, output, answer, value, runners-up, tokens, seconds  |  one JSON object

The models are named, or are those of the last finished round of a run; then the run's engine,
sandbox and sampling settings apply too. A method that uses no PPM starts none.

Model output is shown without control characters: it could otherwise rewrite the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.engines.model_check import check_preference_checkpoint
from cluster.evaluation.config import search_of_run
from cluster.fleet.fleet import Fleet
from cluster.fleet.given_models import (
    form_note,
    serve_given,
    with_checkpoint_directories,
    with_policy_form,
    with_prompt_template,
)
from cluster.folder.config_file import ConfigError, make_config, read_yaml
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.folder.staging import at_hand
from cluster.runs.config import SolveConfig
from cluster.telemetry.progress import say
from learner.checkpoint import CheckpointStore
from rollout.methods import Event, EventKind, Method, MethodConfig, Solver, SolveResult
from rollout.problem import Level, Problem
from rollout.prompt import END_OF_ANSWER, Step, StepKind, parse_response
from verifier.accuracy import RankedAnswer
from verifier.verify import start_symbolic_worker

S = TypeVar("S", bound=SolveConfig)

RUN_SECTIONS = ("seed", "cluster", "policy_engine", "ppm_engine", "sandbox", "search")
"""What a run's config tells about serving its models."""

MAX_RUNNERS_UP = 5
"""Printed; the JSON has all."""


# -------------------------------------------------------------------------- the question


def read_problem(argument: str, stdin: TextIO) -> Problem:
    """The problem a command line means: its text, `-` for stdin, `@FILE` for a text file.

    Raises:
        ConfigError: no such file, not UTF-8, or nothing but white space.
    """
    where = "the problem"
    try:
        if argument == "-":
            where = "stdin"
            argument = stdin.read()
        elif argument.startswith("@"):
            where = argument[1:]
            argument = Path(where).read_text(encoding="utf-8")
        argument.encode("utf-8")
    except UnicodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from error
    text = argument.strip()
    if not text:
        raise ConfigError(
            f'{where} is empty; give its text, as in rstar solve "What is 3 + 4?", or - for '
            "stdin, or @FILE"
        )
    return asked_problem(text, source="command line")


def asked_problem(text: str, *, source: str) -> Problem:
    """A problem that somebody asks: equal texts have equal ids."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return Problem(id=f"asked-{digest}", source=source, level=Level.MATH, text=text)


def solve_config(scratch: Path, **given: Any) -> SolveConfig:
    """The config of one `rstar solve`, as `asked_config` makes it, with one actor of each kind."""
    made = asked_config(SolveConfig, scratch, **given)
    one_each = {
        name: getattr(made.cluster, name).model_copy(update={"replicas": 1})
        for name in ("policy", "ppm", "sandbox")
    }
    return made.model_copy(update={"cluster": made.cluster.model_copy(update=one_each)})


def asked_config(
    kind: type[S],
    scratch: Path,
    *,
    policy: Path | None = None,
    ppm: Path | None = None,
    run: Path | None = None,
    method: Method | None = None,
    trajectories: int | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> S:
    """The config of a command that asks; the later of run, config file, command line, --set wins.

    Args:
        scratch: folder for what Ray's actors write.
    Raises:
        ConfigError, RunFolderError, CheckpointError: what is missing or wrong, named.
    """
    data: dict[str, Any] = {}
    if run is not None:
        if policy is not None or ppm is not None:
            raise ConfigError("give --run, or --policy and --ppm, not both")
        policy, ppm = models_of_run(run)
        data |= _settings_of_run(run)
    if config is not None:
        data |= read_yaml(config)
    data["run_dir"] = scratch
    data |= {name: path for name, path in (("policy", policy), ("ppm", ppm)) if path is not None}
    if "policy" not in data and not any(o.startswith("policy=") for o in overrides):
        raise ConfigError("no policy: give --policy DIR, or --run RUN for the models of a run")
    asked = {"name": method, "num_trajectories": trajectories}
    given = {name: value for name, value in asked.items() if value is not None}
    data["method"] = {**(data.get("method") or {}), **given}
    source = str(config or run or "rstar solve")
    made = make_config(data, overrides, kind=kind, source=source)
    if made.method.name.needs_preference and made.ppm is None:
        raise ConfigError(
            f"method {made.method.name} needs a PPM: give --ppm DIR, or choose another --method"
        )
    cluster = made.cluster.model_copy(update={"dashboard_port": None})
    made = made.model_copy(update={"cluster": cluster})
    return with_prompt_template(with_checkpoint_directories(made))


def models_of_run(run: Path) -> tuple[Path, Path | None]:
    """Policy and PPM of the last finished round of a run; no PPM before round 1 is finished.

    Raises:
        RunFolderError: the folder has no checkpoints.
        CheckpointError: a checkpoint's record cannot be read, or what it names is gone.
    """
    folder = RunFolder(run)
    store = CheckpointStore(folder.checkpoints)
    ppm = store.latest("ppm")
    policy = store.current("policy", ppm.round) if ppm is not None else store.latest("policy")
    if policy is None:
        what = "no checkpoints" if folder.store.exists("") else "no such folder"
        raise RunFolderError(f"{run}: {what}; expected the folder of an `rstar evolve` run")
    return Path(policy.path), Path(ppm.path) if ppm is not None else None


def _settings_of_run(run: Path) -> dict[str, Any]:
    """Serving settings of a run, and those its own evaluation uses the methods with."""
    stored = RunFolder(run).config() or {}
    settings = {name: stored[name] for name in RUN_SECTIONS if name in stored}
    if "search" in settings:
        settings["search"] = search_of_run(stored)
    evaluation = stored.get("evaluation") or {}
    same = {"max_solution_tokens": "max_solution_tokens", "vote_top_k": "top_k"}
    settings["method"] = {ours: evaluation[its] for its, ours in same.items() if its in evaluation}
    return settings


# -------------------------------------------------------------------------- solving


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """One answered command."""

    problem: Problem
    config: SolveConfig
    result: SolveResult
    start_s: float
    """Until the engines were up."""


async def solve(config: SolveConfig, problem: Problem, view: SolveView) -> Solved:
    """Start the engines, find the answer, end the engines.

    Raises:
        ModelCheckError: a named directory is not the model it should be; before anything starts.
        EngineError, SearchError, SandboxError: a part failed; says which and why.
    """
    uses_ppm = config.ppm is not None and config.method.name.uses_preference
    config = with_policy_form(config)
    if note := form_note(config):
        view.note(note)
    if uses_ppm:
        assert config.ppm is not None
        check_preference_checkpoint(at_hand(config.ppm))
    fleet = Fleet(config, RunFolder(config.run_dir))
    began_s = time.monotonic()
    try:
        with view:
            view.note("starting the engines")
            await serve_given(fleet, config, preference=uses_ppm)
            # A symbolic question that has to wait for its process would end undecided.
            await asyncio.to_thread(start_symbolic_worker)
            start_s = time.monotonic() - began_s
            view.note(f"{fleet.describe()} up after {start_s:.0f} s; {_plan(config.method)}")
            solver = Solver(
                config=config.method,
                search=config.search,
                policy=fleet.policy,
                preference=fleet.preference if uses_ppm else None,
                sandbox=fleet.sandbox,
                clock=time.monotonic,
            )
            result = await solver.solve(problem, seed=config.seed, on_event=view.on_event)
    finally:
        await fleet.stop(view.note)
    return Solved(problem=problem, config=config, result=result, start_s=start_s)


def _plan(method: MethodConfig) -> str:
    count = "" if method.name is Method.GREEDY else f", {method.num_trajectories} trajectories"
    budget = method.max_generated_tokens
    return f"{method.name}{count}" + (f", at most {budget:,} tokens" if budget else "")


# -------------------------------------------------------------------------- while it goes


@dataclass(slots=True)
class PathLog:
    """Turns events into lines that are only ever added: the best path as the search goes.

    Until a first answer is found, steps are told as they are chosen, as long as they extend the
    path told so far or begin one the PPM values more; from then on, each better answer.
    """

    path: str = ""
    """Text of the path told last."""
    path_value: float | None = None
    best: str = ""
    """The best-valued answer so far; "" before there is one."""
    best_value: float | None = None
    num_answers: int = 0

    def lines(self, event: Event) -> list[str]:
        """What there is to say of an event."""
        if event.kind is EventKind.EXTENDS:
            goes_on = event.text.startswith(self.path)
            if self.best or not (goes_on or _higher(event.value, self.path_value)):
                return []
            return self._tell(event)
        steps = read_steps(event.text)
        answer = steps[-1].answer if steps else None
        if not answer:
            return []
        self.num_answers += 1
        if self.best and not _higher(event.value, self.best_value):
            return []
        self.best, self.best_value = answer, event.value
        return self._tell(event)

    def _tell(self, event: Event) -> list[str]:
        """The steps that the path told before does not share."""
        before, steps = read_steps(self.path), read_steps(event.text)
        shared = 0
        while shared < min(len(before), len(steps)) and before[shared] == steps[shared]:
            shared += 1
        if shared == len(steps):
            return []
        told = [f"another path, from step {shared + 1}:"] if shared < len(before) else []
        for number, step in enumerate(steps[shared:], start=shared + 1):
            told += step_lines(step, number, _facts(event) if number == len(steps) else "")
        self.path, self.path_value = event.text, event.value
        return told


def _higher(value: float | None, other: float | None) -> bool:
    return value is not None and (other is None or value > other)


def _facts(event: Event) -> str:
    value = "" if event.value is None else f"value {event.value:+.2f}, "
    return f"  ({value}{event.cost.generated_tokens:,} tokens, {event.cost.seconds:.1f} s)"


def read_steps(text: str) -> list[Step]:
    """Steps of a solution that may not be complete; [] if the text does not follow the grammar."""
    ending = "" if text.endswith(END_OF_ANSWER) else END_OF_ANSWER
    try:
        steps = parse_response(text + ending)
    except ValueError:
        return []
    return steps[:-1] if ending else steps


def step_lines(step: Step, number: int, facts: str = "") -> list[str]:
    """A step for people: what it does and prints, or the answer; `facts` end its first line."""
    if step.kind is StepKind.ANSWER:
        return [f"answer: {printable(step.answer or '-')}{facts}"]
    lines = [f"step {number}{facts}"]
    lines += [f"    {printable(line)}" for line in step.code.splitlines() if line.strip()]
    if step.output is not None:
        first, *rest = printable(step.output).strip("\n").split("\n")
        lines += [f"output: {first}", *(f"        {line}" for line in rest)]
    return lines


def printable(text: str) -> str:
    """The text with control characters, other than line ends and tabs, made visible."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class SolveView:
    """Shows the search while it goes: redrawn in place in a terminal, else added lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._log = PathLog()
        self._last: Event | None = None
        self._live: Live | None = None

    def __enter__(self) -> SolveView:
        if self.console.is_terminal:
            self._live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """A line that stays."""
        say(self.console, text)

    def on_event(self, event: Event) -> None:
        """Show what a method did; see `rollout.methods`."""
        self._last = event
        lines = self._log.lines(event)
        if self._live is None:
            for line in lines:
                say(self.console, line)

    def _render(self) -> Group:
        steps = read_steps(self._log.path)
        lines = [line for n, step in enumerate(steps, start=1) for line in step_lines(step, n)]
        room = max(self.console.height - 4, 4)
        foot = ""
        if self._last is not None:
            cost = self._last.cost
            foot = f"{cost.generated_tokens:,} tokens   {cost.seconds:.0f} s"
            if self._log.best:
                value = self._log.best_value
                shown = "" if value is None else f" (value {value:+.2f})"
                best = printable(self._log.best) + shown
                foot += f"   answers found: {self._log.num_answers}, best: {best}"
        return Group(Text("\n".join(lines[-room:])), Text(foot, style="cyan"))


# -------------------------------------------------------------------------- the result


def result_lines(solved: Solved) -> list[str]:
    """The result for people: the chosen solution, its answer, the runners-up and the cost."""
    result = solved.result
    lines = [""]
    if result.chosen is not None:
        lines.append("solution:")
        for number, step in enumerate(result.chosen.steps, start=1):
            if step.kind is not StepKind.ANSWER:
                lines += step_lines(step, number)
        best, *others = result.ranked
        lines.append(f"answer: {printable(best.answer)}")
        lines.append(f"    {_standing(result, best)}")
        if others:
            lines.append("runners-up:")
            shown = others[:MAX_RUNNERS_UP]
            lines += [f"    {printable(a.answer)}: {_standing(result, a)}" for a in shown]
        if len(others) > MAX_RUNNERS_UP:
            lines.append(f"    and {len(others) - MAX_RUNNERS_UP} more")
    else:
        lines.append("no answer")
    lines += [f"note: {note}" for note in result.notes]
    cost = result.cost
    lines.append(
        f"{result.method}: {cost.generated_tokens:,} generated tokens, {cost.scored_tokens:,} "
        f"tokens valued by the PPM, {cost.seconds:.1f} s after {solved.start_s:.1f} s to start"
    )
    return lines


def _standing(result: SolveResult, answer: RankedAnswer) -> str:
    votes = sum(ranked.votes for ranked in result.ranked)
    value = result.value_of(answer)
    said = "not valued" if value is None else f"value {value:+.3f}"
    share = f"{answer.votes} of {votes} votes, {len(answer.members)} of {len(result.solutions)}"
    if result.method is Method.WEIGHTED_MAJORITY:
        whole = sum(ranked.weight for ranked in result.ranked)
        share = f"weight {answer.weight:.2f} of {whole:.2f}, {share}"
    return f"{said}, {share} solutions"


def as_record(solved: Solved) -> dict[str, Any]:
    """The result as plain data: what `--json` prints."""
    result, config = solved.result, solved.config
    steps = result.chosen.steps if result.chosen is not None else ()
    outputs = [step.output for step in steps if step.output is not None]
    cost = asdict(result.cost)
    return {
        "problem": solved.problem.text,
        "method": result.method.value,
        "answer": result.answer,
        "value": result.value,
        "votes": result.ranked[0].votes if result.ranked else 0,
        "steps": [
            {"kind": step.kind.value, "text": step.text, "code": step.code, "output": step.output}
            for step in steps
        ],
        "output": outputs[-1] if outputs else None,
        "answers": [
            {
                "answer": ranked.answer,
                "votes": ranked.votes,
                "weight": ranked.weight,
                "solutions": len(ranked.members),
                "value": result.value_of(ranked),
            }
            for ranked in result.ranked
        ],
        "num_solutions": len(result.solutions),
        "notes": list(result.notes),
        **cost,
        "start_seconds": solved.start_s,
        "settings": config.method.model_dump(mode="json"),
        "seed": config.seed,
        "policy": str(config.policy),
        "ppm": str(config.ppm) if config.ppm is not None else None,
    }


async def run_solve(problem: str, *, as_json: bool = False, **given: Any) -> None:
    """`rstar solve`: print how the answer is found and the result, or one JSON object.

    Args:
        problem: as `read_problem` takes it.
        as_json: stdout gets the JSON object and nothing else; everything else goes to stderr.
        given: what `asked_config` takes.
    Raises:
        As `read_problem`, `asked_config` and `solve`.
    """
    asked = read_problem(problem, sys.stdin)
    stdout = stdout_for_result() if as_json else contextlib.nullcontext(sys.stdout)
    with stdout as out, tempfile.TemporaryDirectory(prefix="rstar-solve-") as scratch:
        settings = solve_config(Path(scratch), **given)
        console = Console(stderr=as_json)
        solved = await solve(settings, asked, SolveView(console))
        if as_json:
            out.write(json.dumps(as_record(solved)) + "\n")
        else:
            for line in result_lines(solved):
                say(console, line)


@contextlib.contextmanager
def stdout_for_result() -> Iterator[TextIO]:
    """Keep stdout for what is written to the stream this yields; all else goes to stderr.

    Also on the level of file descriptors: processes that are started meanwhile inherit them.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream,
        ):
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)
