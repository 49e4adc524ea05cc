"""What a tenant was served, in virtual tokens: the counter of the virtual token counter (scheduler/line.py)."""

from __future__ import annotations

from typing import Final

W_IN: Final = 1
"""Virtual tokens of a prompt token that is computed."""

W_OUT: Final = 2
"""Virtual tokens of an output token: it takes a step of its own."""


class Account:
    """One tenant in one band of the line. Charges are divided by the tenant's weight."""

    __slots__ = ("_lifted", "counter", "num_listed", "per_input", "per_output")

    def __init__(self, weight: float) -> None:
        self.counter = 0.0  # only ever grows
        self.num_listed = 0  # the tenant's queues that stand in the band
        self._lifted = 0.0  # of the counter, what was not served
        self.weigh(weight)

    def weigh(self, weight: float) -> None:
        """Charge by this weight from now on."""
        self.per_input = W_IN / weight
        self.per_output = W_OUT / weight

    def lift(self, floor: float) -> None:
        """Count as if so much had been served, at least."""
        if floor > self.counter:
            self._lifted += floor - self.counter
            self.counter = floor

    @property
    def served(self) -> float:
        """What was served in truth."""
        return self.counter - self._lifted
