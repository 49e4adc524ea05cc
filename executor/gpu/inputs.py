"""One forward pass as the device sees it, and the tables that it reads. All that a captured graph needs is in here.

Every integer column is int32. A step may be padded. A padding row has sequence length 0, no token, and a line that
belongs to nobody. Tokens of rows lie one behind the other; padding tokens are the last ones, with slot -1, and of no
row. Padding samples read any token's logits, and write to the line of nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTables:
    """What the device keeps of every sequence: mirrors of columns of executor/resident.py. L slots, and one more."""

    token_ids: Tensor  # (L + 1, P) int32, the token pool: P is max_model_len
    block_tables: Tensor  # (L + 1, M) int32
    temperature: Tensor  # (L + 1,) float32; 0 is greedy
    top_k: Tensor  # (L + 1,) int32; 0 keeps every token
    top_p: Tensor  # (L + 1,) float32
    min_p: Tensor  # (L + 1,) float32
    seed: Tensor  # (L + 1, 2) int32: the low and the high half of 64 bits
    choice: Tensor  # (L + 1,) int32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """T tokens, N rows, S sampled rows, P scored positions; rows with one token lie first. Legend as in InputBatch.

    The numbers are known to the host when the step is launched; a graph is captured for one set of them.
    """

    num_decodes: int  # the first rows: row n's only token is token n, but for padding rows, which are the last of them
    max_query_len: int
    max_seq_len: int  # an upper bound; in a captured graph that of the longest sequence that can be served
    token_places: Tensor  # (T,) int32, place in the flattened token pool
    positions: Tensor  # (T,) int32
    slot_mapping: Tensor  # (T,) int32, -1 for padding
    query_start_loc: Tensor  # (N + 1,) int32
    seq_lens: Tensor  # (N,) int32, this step's tokens included
    table_rows: Tensor  # (N,) int32, each row's line in `DeviceTables.block_tables`
    logits_indices: Tensor  # (S + P,) int32
    sampled_slots: Tensor  # (S,) int32, lines of the tables
    sampled_places: Tensor  # (S,) int32, where in the flattened token pool the new tokens go
    sampled_indices: Tensor  # (S,) int32, output index of the token to be chosen
