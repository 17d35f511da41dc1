"""Seeds by name: every random choice of a run follows from one number and a path of names."""

from __future__ import annotations

import hashlib


def derive_seed(*names: object) -> int:
    """A 31-bit seed for (run seed, round, problem id, tree, rollout, ...), order-sensitive.

    The same names give the same seed in every process, whatever else runs beside it.
    """
    text = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 33
