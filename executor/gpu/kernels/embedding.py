"""The first kernel of a step: from the place of a token in the pool to the row of the embedding table."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.kernels.overlap import begin_next, overlap
from executor.gpu.triton_case import CompileCase

_BLOCK: Final = 1024  # columns that one program copies


@triton.jit
def _embed(token_ids, places, table, out, vocab_size, hidden, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + tl.load(places + row).to(tl.int64)).to(tl.int64)
    known = (token >= 0) & (token < vocab_size)
    inside = columns < hidden
    values = tl.load(table + token * hidden + columns, mask=inside & known, other=0.0)
    tl.store(out + row * hidden + columns, values, mask=inside)


def embed(token_ids: Tensor, token_places: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Write the embedding of each input token to `out` (T, hidden), and return it.

    `token_ids` int32, the token pool, of any shape; `token_places` (T,) int32, places in it when flattened; `table`
    (vocab_size, hidden). All are dense. What is no token, -1 in a row that failed, has a row of zeros.
    """
    vocab_size, hidden = table.shape
    grid = (len(token_places), triton.cdiv(hidden, _BLOCK))
    may_overlap = overlap(out.device)["OVERLAP"]  # only its successor: it is the step's first, and waits for all before
    _embed[grid](token_ids, token_places, table, out, vocab_size, hidden, BLOCK=_BLOCK, OVERLAP=may_overlap)
    return out


def compile_cases() -> list[CompileCase]:
    """What serving launches."""
    signature = {
        "token_ids": "*i32", "places": "*i32", "table": "*bf16", "out": "*bf16",
        "vocab_size": "i32", "hidden": "i32", "BLOCK": "constexpr", "OVERLAP": "constexpr",
    }  # fmt: skip
    constants = {"BLOCK": _BLOCK, "OVERLAP": True}
    return [CompileCase(name="embed", kernel=_embed, signature=signature, constants=constants)]
