"""The price table: what machines cost and have, by provider and instance type (a YAML file)."""

from __future__ import annotations

import datetime
from pathlib import Path

from pydantic import Field, ValidationError

from cluster.folder.config_file import Config, ConfigError, read_yaml
from cluster.machines.cost import MachinePrice


class Instance(MachinePrice):
    """A row of the price table."""

    cpus: int = Field(ge=1, description="logical CPUs")
    gpus: int = Field(0, ge=0, description="GPUs")


class PriceTable(Config):
    """List prices to be checked, by provider and instance type."""

    as_of: datetime.date = Field(description="when the prices were looked up")
    instances: dict[str, dict[str, Instance]] = Field(description="provider -> type -> row")

    @property
    def by_kind(self) -> dict[str, Instance]:
        """Rows of all providers, whose names for machines differ."""
        return {kind: row for rows in self.instances.values() for kind, row in rows.items()}


def read_prices(path: str | Path) -> PriceTable:
    """The price table.

    Raises:
        ConfigError: it cannot be read, or a row is wrong; the message names it.
    """
    try:
        return PriceTable.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
