"""The name of everything that decides the bits of a token, for executors whose tokens depend on nothing else.

Executors of one class give a sequence the same tokens whatever the batch, the chunks, a preemption or a move among
them. An executor that cannot promise that has no class: the empty string.
"""

from __future__ import annotations

import hashlib
import re


def determinism_class(*parts: str) -> str:
    """16 hex digits over `parts`: model, kernels, instruction set, formats, libraries."""
    hashed = hashlib.blake2b(digest_size=8, person=b"determinism")
    for part in parts:
        hashed.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return hashed.hexdigest()


def is_determinism_class(text: str) -> bool:
    """What `determinism_class` returns, or empty."""
    return re.fullmatch(r"([0-9a-f]{16})?", text) is not None
