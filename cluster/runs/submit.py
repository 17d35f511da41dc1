"""A run as a job of a Ray cluster's job server: `rstar submit`, `rstar job`.

    here: config, checked --> working directory --http--> job server of the head
                              run.yaml, problem files        |
    rstar job status | logs | stop ID <----------------------+--> rstar evolve run.yaml --restarts N

Nothing here needs a Ray of its own, nor the cluster's network besides the dashboard's port: a
laptop will do, and may be closed. The job's id is made of the run's folder, so the same run has the
same id at each submission; one that has ended is replaced, one that goes on is an error.

What is uploaded: the whole config with its overrides as `run.yaml`, problem files that it names by
a relative path, and with `code` this checkout's packages, which then run in place of those
installed there. Models and run_dir are named as the cluster's machines see them.

A job that is stopped gets `STOP_WAIT_S` to drain (Ray's own 3 s kill a driver that has not saved
its trees yet).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from cluster.folder.config_file import ConfigError, load_config
from cluster.folder.machine import COMMAND_VARIABLE
from cluster.telemetry.progress import say
from rollout.run_store import address_of

if TYPE_CHECKING:
    from cluster.runs.config import RunConfig

STOP_WAIT_S = 120
"""Between the SIGTERM that stops a job and its SIGKILL."""

MAX_UPLOAD_BYTES = 100 * 2**20

CONFIG_FILE = "run.yaml"
CODE = ("cluster", "learner", "rollout", "verifier")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Of Ray's own, for the same thing."""


class SubmitError(RuntimeError):
    """The job server cannot be asked, or has no such job; the message says why."""


def submit(
    config: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    address: str | None,
    env: Sequence[str] = (),
    restarts: int,
    code: bool = False,
    force: bool = False,
) -> str:
    """Send a run to a cluster, and return its id.

    Args:
        address: of the cluster's dashboard, as http://head:8265; None: as Ray's environment says.
        env: NAME=VALUE for every process of the run, or NAME with the value it has here.
        restarts: starts after failures of the driver in a row.
        force: promote checkpoints that the gate holds back.
    Raises:
        ConfigError: the config cannot be used, or not on a cluster.
        SubmitError: the server cannot be asked, or the run goes on already.
    """
    from cluster.runs.config import RunConfig  # which every command would wait for

    settings = load_config(config, [*_on_the_cluster(overrides)], kind=RunConfig)
    name = job_id(settings.run_dir)
    # Without `env`, which may hold secrets: it is written down as what goes on with the run.
    typed = ["rstar", "submit", str(config), *(part for o in overrides for part in ("--set", o))]
    variables = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        COMMAND_VARIABLE: shlex.join(typed),
        **dict(map(_variable, env)),
    }
    command = ["python", "-m", "cluster", "evolve", CONFIG_FILE, "--restarts", str(restarts)]
    with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
        fill(Path(scratch), settings, code=code)
        address = send(
            name,
            shlex.join([*command, *(["--force"] if force else [])]),
            Path(scratch),
            address=address,
            env=variables,
            metadata={"run_dir": str(settings.effective()["run_dir"]), "name": settings.name},
        )
    say(console, f"submitted {name} to {address}: run in {settings.effective()['run_dir']}")
    for verb in ("status", "logs", "stop"):
        say(console, f"  rstar job {verb} {name} --address {address}")
    return name


def send(
    name: str,
    command: str,
    directory: Path,
    *,
    address: str | None,
    env: Mapping[str, str],
    metadata: Mapping[str, str],
) -> str:
    """Upload a directory and run a command in it, under an id that no job uses that goes on.

    Returns:
        Where it was sent.
    Raises:
        SubmitError: the server cannot be asked, or such a job goes on.
    """
    with _server(address) as (client, url):
        for job in client.list_jobs():
            if job.submission_id != name:
                continue
            if not job.status.is_terminal():
                raise SubmitError(
                    f"job {name} is {job.status} already; stop it first: rstar job stop {name}"
                )
            client.delete_job(name)
        client.submit_job(
            entrypoint=command,
            submission_id=name,
            runtime_env={"working_dir": str(directory), "env_vars": dict(env)},
            metadata=dict(metadata),
        )
        return url


def show_jobs(console: Console, *, address: str | None) -> None:
    """Print the submitted jobs of a cluster, newest first.

    Raises:
        SubmitError: the server cannot be asked.
    """
    with _server(address) as (client, _):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        run = (job.metadata or {}).get("run_dir", "")
        say(console, f"{job.submission_id}  {job.status}  {_moment(job.start_time)}  {run}")
    if not jobs:
        say(console, "no jobs")


def show_job(name: str, console: Console, *, address: str | None) -> None:
    """Print how a job stands.

    Raises:
        SubmitError: the server cannot be asked, or has no such job.
    """
    with _server(address, name) as (client, _):
        job = client.get_job_info(name)
    lines = [f"{name}: {job.status}, submitted {_moment(job.start_time)}"]
    if job.end_time:
        lines[0] += f", ended {_moment(job.end_time)}"
    if job.driver_exit_code is not None:
        lines[0] += f", exit status {job.driver_exit_code}"
    lines.append(f"command: {job.entrypoint}")
    run = (job.metadata or {}).get("run_dir")
    if run:
        lines.append(f"run: {run} (from a machine that sees it: rstar status {run})")
    lines.append(str(job.message or "").partition("\n")[0])
    for line in filter(None, lines):
        say(console, line)


