"""Resident tables and the rows of a step to the columns of one forward pass. Pure, and numpy only: no tensor yet.

Input tokens are named by their place in the token pool, not by their value: the pool lies on the device and the sampler
writes into it, so a decode row never waits for its token to travel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from executor.resident import Resident, Rows, spread


def _nothing() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """One forward pass, flattened.

    T tokens, N rows, M blocks in the longest table, S sampled rows, D drafts, P scored positions.
    The rows with one token lie first, so a backend can cut decode from prefill. Sampled rows keep the plan's order.
    """

    token_places: NDArray[np.int64]  # (T,) place of each input token in the flattened token pool
    positions: NDArray[np.int64]  # (T,) position in its own sequence
    slot_mapping: NDArray[np.int64]  # (T,) slot each token's K and V are written to
    query_start_loc: NDArray[np.int64]  # (N + 1,) tokens of row n are [loc[n], loc[n + 1])
    seq_lens: NDArray[np.int64]  # (N,) tokens row n may attend to, this step's included
    block_tables: NDArray[np.int32]  # (N, M) padded with whatever the table held before
    num_decodes: int  # the first rows, those with one token each
    logits_indices: NDArray[np.int64]  # (S + D + P,) of the T tokens: those to sample behind, drafts, those that score
    sampled_slots: NDArray[np.int64]  # (S,) their lines in the resident tables
    sampled_places: NDArray[np.int64]  # (S,) where in the token pool the new tokens go
    sampled_indices: NDArray[np.int64]  # (S,) their output indices
    # drafts: which of the sampled rows carries it, and at which place of its drafts it is, from 1; the first ones first
    draft_rows: NDArray[np.int64] = field(default_factory=_nothing)  # (D,)
    draft_places: NDArray[np.int64] = field(default_factory=_nothing)  # (D,)
    # where prompts are scored: whose, and at which place of it is the token whose logits those are
    scored_slots: NDArray[np.int64] = field(default_factory=_nothing)  # (P,) lines in the resident tables
    scored_positions: NDArray[np.int64] = field(default_factory=_nothing)  # (P,) at least 1
    table_rows: NDArray[np.int64] = field(default_factory=_nothing)  # (N,) each row's line in the resident tables
    embedded_rows: NDArray[np.int64] = field(default_factory=_nothing)  # (E,) which of the sampled rows embed


def build_batch(
    resident: Resident, rows: Rows, *, gathers_tables: bool = True, scores_prompts: bool = True
) -> InputBatch:
    """Gather what the forward needs. At least one row.

    A device that holds the tables itself reads them by `table_rows`: for it, `block_tables` need not be gathered.
    """
    counts = rows.counts
    if counts.max() == 1:  # most steps; at batch 1 every call into numpy is felt
        ordered, slots, positions, loc = rows, rows.slots, rows.starts, np.arange(len(counts) + 1)
        last_token = loc[:-1]
    else:
        order = np.argsort(counts > 1, kind="stable")  # decode rows first
        ordered = Rows(
            slots=rows.slots[order], starts=rows.starts[order], stops=rows.stops[order], samples=rows.samples[order]
        )
        slots, positions = ordered.each_token()
        loc = np.zeros(len(order) + 1, np.int64)
        np.cumsum(ordered.counts, out=loc[1:])
        last_token = np.empty(len(order), np.int64)  # of each row, in the plan's order
        last_token[order] = loc[1:] - 1

    longest = -(-int(rows.stops.max()) // resident.block_size)
    logits_indices = last_token[rows.samples]
    draft_rows = draft_places = _nothing()
    if rows.num_drafts is not None:
        num_drafts = rows.num_drafts[rows.samples]
        logits_indices -= num_drafts  # the first token is sampled behind the known ones, then one behind each draft
        draft_rows, draft_places = spread(np.arange(len(num_drafts)), np.ones_like(num_drafts), num_drafts)
        by_place = np.argsort(draft_places, kind="stable")
        draft_rows, draft_places = draft_rows[by_place], draft_places[by_place]
        logits_indices = np.concatenate((logits_indices, logits_indices[draft_rows] + draft_places))
    scored_slots = scored_positions = _nothing()
    if resident.scored_prompts and scores_prompts:
        # each position that is not the prompt's last tells how likely the token behind it was
        token_slots = np.repeat(ordered.slots, ordered.counts)
        tells = (resident.prompt_logprobs[token_slots] >= 0) & (positions < resident.num_prompt[token_slots] - 1)
        logits_indices = np.concatenate((logits_indices, np.flatnonzero(tells)))
        scored_slots, scored_positions = token_slots[tells], positions[tells] + 1
    sampled = rows.slots[rows.samples]
    known = resident.num_tokens[sampled]
    embedded = _nothing()
    if resident.embeds:
        embedded = np.flatnonzero([slot in resident.embeds for slot in sampled.tolist()])
    return InputBatch(
        token_places=slots * resident.max_model_len + positions,
        positions=positions,
        slot_mapping=resident.slot_mapping(slots, positions),
        query_start_loc=loc,
        seq_lens=ordered.stops,
        block_tables=np.ascontiguousarray(resident.block_tables[ordered.slots, : longest if gathers_tables else 0]),
        num_decodes=int((counts == 1).sum()),
        logits_indices=logits_indices,
        sampled_slots=sampled,
        sampled_places=sampled * resident.max_model_len + known,
        sampled_indices=known - resident.num_prompt[sampled],
        draft_rows=draft_rows,
        draft_places=draft_places,
        scored_slots=scored_slots,
        scored_positions=scored_positions,
        table_rows=ordered.slots,
        embedded_rows=embedded,
    )
