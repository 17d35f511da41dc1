"""Models that are named on the command line, not made by the run."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cluster.engines.model_check import check_policy_checkpoint, check_untrained_policy
from cluster.fleet.config import GivenModelsConfig, ServingConfig
from cluster.fleet.fleet import Fleet
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import MARKED_BASE, RunFolder
from cluster.folder.staging import at_hand
from learner.checkpoint import (
    Checkpoint,
    Kind,
    checkpoint_directory,
    directory_digest,
    read_prompt_template,
)
from learner.markers import with_markers
from rollout.prompt import TEMPLATES
from rollout.run_store import absolute
from rollout.search import SearchConfig
from rollout.worked_examples import check_examples

G = TypeVar("G", bound=GivenModelsConfig)


def with_checkpoint_directories(config: G) -> G:
    """The config with `.../round=R/policy` folders replaced by the checkpoint published there."""
    found = {
        name: checkpoint_directory(path)
        for name in ("policy", "ppm")
        if (path := getattr(config, name)) is not None
    }
    return config.model_copy(update=found)


def with_prompt_template(config: G) -> G:
    """The config with the template the policy was trained with, unless one was asked for.

    Raises:
        ConfigError: the checkpoint names a template this version does not know.
    """
    if config.policy is None or "template" in config.search.model_fields_set:
        return config
    name = read_prompt_template(config.policy)
    if name is None:
        return config
    if name not in TEMPLATES:
        raise ConfigError(
            f"{config.policy}: trained with prompt template {name!r}, expected one of "
            f"{', '.join(TEMPLATES)}; choose with --set search.template=..."
        )
    search = config.search.model_copy(update={"template": name})
    return config.model_copy(update={"search": search})


def with_policy_form(config: G) -> G:
    """The config for its policy as it is: unmarked under a template that shows worked examples.

    A model that was never fine-tuned on the step markers reads and writes them as plain text.

    Raises:
        ModelCheckError: policy and template do not go together; says what does.
    """
    shows_examples = config.search.prompt_template.repairs
    if config.policy is not None:
        check = check_untrained_policy if shows_examples else check_policy_checkpoint
        check(at_hand(config.policy))
    if not shows_examples:
        return config
    check_own_examples(config)
    engine = config.policy_engine.model_copy(update={"step_markers": False})
    tokenizer = config.policy_tokenizer
    search = with_chat_turns(config.search, tokenizer and at_hand(tokenizer))
    return config.model_copy(update={"policy_engine": engine, "search": search})


def with_chat_turns(search: SearchConfig, policy: Path | None) -> SearchConfig:
    """The search with its worked examples as turns of the policy's chat template, if it wants so.

    Args:
        policy: folder with its tokenizer.
    Raises:
        ConfigError: there is none, or none with a chat template that keeps the text.
    """
    shown = search.bootstrap
    if shown is None or not shown.chat or shown.text is not None:
        return search
    if policy is None:
        raise ConfigError(
            "search.bootstrap.chat: give endpoint.tokenizer, a folder with the tokenizer of the "
            "endpoint's model"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{policy}: no tokenizer for search.bootstrap.chat: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"{policy}: search.bootstrap.chat: its tokenizer has no chat template")
    text = chat_prompt(tokenizer, shown.turns(), where=policy)
    return search.model_copy(update={"bootstrap": shown.model_copy(update={"text": text})})


def chat_prompt(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, where: Path) -> str:
    """A conversation up to where the assistant begins, as the text that a completion goes on from.

    Args:
        turns: {question} stands in the last one.
    Raises:
        ConfigError: the chat template does not keep the text.
    """
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    if any(turn["content"] not in text for turn in turns):
        raise ConfigError(f"{where}: its chat template does not keep the text of the turns")
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("x").input_ids[0] == tokenizer.bos_token_id:
        text = text.removeprefix(begin)  # the tokenizer puts it there itself
    return text


def check_own_examples(config: ServingConfig) -> None:
    """Run and grade the worked examples of the config, if it has its own.

    Raises:
        ExampleError: one is wrong; names it.
    """
    if config.search.bootstrap is not None:
        check_examples(config.search.bootstrap, config.sandbox.limits, config.sandbox.isolation)


def form_note(config: GivenModelsConfig) -> str:
    """One line for people about a policy that is served unmarked; "" if it is not."""
    if config.policy is None or config.policy_engine.step_markers:
        return ""
    return f"{config.policy}: served as it is; step markers are plain text, shown by examples"


async def serve_given(fleet: Fleet, config: GivenModelsConfig, *, preference: bool) -> None:
    """Start the fleet with the models that are named: the policy, if there is one, and the PPM.

    Args:
        preference: False: the PPM is not needed.
    """
    version = ""
    if config.policy is not None:
        version = (await given_checkpoint("policy", config.policy)).version
    await fleet.start(config.policy, version=version, learner=False)
    if preference and config.ppm is not None:
        ppm = await given_checkpoint("ppm", config.ppm)
        await fleet.attempts("start of the PPM", lambda: fleet.serve_preference(ppm))


async def given_checkpoint(kind: Kind, path: Path) -> Checkpoint:
    """A checkpoint named on the command line; its version is its digest, of gigabytes to read."""
    digest = await asyncio.to_thread(lambda: directory_digest(at_hand(path)))
    return Checkpoint(kind=kind, round=0, path=absolute(path), digest=digest)


def marked(model: Path, folder: RunFolder, name: str = MARKED_BASE) -> Path:
    """A model whose tokenizer holds the step markers: itself, or one of a name in the run."""
    place = folder.place(name)
    if folder.store.local is not None:
        return with_markers(at_hand(model), place)
    if folder.store.exists(f"{name}/config.json"):
        return place
    here = at_hand(model)
    with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
        made = with_markers(here, Path(scratch) / "marked")
        if made == here:
            return model
        folder.store.upload(made, name, last="config.json")
    return place
