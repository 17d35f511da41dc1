"""The models of a server: started with it, and renewed in place while it answers.

    given, or of a run --start--> engines --renew--> new weights in the same engines
                                            ^ no search is in hand; requests wait

A search is done by one policy and one PPM. So for a new checkpoint the service begins no search,
lets those in hand end (for `serve.stop_s`; what is left then goes on with the new weights), has the
engines load it, and goes on. A checkpoint that cannot be served leaves the old one in service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.engines.model_check import (
    ModelCheckError,
    check_policy_checkpoint,
    check_preference_checkpoint,
)
from cluster.fleet.fleet import Fleet
from cluster.fleet.given_models import (
    form_note,
    given_checkpoint,
    serve_given,
    with_policy_form,
)
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.solve import models_of_run
from cluster.serve.config import ServeConfig
from cluster.serve.service import Engines, Service
from learner.checkpoint import CheckpointError, read_prompt_template
from rollout.engine import EngineError
from verifier.verify import start_symbolic_worker

logger = logging.getLogger(__name__)

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """Directories of a policy and its PPM."""

    policy: Path
    ppm: Path | None


class ServedModels:
    """What a fleet serves, and how it is renewed."""

    def __init__(self, config: ServeConfig, fleet: Fleet, service: Service, note: Note) -> None:
        """
        Args:
            config: as the fleet was started with; `self.config` is what holds now.
        """
        self.config = config
        self._fleet = fleet
        self._service = service
        self._note = note
        self._renewing = asyncio.Lock()
        self._refused: Pair | None = None
        """What was found last and could not be served."""

    @property
    def pair(self) -> Pair:
        return Pair(self.config.policy, self.config.ppm)

    def why_not_ready(self) -> str:
        """Which kind of actor there is none of; "" if searches can begin."""
        wanted = ["policy", "sandbox", *(["ppm"] if self.config.ppm is not None else [])]
        missing = [name for name in wanted if not self._fleet.pools.handles(name)]
        return f"no {' and no '.join(missing)} actor serves" if missing else ""

    async def renew(self, run: Path | None, *, look: bool = False) -> bool:
        """Serve the newest pair; True if another one is served than before.

        Args:
            run: whose newest promoted pair is wanted; None: what now lies where the given one did.
            look: only by where they lie, which is free; else by what they hold.
        """
        async with self._renewing:
            pair = self.pair
            try:
                if run is not None:
                    pair = Pair(*await asyncio.to_thread(models_of_run, run))
                if look and pair in (self.pair, self._refused):
                    return False
                return await self._serve(pair)
            except (
                CheckpointError,
                ConfigError,
                EngineError,
                ModelCheckError,
                OSError,
                RunFolderError,
            ) as error:
                self._refused = pair
                self._note(f"no other checkpoint is served: {error}")
                logger.warning("A checkpoint was not taken: %s", error)
                return False

    async def _serve(self, pair: Pair) -> bool:
        marked = self.config.policy_engine.step_markers
        if marked:
            await asyncio.to_thread(check_policy_checkpoint, pair.policy)
        template, own = read_prompt_template(pair.policy), self.config.search.template
        if template not in (None, own):
            raise ConfigError(
                f"{pair.policy}: trained with prompt template {template!r}, and this server asks "
                f"with {own!r}; start it anew"
            )
        policy = await given_checkpoint("policy", pair.policy)
        ppm = None
        if pair.ppm is not None:
            await asyncio.to_thread(check_preference_checkpoint, pair.ppm)
            ppm = await given_checkpoint("ppm", pair.ppm)
        keepers = self._fleet.pools.keepers
        wanted = {"policy": policy.version, **({"ppm": ppm.version} if ppm is not None else {})}
        served = {name: keepers[name].kind.version for name in wanted if name in keepers}
        config = self.config.model_copy(update={"policy": pair.policy, "ppm": pair.ppm})
        if wanted == served:
            self.config = config
            return False
        self._note(f"taking {' and '.join(wanted.values())}; requests wait")
        async with self._service.held(self.config.serve.stop_s):
            await self._fleet.serve_policy(pair.policy, policy, marked=marked)
            if ppm is not None:
                await self._fleet.serve_preference(ppm)
                if self._service.engines.preference is None:
                    self._service.engines = engines_of(self._fleet, config)
            self.config = config
        self._note(f"{' and '.join(wanted.values())} served")
        return True


def engines_of(fleet: Fleet, config: ServeConfig) -> Engines:
    """The fleet's pools as a search takes them."""
    return Engines(
        policy=fleet.policy,
        preference=fleet.preference if config.ppm is not None else None,
        sandbox=fleet.sandbox,
    )


@asynccontextmanager
async def started(
    config: ServeConfig, note: Note, folder: RunFolder | None = None
) -> AsyncIterator[tuple[ServedModels, Service, Fleet]]:
    """Engines and a service over them; ended with the block.

    Args:
        folder: that is held, so that what an earlier server has left can be taken over.
    Raises:
        ModelCheckError: a directory is not the model it should be; before anything starts.
        EngineError: too few actors started.
    """
    config = with_policy_form(config)
    if said := form_note(config):
        note(said)
    if config.ppm is not None:
        check_preference_checkpoint(config.ppm)
    fleet = Fleet(config, folder or RunFolder(config.run_dir))
    fleet.note = note
    try:
        await serve_given(fleet, config, preference=config.ppm is not None)
        # A symbolic question that has to wait for its process would end undecided.
        await asyncio.to_thread(start_symbolic_worker)
        service = Service(engines_of(fleet, config), config.serve)
        service.scale(len(fleet.pools.handles("policy")))
        yield ServedModels(config, fleet, service, note), service, fleet
    finally:
        await fleet.stop(note)