def show_job_logs(name: str, console: Console, *, address: str | None, follow: bool) -> None:
    """Print what a job's driver has printed; with `follow` until it ends.

    Raises:
        SubmitError: the server cannot be asked, or has no such job.
    """
    with _server(address, name) as (client, _):
        if not follow:
            console.file.write(client.get_job_logs(name))
            return

        async def tail() -> None:
            async for text in client.tail_job_logs(name):
                console.file.write(text)
                console.file.flush()

        asyncio.run(tail())


def stop_job(name: str, console: Console, *, address: str | None, wait: bool = True) -> None:
    """Have a job's driver drain and end; started again where it was by another `rstar submit`.

    Args:
        wait: until it has ended.
    Raises:
        SubmitError: the server cannot be asked, or has no such job.
    """
    with _server(address, name) as (client, _):
        if not client.stop_job(name):
            say(console, f"{name}: {client.get_job_status(name)} already")
            return
        say(console, f"{name}: told to drain, for which it has {STOP_WAIT_S} s")
        while wait and not client.get_job_status(name).is_terminal():
            time.sleep(1.0)
        say(console, f"{name}: {client.get_job_status(name)}")


def job_id(run_dir: str | os.PathLike[str]) -> str:
    """Of the run in a folder, the same each time."""
    place = address_of(run_dir) or str(run_dir)
    last = re.sub(r"[^A-Za-z0-9-]+", "-", place.rstrip("/").rpartition("/")[2]).strip("-")
    return f"rstar-{last[:40]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def fill(directory: Path, config: RunConfig, *, code: bool) -> None:
    """Put what a job needs of this machine into its working directory.

    Raises:
        ConfigError: a file is not here, or all of them are too large to upload.
    """
    text = yaml.safe_dump(config.effective(), sort_keys=False)
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    problems = config.problems
    given: dict[str, Sequence[Path | None]] = {
        "train": problems.train,
        "test": [problems.test],
        "pairs": [problems.pairs],
        "demonstrations": [problems.demonstrations],
    }
    for key, paths in given.items():
        for path in paths:
            if path is None or path.is_absolute() or address_of(path) is not None:
                continue
            if not path.is_file() or ".." in path.parts:
                raise ConfigError(
                    f"problems.{key}: {path} is no file below this folder; give what the cluster's "
                    "machines see (an absolute path or a bucket), or a relative path to upload"
                )
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / path)
    models: dict[str, Any] = {
        "models.base_model": config.models.base_model,
        "models.ppm_trunk": config.models.ppm_trunk,
        "endpoint.tokenizer": config.endpoint and config.endpoint.tokenizer,
    }
    for key, model in models.items():
        if isinstance(model, Path) and not model.is_absolute() and address_of(model) is None:
            raise ConfigError(
                f"{key}: {model} is relative; models are not uploaded, give an absolute path or a "
                "bucket that the cluster's machines see"
            )
    if code:
        for package in CODE:
            shutil.copytree(
                Path(__file__).parents[2] / package,
                directory / package,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    if size > MAX_UPLOAD_BYTES:
        raise ConfigError(
            f"{size / 2**20:,.0f} MiB would be uploaded, at most {MAX_UPLOAD_BYTES / 2**20:.0f} "
            "are; lay problem files where the cluster's machines see them and name them so"
        )


def _on_the_cluster(overrides: Sequence[str]) -> Iterator[str]:
    """A job's Ray is the cluster's, unless it is said otherwise."""
    if not any(override.startswith("cluster.address=") for override in overrides):
        yield "cluster.address=auto"
    yield from overrides


def _variable(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError(f"--env {given}: not set here; give {name}=VALUE")
    return name, value if equals else os.environ[name]


@contextlib.contextmanager
def _server(address: str | None, name: str = "") -> Iterator[tuple[Any, str]]:
    """A client of the job server, and its address; what it raises becomes a `SubmitError`."""
    url = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise SubmitError(f"{url}: expected the dashboard's address, as http://head:8265")
    token = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(name in os.environ for name in token) or (Path.home() / ".ray/auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray looks
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(url)
    except Exception as error:  # of requests, of Ray's tokens, of versions that do not match
        if "uthenticat" in str(error) or "orbidden" in str(error):
            raise SubmitError(
                f"{url}: {_first_line(error)}; the cluster's token is looked for in RAY_AUTH_TOKEN "
                "and ~/.ray/auth_token (ray get-auth-token on its head shows it)"
            ) from error
        raise SubmitError(f"no job server answers at {url}: {_first_line(error)}") from error
    try:
        yield client, url
    except RuntimeError as error:
        if isinstance(error, SubmitError):
            raise
        if name and "does not exist" in str(error):
            raise SubmitError(f"{url} has no job {name}; rstar job list shows all") from error
        raise SubmitError(f"{url}: {_first_line(error)}") from error
    except OSError as error:  # requests' own are of this kind
        raise SubmitError(f"the job server at {url} went away: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _moment(unix_ms: int | None) -> str:
    when = time.localtime((unix_ms or 0) / 1000)
    return time.strftime("%Y-%m-%d %H:%M:%S", when) if unix_ms else "not yet"
