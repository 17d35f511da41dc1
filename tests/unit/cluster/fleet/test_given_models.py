"""A policy is served as what it is: with step markers as tokens, or as plain text."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from cluster.engines.model_check import ModelCheckError
from cluster.fleet import given_models
from cluster.fleet.given_models import form_note, given_checkpoint, with_policy_form
from cluster.folder.config_file import ConfigError
from cluster.runs.config import RolloutConfig
from rollout.prompt import render_question
from tests.models import write_tiny_policy


def config(policy: Path, template: str) -> RolloutConfig:
    return RolloutConfig.model_validate(
        {"problems": "p", "policy": policy, "run_dir": "r", "search": {"template": template}}
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("models") / "tuned")


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("models") / "general", markers=())


def test_a_fine_tuned_policy_keeps_its_markers(tuned: Path) -> None:
    found = with_policy_form(config(tuned, "rstar"))
    assert found.policy_engine.step_markers and form_note(found) == ""


def test_a_general_model_asked_with_worked_examples_is_served_unmarked(general: Path) -> None:
    found = with_policy_form(config(general, "bootstrap"))
    assert not found.policy_engine.step_markers
    assert form_note(found).startswith(f"{general}: served as it is")


def test_a_general_model_under_a_trained_template_is_refused_with_the_remedy(general: Path) -> None:
    with pytest.raises(ModelCheckError, match=r"never fine-tuned .*search.template=bootstrap"):
        with_policy_form(config(general, "rstar"))


def test_a_fine_tuned_policy_under_worked_examples_is_refused_with_the_remedy(tuned: Path) -> None:
    with pytest.raises(ModelCheckError, match=r"fine-tuned policy; .*search.template=rstar"):
        with_policy_form(config(tuned, "bootstrap"))


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_worked_examples_become_turns_of_the_policys_chat_template(tmp_path: Path) -> None:
    policy = write_tiny_policy(tmp_path / "chat", markers=())
    asked = config(policy, "bootstrap").model_dump(mode="json")
    asked["search"]["bootstrap"] = {"chat": True}
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        with_policy_form(RolloutConfig.model_validate(asked))
    (policy / "chat_template.jinja").write_text(CHAT)
    search = with_policy_form(RolloutConfig.model_validate(asked)).search
    prompt = render_question("How many?", search.prompt_template)
    assert prompt.startswith("[user]You are a careful") and "[end][assistant]<code>\n" in prompt
    assert prompt.endswith("[user]Question: How many?[end][assistant]")
    assert search.training_template.name == "rstar"


def test_an_endpoint_is_asked_in_the_chat_form_of_a_named_tokenizer(tmp_path: Path) -> None:
    tokenizer = write_tiny_policy(tmp_path / "chat", markers=())
    (tokenizer / "chat_template.jinja").write_text(CHAT)
    search = {"template": "bootstrap", "bootstrap": {"chat": True}}
    endpoint = {"base_url": "http://localhost/v1", "model": "m"}
    asked = {"problems": "p", "run_dir": "r", "search": search, "endpoint": endpoint}
    with pytest.raises(ConfigError, match=r"give endpoint\.tokenizer"):
        with_policy_form(RolloutConfig.model_validate(asked))
    endpoint["tokenizer"] = str(tokenizer)
    found = with_policy_form(RolloutConfig.model_validate(asked)).search
    replicas = config(tokenizer, "bootstrap").model_copy(update={"search": found})
    assert found.prompt_template.text.endswith("[user]Question: {question}[end][assistant]")
    assert with_policy_form(replicas).search == found
    endpoint["tokenizer"] = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"nothing: no tokenizer for search\.bootstrap\.chat"):
        with_policy_form(RolloutConfig.model_validate(asked))


async def test_the_event_loop_runs_on_while_a_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looped = threading.Event()

    def digest(path: Path) -> str:
        assert looped.wait(60), "the event loop stood still"
        return "0123456789"

    monkeypatch.setattr(given_models, "directory_digest", digest)
    reading = asyncio.create_task(given_checkpoint("policy", tmp_path))
    await asyncio.sleep(0.05)
    looped.set()
    assert (await reading).version == "policy-r0-01234567"
