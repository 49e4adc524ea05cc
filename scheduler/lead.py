"""How long before an executor can begin with a plan it is made: so late that who comes meanwhile is in it.

The next plan must lie ready when a step ends, or the executor waits for its scheduler. Made as soon as there is credit
for it, it is a whole step old by then, and who comes during that step is in none before the one after it. So where
steps are long a plan is held back until shortly before the one that runs will have ended. How shortly is learnt of
idle time: the way there and back, a busy machine, a step that is shorter than those before it all show there.
"""

from __future__ import annotations

from typing import Final

FIRST_NS: Final = 20_000_000
LEAST_NS: Final = 6_000_000
"""A timer may be a millisecond late, and a turn of readers takes two."""

WORTH_NS: Final = 10_000_000
"""A shorter wait than this is not worth a timer and another turn of the loop."""

MOST_NS: Final = 1_000_000_000
IDLE_NS: Final = 500_000
"""Less than this lies between any two steps."""


class Lead:
    """For one session. It grows by half where a plan that was held back came too late, and shrinks slowly else.

    So about one such plan in fifty comes too late, by a little, and where all of them would, one is tried now and then.
    """

    def __init__(self) -> None:
        self.ns = FIRST_NS

    def held_ns(self, busy_ns: int) -> int:
        """How long to wait with the plan while the executor is busy for so long."""
        held_ns = busy_ns - self.ns
        return held_ns if held_ns >= WORTH_NS else 0

    def add(self, idle_ns: int, *, was_held: bool) -> None:
        """One answered step, and how long the executor waited for its plan."""
        if idle_ns < IDLE_NS:
            self.ns = max(LEAST_NS, self.ns - self.ns // (128 if was_held else 1024))
        elif was_held:
            self.ns = min(MOST_NS, self.ns + self.ns // 2)
