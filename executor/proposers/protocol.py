"""The seam between guessing tokens and computing them: executor/speculation.py asks, one of this folder answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.types import BlockId
from executor.resident import Rows


class Proposer(Protocol):
    """Guesses from what the resident tables hold. A guess may be anything: it costs time where it is wrong."""

    def begin_session(self) -> None:
        """Forget every sequence; what the KV slab holds is void."""
        ...

    def begin_step(self, rows: Rows, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Blocks were copied, and the known tokens of the rows are about to be written. Called in every step."""
        ...

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        """Guess what follows the known tokens of each of A sequences: up to `most` (A,) tokens, at least 1.

        `slots` (A,) are their lines in the resident tables. Places in the token pool behind the known tokens may be
        written.
        """
        ...
