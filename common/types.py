"""Ids and enums that cross a border. Ids are integers or strings with a name, never bare ones.

A sequence's place on an executor is a *slot reference*: slot and generation packed into one unsigned 32-bit number,
so that a row of a plan costs four bytes. The slot is an index into the executor's resident tables; the generation is
counted up whenever the scheduler gives the slot to another sequence, so a late row can never speak for the wrong one.
"""

from __future__ import annotations

import enum
from typing import Final, NewType

SequenceId = NewType("SequenceId", int)
"""One sequence inside one scheduler; never reused within its life."""

BlockId = NewType("BlockId", int)
"""Index of a block in an executor's KV slab."""

TokenId = int
"""Index into the vocabulary."""

SlotRef = NewType("SlotRef", int)
"""generation << 16 | slot."""

SLOT_BITS: Final = 16
MAX_SLOTS: Final = 1 << SLOT_BITS


def slot_ref(slot: int, generation: int) -> SlotRef:
    """Pack slot and generation (modulo 2**16) into 32 bits."""
    assert 0 <= slot < MAX_SLOTS, f"slot {slot} of at most {MAX_SLOTS}"
    return SlotRef((generation & 0xFFFF) << SLOT_BITS | slot)


def slot_of(ref: SlotRef) -> int:
    """The executor's table index in a slot reference."""
    return ref & (MAX_SLOTS - 1)


def generation_of(ref: SlotRef) -> int:
    """How often the slot was given away before, modulo 2**16."""
    return ref >> SLOT_BITS


class Priority(enum.IntEnum):
    """Who goes first while there is not room for all; the least number does. The numbers are those of the wire."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


class FinishReason(enum.IntEnum):
    """Why a choice ended. The numbers are those of the wire."""

    NONE = 0  # still running
    EOS = 1  # the model's end-of-sequence token
    STOP_TOKEN = 2  # one of the request's stop_token_ids
    STOP_STRING = 3  # one of the request's stop strings
    LENGTH = 4  # max_tokens, or the model's context, is used up
    ABORTED = 5  # the caller left, or its deadline passed
    ERROR = 6  # this choice failed; the status says why
    TOOL_CALLS = 7  # EOS behind complete calls of tools; only who reads the text knows, so the core never says it
    EMBEDDED = 8  # its prompt is computed, and its vector is there: nothing is generated
