"""What `rstar serve` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cluster.folder.config_file import Config
from cluster.runs.config import SolveConfig


class ServiceConfig(Config):
    """Who is answered, and how much of the machine one request may have."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; any but the loopback needs API keys"
    )
    port: int = Field(8400, ge=0, le=65535, description="0: any free one")
    keys: Path | None = Field(
        None,
        description="file of API keys, one a line, a name before it if you like; null: those in "
        "RSTAR_API_KEYS, or none",
    )
    public_url: str | None = Field(
        None, description="address in links to tree pages, behind a proxy; null: as asked for"
    )
    max_running: int = Field(
        32, ge=1, description="searches at a time, for each policy replica that serves"
    )
    max_queued: int = Field(
        256,
        ge=0,
        description="searches that may wait, of one key as many as it leaves free; more are "
        "refused with 429",
    )
    max_choices: int = Field(8, ge=1, description="most choices (n) of one request")
    max_trajectories: int = Field(256, ge=1, description="most trajectories of one search")
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="seconds, waiting included, after which the best answer so far is "
        "given, unless the request says",
    )
    max_timeout_s: float = Field(3600.0, gt=0, description="most that a request may ask for")
    max_request_kib: int = Field(256, ge=1, description="most that the body of a request may have")
    attempts: int = Field(
        3, ge=1, description="times a search is begun when actors it needs are lost"
    )
    kept_trees: int = Field(
        100, ge=0, description="searches whose tree pages can be looked at afterwards"
    )
    stop_s: float = Field(
        30.0, ge=0, description="seconds that searches in hand have to end when the server stops"
    )
    log_requests: bool = Field(False, description="write problems and answers into the log")
    follow_s: float = Field(
        10.0, gt=0, description="pause between two looks for a new checkpoint of the run (--follow)"
    )


class ServeConfig(SolveConfig):
    """Deep thinking as a service: `rstar serve`."""

    serve: ServiceConfig = Field(
        default_factory=ServiceConfig, description="who is answered, and how much of it"
    )

    @model_validator(mode="after")
    def _timeout_within_the_most(self) -> Self:
        if self.serve.timeout_s > self.serve.max_timeout_s:
            raise ValueError(
                f"serve.timeout_s must be at most serve.max_timeout_s: {self.serve.max_timeout_s:g}"
                f", got {self.serve.timeout_s:g}"
            )
        return self
