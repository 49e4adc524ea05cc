"""The contract of the split: what the scheduler asks for in one step, and what comes back.

A plan is a delta. A sequence is sent whole once (NewSequence); later steps name its slot and what changed. Rows are
columns, not objects: at 256 sequences a row object each would cost more than the rest of the scheduler.

Both sides derive the rest by the same rules, in the same order:
  1. release, 2. admit, 3. tell tokens, 4. append blocks, 5. copy blocks, 6. forward over the rows, 7. sample.
  - A row computes positions [num_computed, num_computed + num_scheduled) of its sequence.
  - A row *samples* when it reaches the end of the known tokens: prompt, tokens committed before the admission, and
    tokens this executor sampled since. The sampled token becomes known on the executor at once, so the next plan can
    name the row again before the scheduler has seen the token.
  - A sequence that met a token stop condition is finished on the executor: its later rows are skipped.
  - A sequence with `num_candidates` is a beam: its row never samples. Where it reaches the end of the known tokens, the
    result ranks that many of the likeliest next tokens, and a later plan tells which of them it is (`told_tokens`).
  - A sequence that `embeds` has one row that samples, and what that brings is no token but a vector: the hidden state
    of its last token, behind the model's last norm. It is finished then.
  - A row that samples may carry *drafts*: tokens that the executor guesses behind the known ones, and computes with
    them. It samples behind each for as long as what it sampled is what was guessed, so one row brings 1 to 1 + drafts
    tokens, which are those that as many rows would have brought. Until its result is there nothing follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from common.sampling import SamplingParams
from common.types import BlockId, SlotRef

MAX_DRAFTS: Final = 32
"""That any row may carry: as many tokens as one sequence can win in one step."""

EMBEDS: Final = "embeddings"
"""The capability of an executor that takes sequences which embed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A sequence told whole: at its admission, and again after a preemption or a move."""

    ref: SlotRef
    attempt: int  # how often this sequence was placed before; for logs and for fencing
    token_ids: Sequence[int]  # prompt, then the tokens committed so far
    num_prompt: int  # how many of token_ids are the prompt
    num_computed: int  # tokens whose K and V are in the block table already (a prefix hit)
    block_table: Sequence[BlockId]  # blocks granted up to and including this step
    sampling: SamplingParams
    choice: int  # which of the request's n choices; part of the random key
    max_tokens: int  # output tokens, counted from the prompt's end
    stop_token_ids: tuple[int, ...]  # EOS ids included, unless the request ignores EOS
    min_tokens: int = 0  # output tokens before which none of stop_token_ids is chosen
    domain: bytes = b""  # what is kept of a grammar is kept for one domain alone; it says nothing else of its tenant
    num_candidates: int = 0  # not 0: a beam, of which so many continuations are ranked
    trace: str = ""  # whose trace its request is part of, where that is recorded; means nothing to the compute
    embeds: bool = False  # it ends with its prompt, in a vector; max_tokens is 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward pass. R rows, A appended blocks."""

    step: int  # contiguous within a session, from 0
    refs: Sequence[SlotRef]  # (R,) the rows, each sequence at most once
    num_scheduled: Sequence[int]  # (R,) tokens granted to each row, at least 1
    append_refs: Sequence[SlotRef] = ()  # (A,) sequence whose table grows; not for those in `new`
    append_blocks: Sequence[BlockId] = ()  # (A,) the block it grows by, in table order
    replace_refs: Sequence[SlotRef] = ()  # (C,) sequence whose table changes in place (copy on write)
    replace_indices: Sequence[int] = ()  # (C,) which entry of the table
    replace_blocks: Sequence[BlockId] = ()  # (C,) the block that stands there now
    new: Sequence[NewSequence] = ()  # told whole in this step; their rows are in refs like all others
    released: Sequence[SlotRef] = ()  # the executor may forget these
    copies: Sequence[tuple[BlockId, BlockId]] = ()  # (source, destination), done in this order before the forward
    told_refs: Sequence[SlotRef] = ()  # (B,) beams whose next token was chosen
    told_tokens: Sequence[int] = ()  # (B,) that token
    max_drafts: Sequence[int] = ()  # (R,) drafts that a row may carry, behind its tokens; () for none at all

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole step, at most."""
        return sum(self.num_scheduled) + sum(self.max_drafts)


class Logprobs(NamedTuple):
    """How likely a token was, by the model's own distribution: natural logarithms."""

    token: float
    top_ids: tuple[int, ...] = ()  # the likeliest tokens in its place, the best first; the lower id among equals
    top: tuple[float, ...] = ()  # theirs


class Scored(NamedTuple):
    """A token that was scored: one that this step sampled, or one of the prompt that stands behind what it computed."""

    ref: SlotRef
    position: int  # of the token in its sequence
    logprobs: Logprobs


class Ranked(NamedTuple):
    """The likeliest continuations of a beam, the best first; the lower id among equals. C of them, or all it has.

    Their log-probabilities are those of Transformers' beam search: log-softmax, then the request's controls.
    """

    ref: SlotRef
    output_index: int  # of the token that may come next: 0 is the first after the prompt
    token_ids: Sequence[int]  # (C,)
    logprobs: Sequence[float]  # (C,) float32
    # where the sequence asks for log-probabilities: those of the model itself, as in Logprobs
    raw: Sequence[float] = ()  # (C,) of these tokens
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()

    def told(self, token: int) -> Logprobs:
        """How likely one of the tokens was."""
        return Logprobs(self.raw[self.token_ids.index(token)], self.top_ids, self.top)


class Embedded(NamedTuple):
    """What a sequence that embeds brought. H numbers, the model's hidden size."""

    ref: SlotRef
    vector: bytes  # (H,) float32, little-endian


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came out of one plan. S sampled rows. Every step has a result, also one that samples nothing."""

    step: int
    refs: Sequence[SlotRef] = ()  # (S,) rows that were sampled; those with drafts once for each token, side by side
    tokens: Sequence[int] = ()  # (S,)
    indices: Sequence[int] = ()  # (S,) output index of each token: 0 is the first after the prompt
    failed: Sequence[SlotRef] = ()  # rows whose logits were not finite: nothing was sampled
    unready: Sequence[SlotRef] = ()  # rows whose grammar says nothing yet: their last token is computed again
    compute_ns: int = 0  # time the executor spent on the step
    idle_ns: int = 0  # time it waited before the step for want of a plan
    scored: Sequence[Scored] = ()  # where a sequence asks for it; positions in order within each
    ranked: Sequence[Ranked] = ()  # beams that reached the end of their known tokens
    drafted: Sequence[tuple[SlotRef, int]] = ()  # rows that might carry drafts, and how many they did
    embedded: Sequence[Embedded] = ()  # sequences that embed, and are computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """What an executor says of itself when it joins. Found at run time, never configuration."""

    name: str
    model: str
    model_digest: str
    vocab_size: int
    max_model_len: int  # tokens of one sequence, prompt and output together
    num_blocks: int
    block_size: int
    max_sequences: int  # resident at once: the number of slots
    max_step_tokens: int  # tokens of one step
    credit: int = 2  # plans that may be outstanding
    dtype: str = ""
    device: str = ""
    capabilities: tuple[str, ...] = field(default=())
    max_drafts: int = 0  # drafts that a row may carry; 0: it does not speculate
    step_overhead_tokens: int = 0  # tokens whose computing takes as long as what a step takes in any case
    draft_cost: float = 1.0  # tokens whose computing takes as long as a draft, with what it takes to guess it
    determinism: str = ""  # class of those that compute the same tokens bit for bit; empty: no promise
