"""Rows that end in a vector instead of a token: the hidden state of their last token, behind the model's last norm."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from common.step import Embedded
from common.types import SlotRef
from executor.batch import InputBatch
from executor.resident import Resident


class Embedding(NamedTuple):
    """A sampled row that embeds."""

    row: int  # of the sampled ones
    ref: SlotRef


def who_embeds(held: Resident, batch: InputBatch) -> list[Embedding]:
    """Those of the sampled rows that embed. Called when the step is launched: their slots may be others' later."""
    rows = batch.embedded_rows.tolist()
    return [Embedding(row, SlotRef(int(held.refs[batch.sampled_slots[row]]))) for row in rows]


def embedded(embedding: list[Embedding], hidden: Tensor, failed: Collection[int]) -> list[Embedded]:
    """What these rows brought, hidden (E, H), but for those that failed: their logits were not finite."""
    vectors = hidden.float().cpu().numpy().astype("<f4")
    return [
        Embedded(each.ref, vector.tobytes())
        for each, vector in zip(embedding, vectors, strict=True)
        if each.row not in failed
    ]
