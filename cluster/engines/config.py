"""How an engine is run, without one being imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dialect = Literal["openai", "vllm"]

OWN_KEYS = frozenset(
    {
        "logprobs",
        "max_tokens",
        "model",
        "n",
        "prompt",
        "seed",
        "stop",
        "stream",
        "temperature",
        "top_p",
    }
)
"""Keys of a request body that follow from the request and the config, and from nothing else."""


class EngineConfig(BaseModel):
    """How a vLLM engine is run; the model itself is an argument of the replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of weights and cache; auto: as the checkpoint was saved"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="tokens of prompt and completion; null: what the model is made for",
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="tokens per cache block; null: the engine's default, 32 on CPU",
    )
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, le=1, description="share of a GPU's memory for weights and cache"
    )
    kv_cache_gib: float = Field(
        default=0.25, gt=0, description="key-value cache on CPU (on GPU it takes what is left)"
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs each layer of one replica is spread over"
    )
    pipeline_parallel_size: int = Field(
        default=1,
        ge=1,
        description="parts the layers of one replica are cut into; it takes this times "
        "tensor_parallel_size GPUs, on several nodes if one has too few",
    )
    enforce_eager: bool | None = Field(
        default=None, description="no graph capture or compilation; null: only on CPU"
    )
    in_process: bool | None = Field(
        default=None,
        description="run a policy's engine core in a thread of its replica, not in a process of "
        "its own; null: on CPU (a PPM's always is there)",
    )
    cpu_threads: int = Field(default=1, ge=1, description="compute threads of the engine on CPU")
    max_num_seqs: int | None = Field(
        default=None,
        ge=1,
        description="sequences in one batch; null: what vLLM chooses for the card, 256 on CPU",
    )
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in one step; null: what vLLM chooses for the card, on CPU 4096 or "
        "max_model_len",
    )
    seed: int = Field(default=0, ge=0, description="of requests that bring none")
    logprobs: bool = Field(
        default=False,
        description="return the log-probability of each completion (15 % slower on CPU)",
    )
    max_repeats: int | None = Field(
        default=None,
        ge=2,
        description="a completion that ends in so many equal passages of up to 32 tokens is "
        "ended there; null: none is (it is looked for at every token)",
    )
    step_markers: bool = Field(
        default=True,
        description="refuse a policy whose tokenizer lacks a step marker; false: it has a format "
        "of its own (rstar evaluate)",
    )
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="a request not answered by then is aborted; null: when its caller gives up "
        "(cluster.request_timeout_s)",
    )
    load_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="for requests in flight to end before new weights are loaded",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="further vLLM engine arguments, passed as they are"
    )

    @model_validator(mode="after")
    def _one_rank_in_process(self) -> Self:
        if self.in_process and self.num_ranks > 1:
            raise ValueError(
                "in_process: an engine of more than one GPU (tensor_parallel_size x "
                f"pipeline_parallel_size = {self.num_ranks}) has a core process of its own"
            )
        return self

    @property
    def num_ranks(self) -> int:
        """GPUs one replica takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class EndpointConfig(BaseModel):
    """An OpenAI-compatible completions endpoint, and how much of it may be used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(
        description="up to and without /completions, as https://api.example.com/v1"
    )
    model: str = Field(min_length=1, description="as the endpoint names it")
    api_key_env: str | None = Field(
        default=None,
        description="environment variable that holds the API key; null: no key is sent",
    )
    dialect: Dialect = Field(
        default="openai",
        description="vllm: says which stop string ended a completion; openai: any other server, "
        "which is streamed and cut here",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="folder with the tokenizer of the endpoint's model, whose chat template "
        "search.bootstrap.chat writes with; null: not needed",
    )
    max_n: int = Field(default=16, ge=1, description="candidates in one HTTP request")
    send_seed: bool = Field(
        default=True,
        description="false for servers that refuse a seed or give n equal texts for it",
    )
    logprobs: bool = Field(
        default=False, description="ask for the log-probability of each completion"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="further keys of each request, passed as they are"
    )
    max_in_flight: int = Field(default=32, ge=1, description="HTTP requests at a time")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="HTTP requests started per minute; null: no limit"
    )
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="tokens in and out per minute; null: no limit"
    )
    max_total_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in and out after which the run ends, since it was started last; "
        "requests in flight come on top; null: no limit",
    )
    request_timeout_s: float = Field(default=300.0, gt=0, description="one try of a request")
    deadline_s: float = Field(
        default=900.0, gt=0, description="all tries of a request with their pauses"
    )
    first_pause_s: float = Field(
        default=1.0, ge=0, description="mean pause after the first failure; doubled each time"
    )
    max_pause_s: float = Field(default=60.0, ge=0, description="longest mean pause")

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("expected an address such as https://api.example.com/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "an address with a user, password or query; a key belongs into the environment "
                "variable that endpoint.api_key_env names"
            )
        value = value.rstrip("/")
        if value.endswith("/completions"):
            raise ValueError("the address is given without /completions")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _name_and_no_key(cls, value: str | None) -> str | None:
        # Upper case only, so that a key given in its place is not taken for a name and written.
        if value is not None and not (value.isidentifier() and value == value.upper()):
            raise ValueError(
                "expected the name of an environment variable, in upper case, not the key itself"
            )
        return value

    @field_validator("extra_body")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(OWN_KEYS & value.keys())
        if ours:
            raise ValueError(f"{', '.join(ours)}: set by the search, or by its own key here")
        return value

    @property
    def url(self) -> str:
        return f"{self.base_url}/completions"

    @property
    def version(self) -> str:
        """What replies carry as their policy version."""
        return f"endpoint:{self.model}"
