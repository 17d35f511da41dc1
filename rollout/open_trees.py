"""Trees whose search is not over, kept beside a round's shards so that another worker goes on.

    <root>/trajectories/round=R/open/<job>.trees     SHA-256 in hex, a newline, a Parquet file

One file holds what is known of a job's trees, in the table of `rollout.table`. It is written when a
worker leaves, or now and then, replaced as a whole, and read by whoever gets the job next. It saves
work and decides nothing: without it, or with one that is damaged or of other problems, the search
starts from the beginning. So readers log what is wrong and never fail for it.
"""

from __future__ import annotations

import hashlib
import io
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.store import RunStore, StoreError, folder_of
from rollout.table import table_to_bytes, table_to_trees
from rollout.tree import Tree

logger = logging.getLogger(__name__)


class OpenTreeStore:
    """Open trees of one round by job."""

    def __init__(self, store: RunStore, round: int) -> None:
        self.store = store
        self.prefix = f"{folder_of(round)}/open"

    def save(self, job_id: str, table: pa.Table) -> None:
        """Keep a job's trees, given as `trees_to_table` makes them, in place of those before.

        Raises:
            StoreError: the store cannot be written.
        """
        data = table_to_bytes(table)
        digest = hashlib.sha256(data).hexdigest().encode()
        self.store.put(self._path(job_id), digest + b"\n" + data)

    def load(self, job_id: str) -> list[Tree]:
        """The trees kept for a job; empty if there are none or they cannot be read."""
        path = self._path(job_id)
        try:
            digest, _, data = self.store.read(path).partition(b"\n")
            if hashlib.sha256(data).hexdigest().encode() != digest:
                raise ValueError("its SHA-256 differs from the one in its first line")
            return table_to_trees(pq.read_table(io.BytesIO(data)))
        except FileNotFoundError:
            return []
        except (ValueError, OSError, StoreError) as error:
            logger.warning("Open trees are ignored, their searches begin anew: %s: %s", path, error)
            return []

    def remove(self, job_id: str) -> None:
        """Forget a job's trees; harmless if there are none.

        Raises:
            StoreError: the store fails.
        """
        self.store.delete(self._path(job_id))

    def remove_all(self) -> None:
        """Forget the trees of all jobs.

        Raises:
            StoreError: the store fails.
        """
        for path in self.store.files(self.prefix):
            self.store.delete(path)

    def _path(self, job_id: str) -> str:
        return f"{self.prefix}/{job_id}.trees"
