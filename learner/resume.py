"""What a fit that was cut off goes on from: DeepSpeed's states and how far they reach.

    checkpoints/round=R/KIND/.resume/FIT/step=N/     each rank's states, written by DeepSpeed
    checkpoints/round=R/KIND/.resume/FIT/STATE.json  names the step that is whole

FIT is a fingerprint of everything the training depends on, with the number of ranks: another
request or other data finds nothing and starts over. Another number of ranks is refused: DeepSpeed
cuts the optimiser's states by it, and starting over would throw away what the first ranks did
without a word. STATE.json is replaced only after every rank has written, and the older step is
removed after that, so at any moment what it names is there. The folder goes when the fit is
published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.fit import FitRequest, LearnerError
from rollout.files import atomic_write

STATE_FILE = "STATE.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitState:
    """How far an attempt came."""

    step: int
    """Optimiser steps that are done."""
    losses: list[float]
    """[step]."""
    grad_norms: list[float]
    """[step], or empty where they are not known."""
    seconds: float
    """Spent on these steps, over all attempts."""

    @property
    def tag(self) -> str:
        """Name of the folder that holds the states."""
        return f"step={self.step}"


def fingerprint(request: FitRequest, data_digest: str | None) -> str:
    """sha256 over everything the weights depend on, but the number of ranks."""
    config = request.config.model_dump(mode="json")
    for name in ("gate", "save_every_steps", "peak_tflops", "num_threads"):
        del config[name]
    facts = {
        "kind": request.kind,
        "round": request.round,
        "base": str(Path(request.base).absolute()),
        "data": data_digest or str(Path(request.data).absolute()),
        "config": config,
        "seed": request.seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ResumeFolder:
    """The states of one fit, on a file system all ranks see."""

    def __init__(self, folder: Path, fit: str, *, world_size: int) -> None:
        """
        Args:
            folder: of the round and kind, in the checkpoint store.
            fit: fingerprint.
        """
        self._all = folder / ".resume"
        self._fit = fit[:16]
        self._world_size = world_size
        self.path = self._all / f"{self._fit}-ranks={world_size}"

    def read(self) -> FitState | None:
        """The state to go on from; None if there is none that is whole.

        Raises:
            LearnerError: another number of ranks came further with this fit.
        """
        own = _read(self.path)
        for path in self._all.glob(f"{self._fit}-ranks=*"):
            other = _read(path)
            if other is not None and other.step > (own.step if own is not None else 0):
                ranks = path.name.rpartition("=")[2]
                raise LearnerError(
                    f"it was cut off at step {other.step} with {ranks} ranks and can only go on "
                    f"with as many, not with {self._world_size}: DeepSpeed's states are cut by "
                    f"the number of ranks. Set learner.replicas (cluster.learner.replicas of a "
                    f"run) to {ranks}, or remove {path} to start it over"
                )
        return own

    def commit(self, state: FitState) -> None:
        """Name the step all ranks have written; older ones go."""
        atomic_write(self.path / STATE_FILE, json.dumps(asdict(state)), durable=True)
        for other in self.path.glob("step=*"):
            if other.name != state.tag:
                shutil.rmtree(other, ignore_errors=True)

    def drop(self, tag: str) -> None:
        """Remove a state that could not be written whole, and give its room back."""
        shutil.rmtree(self.path / tag, ignore_errors=True)

    def clear(self) -> None:
        """Remove the states of all fits of this round and kind."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._all)


def _read(path: Path) -> FitState | None:
    try:
        state = FitState(**json.loads((path / STATE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return state if (path / state.tag).is_dir() else None
