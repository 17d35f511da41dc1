"""What a fit that was cut off goes on from: DeepSpeed's states and how far they reach.

    checkpoints/round=R/KIND/.resume/FIT/step=N/     each rank's states, written by DeepSpeed
    checkpoints/round=R/KIND/.resume/FIT/STATE.json  names the step that is whole

FIT is a fingerprint of everything the training depends on, with the number of ranks: another
request or other data finds nothing and starts over. Another number of ranks is refused: DeepSpeed
cuts the optimiser's states by it, and starting over would throw away what the first ranks did
without a word. STATE.json is replaced only after every rank has written, and the older step is
removed after that, so at any moment what it names is there. The folder goes when the fit is
published. On a bucket the states of each machine's ranks are uploaded before STATE.json is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.fit import FitRequest, LearnerError
from rollout.run_store import STREAMS, RunStore, absolute

FOLDER = ".resume"
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
        "base": request.origins.get(request.base) or absolute(request.base),
        "data": data_digest or absolute(request.data),
        "config": config,
        "seed": request.seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ResumeFolder:
    """The states of one fit, in the run's store.

    DeepSpeed writes and reads files: on a bucket those of each machine's ranks are in a folder of
    that machine, `path`, and the first of them uploads what is there (`keep`) and fetches it.
    """

    def __init__(self, home: RunStore, fit: str, *, world_size: int) -> None:
        """
        Args:
            home: of the round and kind, in the checkpoint store.
            fit: fingerprint.
        """
        self._home = home
        self._fit = fit[:16]
        self._world_size = world_size
        self._name = f"{FOLDER}/{self._fit}-ranks={world_size}"
        scratch = Path(tempfile.gettempdir()) / f"rstar-fit-{fit}"
        self.path = (home.local or scratch) / self._name

    @property
    def _is_remote(self) -> bool:
        return self._home.local is None

    def read(self) -> FitState | None:
        """The state to go on from; None if there is none that is whole.

        Raises:
            LearnerError: another number of ranks came further with this fit.
        """
        own = self._read(self._name)
        for name in self._home.folders(FOLDER):
            if not name.startswith(f"{self._fit}-ranks="):
                continue
            other = self._read(f"{FOLDER}/{name}")
            if other is not None and other.step > (own.step if own is not None else 0):
                ranks = name.rpartition("=")[2]
                raise LearnerError(
                    f"it was cut off at step {other.step} with {ranks} ranks and can only go on "
                    f"with as many, not with {self._world_size}: DeepSpeed's states are cut by "
                    f"the number of ranks. Set learner.replicas (cluster.learner.replicas of a "
                    f"run) to {ranks}, or remove {self._home.root}/{FOLDER}/{name} to start it over"
                )
        return own

    def keep(self, tag: str) -> None:
        """Have what this machine's ranks wrote in the store; once a machine, before `commit`."""
        if self._is_remote:
            self._home.upload(self.path / tag, f"{self._name}/{tag}")
            self._drop_others(tag)

    def fetch(self, tag: str) -> None:
        """Have a state at hand in `path`; once a machine."""
        if self._is_remote:
            source = self._home.below(f"{self._name}/{tag}")
            with ThreadPoolExecutor(STREAMS) as threads:
                found = source.below_all("")
                list(threads.map(lambda file: source.fetch(file, self.path / tag / file), found))

    def commit(self, state: FitState) -> None:
        """Name the step all ranks have written; older ones go."""
        record = json.dumps(asdict(state)).encode()
        self._home.put(f"{self._name}/{STATE_FILE}", record)
        for name in self._home.folders(self._name):
            if name != state.tag:
                self._home.delete_folder(f"{self._name}/{name}")

    def drop(self, tag: str) -> None:
        """Remove a state that could not be written whole, and give its room back."""
        shutil.rmtree(self.path / tag, ignore_errors=True)

    def clear(self) -> None:
        """Remove the states of all fits of this round and kind."""
        self._home.delete_folder(FOLDER)

    def leave(self) -> None:
        """Give back what this machine has of them on the way to a bucket; once a machine."""
        if self._is_remote:
            shutil.rmtree(self.path, ignore_errors=True)

    def _drop_others(self, tag: str) -> None:
        for other in self.path.glob("step=*"):
            if other.name != tag:
                shutil.rmtree(other, ignore_errors=True)

    def _read(self, name: str) -> FitState | None:
        try:
            state = FitState(**json.loads(self._home.read(f"{name}/{STATE_FILE}")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return state if self._home.exists(f"{name}/{state.tag}") else None
