"""Places in the code where a test may break the process. For tests alone: unarmed, each is a call that does nothing.

`hit(NAME)` stands where a crash would hurt most. services/failpoints.py arms it from PAGEWIRE_FAILPOINTS, read once as
a process starts; the simulation in tests/faults/ arms it in its own way. Whoever arms it replaces `hit`, so it is
always called through the module: `failpoints.hit("before_commit")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

Effect = Literal["", "drop", "nan"]
"""What the place itself is to do; empty is nothing. Only the places in EFFECTS look at it."""

SCHEDULER: Final = (
    "before_admit",  # a request is checked, and not queued yet
    "after_admit",  # queued, and nobody was told
    "before_block_alloc",
    "before_block_free",
    "on_preempt",
    "on_prefix_hit",
    "before_welcome",  # an executor said hello and is not answered
    "before_plan_send",  # the core counts the step as sent
    "after_plan_send",  # gRPC has it
    "before_commit",  # a result is there
    "after_commit_before_outbox",  # the core has the tokens, no stream has
    "after_outbox_before_write",  # a stream has them, gRPC has not
    "before_end_chunk",  # all tokens are told, the end is not
    "on_resume_verify",  # somebody came with tickets, and they are not checked yet
    "mid_drain",  # no new request is taken any more
)
EXECUTOR: Final = (
    "mid_load",
    "before_ready",  # loaded, and no scheduler dialled
    "before_hello",
    "after_plan_recv",
    "before_forward",
    "before_block_copy",
    "after_forward_before_sample",
    "after_sample_before_send",
    "mid_result_write",
    "in_heartbeat",
    "on_drain",
)
CLIENT: Final = (
    "before_resume",  # a call broke, and the rest is not asked for yet
    "mid_resume",  # a server goes on with the answer, and nothing new was heard
    "after_recv_before_deliver",  # tokens are here, and their user has not seen them
)
NAMES: Final = frozenset(SCHEDULER + EXECUTOR + CLIENT)

EFFECTS: Final[dict[str, frozenset[str]]] = {
    "before_plan_send": frozenset({"drop"}),
    "mid_result_write": frozenset({"drop"}),
    "after_forward_before_sample": frozenset({"nan"}),
}
"""Effects that a place knows: a message that is not sent; logits that are not finite."""


def unarmed(_name: str) -> Effect:
    """What `hit` is in every process that nobody wants to break."""
    return ""


hit: Callable[[str], Effect] = unarmed
