"""What a request asks of its logits, done to the sampled rows before a token is chosen. In place, numpy only.

The order is that of Transformers' processors (transformers/generation/utils.py, _get_logits_processor):

  1. logit_bias                           SequenceBiasLogitsProcessor
  2. repetition_penalty                   RepetitionPenaltyLogitsProcessor: over prompt and output
  3. presence_penalty, frequency_penalty  over the output. Transformers has neither; vLLM, like us, after the second
  4. bad_words                            NoBadWordsLogitsProcessor: they may begin in the prompt
  5. min_tokens                           MinNewTokensLengthLogitsProcessor, for every token that ends the sequence
  6. banned_token_ids                     SuppressTokensLogitsProcessor
  7. allowed_token_ids                    what PrefixConstrainedLogitsProcessor does with a list that never changes

and then, where a token is drawn, executor/sampler.py: temperature, top-k, top-p, min-p, typical-p.

4 to 7 take tokens away, so among them the order does not matter, and bad words go last here: where nothing would be
left, they do not count in that step. (That 5 to 7 leave something is checked where the request comes in.)

All of it is a function of the known tokens, which the resident tables hold, and of nothing else. So it is the same
after a preemption, on another executor, and in a stream that was resumed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from executor.resident import Resident, spread
from executor.token_rules import TokenRules

_NEVER: Final = np.float32(-np.inf)


def edit(logits: NDArray[np.float32], held: Resident, slots: NDArray[np.int64]) -> None:
    """Apply the controls of each row's sequence. logits (S, vocab_size) are changed; slots (S,) says whose they are.

    Called before the new tokens are known. Rows without controls are not touched, nor does their number cost anything.
    """
    controlled = held.controlled[slots]
    if not controlled.any():
        return
    rows = np.flatnonzero(controlled)
    slots = slots[rows]
    ruled = [
        (row, slot, rules)
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True)
        if (rules := held.rules[slot]) is not None
    ]
    for row, _, rules in ruled:
        if len(rules.biased):
            logits[row, rules.biased] += rules.biases
    _penalise_repetition(logits, held, rows, slots)
    _penalise_output(logits, held, rows, slots)
    for row, slot, rules in ruled:
        _take_away(logits[row], held, slot, rules)


def _penalise_repetition(
    logits: NDArray[np.float32], held: Resident, rows: NDArray[np.int64], slots: NDArray[np.int64]
) -> None:
    chosen = held.repetition_penalty[slots] != 1
    if not chosen.any():
        return
    rows, slots = rows[chosen], slots[chosen]
    each, tokens = _tokens_of(held, slots, np.zeros_like(slots), held.num_tokens[slots])
    penalty = held.repetition_penalty[slots].astype(np.float32)[each]
    values = logits[rows[each], tokens]
    # a token that is there twice is read twice before it is written twice: the penalty counts once
    logits[rows[each], tokens] = np.where(values < 0, values * penalty, values / penalty)


def _penalise_output(
    logits: NDArray[np.float32], held: Resident, rows: NDArray[np.int64], slots: NDArray[np.int64]
) -> None:
    chosen = (held.presence_penalty[slots] != 0) | (held.frequency_penalty[slots] != 0)
    if not chosen.any():
        return
    rows, slots = rows[chosen], slots[chosen]
    each, tokens = _tokens_of(held, slots, held.num_prompt[slots], held.num_tokens[slots] - held.num_prompt[slots])
    found, counts = np.unique(each * held.vocab_size + tokens, return_counts=True)
    each, tokens = np.divmod(found, held.vocab_size)
    penalty = held.presence_penalty[slots][each] + held.frequency_penalty[slots][each] * counts
    logits[rows[each], tokens] -= penalty.astype(np.float32)


def _take_away(row: NDArray[np.float32], held: Resident, slot: int, rules: TokenRules) -> None:
    """Tokens that may not be chosen: their logits become -inf."""
    known = int(held.num_tokens[slot])
    if known - held.num_prompt[slot] < rules.min_tokens:
        row[rules.ends] = _NEVER
    row[rules.banned] = _NEVER
    if len(rules.allowed):
        kept = row[rules.allowed]
        row.fill(_NEVER)
        row[rules.allowed] = kept
    if rules.bad_words.longest:
        bad = rules.bad_words.next(held.token_ids[slot, max(0, known - rules.bad_words.longest) : known].tolist())
        if bad:
            kept = row[bad]
            row[bad] = _NEVER
            if row.max() == _NEVER:
                row[bad] = kept


def _tokens_of(
    held: Resident, slots: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens [starts, starts + counts) of each slot, with the place of its slot in `slots`: two columns."""
    each, positions = spread(np.arange(len(slots)), starts, counts)
    return each, held.token_ids[slots[each], positions].astype(np.int64)
