"""Experiment trackers as the follower of a run sees them: TensorBoard, MLflow, Weights & Biases.

One run here is one run there, however often it is started: it is found again by the run's id
(`run.id`). Where a server is and who may write to it stands in the environment that each tracker's
own client reads, never in a config, which is stored with the run. Whatever goes wrong here raises;
`cluster.telemetry.tracking` tells it once and tries again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

PROJECT = "rstar"
"""Experiment or project where the environment names none."""

TENSORBOARD_FOLDER = "tensorboard"
"""Under the run."""

_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_MLFLOW_BATCH = 500
_MLFLOW_VALUE = 500
"""Entries of a request, characters of a parameter: what every server takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Numbers of one moment."""

    axis: str
    """What `step` counts: "round", or "policy" and "ppm" for optimiser steps of all rounds."""
    step: int
    values: Mapping[str, float]
    """By name, with slashes."""


class Tracker(Protocol):
    """One run in one tracker."""

    link: str
    """Where a person finds it."""

    def log(self, points: Sequence[Point]) -> None: ...

    def file(self, name: str, data: bytes) -> None:
        """Keep a file of the run, in place of the one of that name."""

    def flush(self) -> None: ...

    def close(self, state: str) -> None:
        """Nothing is told any more for now; state is as in `cluster.telemetry.live`."""


def check_trackers(names: Sequence[str]) -> None:
    """Before a run begins: what it is asked to tell can be reached from here.

    Raises:
        ConfigError: a tracker is unknown, its package is missing, or its server is not named.
    """
    for name in names:
        if name not in get_args(TrackerName):
            known = ", ".join(get_args(TrackerName))
            raise ConfigError(f"tracking: no tracker {name!r}; there are {known}")
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(
                f"tracking: {name} is not installed here: pip install 'rstar-cluster[{name}]'"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "tracking: mlflow needs its server in the environment, as "
            "MLFLOW_TRACKING_URI=http://mlflow:5000"
        )


def open_tracker(
    name: str, folder: RunFolder, run_id: str, title: str, config: Mapping[str, Any]
) -> Tracker:
    """Find the run in a tracker, or begin it there.

    Args:
        config: of the run.
    Raises:
        Exception: any of the tracker's client.
    """
    if name == "tensorboard":
        return TensorBoard(folder)
    flat = flatten(config, numbers=False)
    if name == "mlflow":
        return MlFlow(folder, run_id, title, flat)
    return WeightsAndBiases(folder, run_id, title, flat)


def flatten(record: Any, prefix: str = "", *, numbers: bool = True) -> dict[str, Any]:
    """Leaves of nested mappings by their path, as "totals/trees".

    Args:
        numbers: only finite numbers, as floats; lists are left out. Else everything, as text,
            with lists as a whole and dots in paths.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{'/' if numbers else '.'}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            found |= flatten(value, name, numbers=numbers)
        elif not numbers:
            found[name] = str(value)
        elif isinstance(value, (int, float)) and abs(value) < float("inf"):
            found[name] = float(value)
    return found


class TensorBoard:
    """Event files in the run's folder; of a run on a bucket, made here and uploaded."""

    def __init__(self, folder: RunFolder) -> None:
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        where = folder.store.local
        if where is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="rstar-")
            where = Path(self._scratch.name)
        self._where = where / TENSORBOARD_FOLDER
        self._writer = SummaryWriter(str(self._where))
        self._files = 0
        self.link = f"tensorboard --logdir {folder.at(TENSORBOARD_FOLDER)}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step)

    def file(self, name: str, data: bytes) -> None:
        """Texts and pictures; of a page there is no such thing."""
        kind = name.rpartition(".")[2]
        self._files += 1
        if kind == "png":
            import io

            import numpy as np
            from PIL import Image

            picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            self._writer.add_image(name, picture, self._files, dataformats="HWC")
        elif kind in ("yaml", "csv", "md"):
            text = data.decode(errors="replace")
            shown = text if kind == "md" else "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(name, shown, self._files)

    def flush(self) -> None:
        self._writer.flush()
        if self._scratch is not None:
            self._folder.store.upload(self._where, TENSORBOARD_FOLDER)

    def close(self, state: str) -> None:
        self._writer.close()
        if self._scratch is not None:
            self._folder.store.upload(self._where, TENSORBOARD_FOLDER)
            self._scratch.cleanup()


class MlFlow:
    """A run of an MLflow server, named by `MLFLOW_TRACKING_URI`."""

    def __init__(
        self, folder: RunFolder, run_id: str, title: str, config: Mapping[str, str]
    ) -> None:
        # A server that is gone is asked again by who calls, later.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag, ViewType

        server = os.environ["MLFLOW_TRACKING_URI"]
        self._client = client = MlflowClient(tracking_uri=server)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else client.create_experiment(name)
        tag = "rstar.run_id"
        found = client.search_runs([where], f"tags.`{tag}` = '{run_id}'", ViewType.ALL)
        run = found[0] if found else client.create_run(where, run_name=title, tags={tag: run_id})
        self._run = run.info.run_id
        client.update_run(self._run, status="RUNNING")
        known = run.data.params  # written once there: what was changed since stands in config.yaml
        params = [Param(_plain(k), v[:_MLFLOW_VALUE]) for k, v in config.items()]
        params = [param for param in params if param.key not in known]
        for at in range(0, len(params), 100):
            client.log_batch(self._run, params=params[at : at + 100])
        client.log_batch(self._run, tags=[RunTag("rstar.run_dir", folder.store.root)])
        self.link = f"{server.rstrip('/')}/#/experiments/{where}/runs/{self._run}"

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [
            Metric(_plain(name), value, now_ms, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for at in range(0, len(rows), _MLFLOW_BATCH):
            self._client.log_batch(self._run, metrics=rows[at : at + _MLFLOW_BATCH])

    def file(self, name: str, data: bytes) -> None:
        folder, _, last = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
            path = Path(scratch) / last
            path.write_bytes(data)
            self._client.log_artifact(self._run, str(path), folder or None)

    def flush(self) -> None:
        """Every call is answered."""

    def close(self, state: str) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED"}.get(state, "KILLED")
        self._client.set_terminated(self._run, status=status)


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_API_KEY`, `WANDB_PROJECT`, `WANDB_MODE` and so on."""

    def __init__(
        self, folder: RunFolder, run_id: str, title: str, config: Mapping[str, str]
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        local = folder.store.local
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run_id,
            name=title,
            resume="allow",
            config=dict(config),
            dir=os.environ.get("WANDB_DIR") or (str(local) if local is not None else None),
            settings=wandb.Settings(disable_git=True, save_code=False, x_disable_stats=True),
        )
        for axis in ("round", "policy/step", "ppm/step"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="round")
        for kind in ("policy", "ppm"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        self.link = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            axis = point.axis if point.axis == "round" else f"{point.axis}/step"
            self._run.log({**point.values, axis: point.step})

    def file(self, name: str, data: bytes) -> None:
        kind = "table" if name.endswith(".csv") else "report"
        artifact = self._wandb.Artifact(f"{self._run.id}-{_plain(name, '-')}", type=kind)
        with artifact.new_file(name.rpartition("/")[2], mode="wb") as file:
            file.write(data)
        self._run.log_artifact(artifact)

    def flush(self) -> None:
        """It has a process of its own, which sends what it was given."""

    def close(self, state: str) -> None:
        self._run.finish(exit_code=int(state != "finished"))


def _plain(name: str, other: str = "_") -> str:
    """A name of letters that every server takes."""
    return re.sub(r"[^\w\-./]" if other == "_" else r"[^\w\-.]", other, name)
