"""Drafts before the forward: asked for, and cut to what an answer could be. executor/choosing.py keeps right ones."""

from __future__ import annotations

import numpy as np

from common.types import SlotRef
from executor.proposers.protocol import Proposer
from executor.resident import Resident, Rows


def draft(held: Resident, rows: Rows, proposer: Proposer) -> Rows:
    """The rows with the drafts of those that may carry any."""
    most = held.most_drafts(rows)
    asking = np.flatnonzero(most)
    if not len(asking):
        return rows
    drafts: list[list[int]] = [[] for _ in rows.slots]
    for n, tokens in zip(asking.tolist(), proposer.propose(rows.slots[asking], most[asking]), strict=True):
        drafts[n] = possible(held, int(rows.slots[n]), tokens)
    return held.draft(rows, drafts) if any(drafts) else rows


def possible(held: Resident, slot: int, tokens: list[int]) -> list[int]:
    """Drafts up to the first that ends the answer, and before the first that its grammar does not allow."""
    ends = held.stop_token_ids[slot]
    for place, token in enumerate(tokens, start=1):
        if token in ends:
            tokens = tokens[:place]
            break
    guide = held.guides[slot]
    if guide is not None and tokens:
        output = held.token_ids[slot, held.num_prompt[slot] : held.num_tokens[slot]]
        tokens = tokens[: guide.num_allowed(output, tokens)]
    return tokens


def drafted(held: Resident, rows: Rows) -> list[tuple[SlotRef, int]]:
    """For a step's result: the rows that might carry drafts, and how many they do. Before the step is recorded."""
    if rows.max_drafts is None:
        return []
    asked = np.flatnonzero(rows.max_drafts)
    counts = rows.num_drafts[asked] if rows.num_drafts is not None else np.zeros(len(asked), np.int64)
    refs = held.refs[rows.slots[asked]]
    return [(SlotRef(ref), count) for ref, count in zip(refs.tolist(), counts.tolist(), strict=True)]
