"""What a request asks of its logits, done to the sampled rows before a token is chosen. In place, numpy only.

The order is that of Transformers' processors (transformers/generation/utils.py, _get_logits_processor):

  1. logit_bias                           SequenceBiasLogitsProcessor
  2. repetition_penalty                   RepetitionPenaltyLogitsProcessor: over prompt and output
  3. presence_penalty, frequency_penalty  over the output. Transformers has neither; vLLM, like us, after the second
  4. bad_words                            NoBadWordsLogitsProcessor: they may begin in the prompt
  5. min_tokens                           MinNewTokensLengthLogitsProcessor, for every token that ends the sequence
  6. banned_token_ids                     SuppressTokensLogitsProcessor
  7. allowed_token_ids                    what PrefixConstrainedLogitsProcessor does with a list that never changes
  8. a grammar (structured output)        PrefixConstrainedLogitsProcessor, and vLLM's and SGLang's masks

and then, where a token is drawn, executor/sampler.py: temperature, top-k, top-p, min-p, typical-p.

4 to 8 take tokens away, so among them the order does not matter, and two of them can give way. The grammar wins: where
5 to 7 leave none of the tokens that it allows, those do not count in that step. So a complete answer ends, also
before min_tokens. (Without a grammar it is checked where the request comes in that 5 to 7 leave something.) Bad words
go last here: where nothing would be left, they do not count in that step.

All of it is a function of the known tokens, which the resident tables hold, and of nothing else. So it is the same
after a preemption, on another executor, and in a stream that was resumed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from executor.guide import Guide, wait_for_one
from executor.resident import Resident
from executor.sampler import SamplingColumns
from executor.token_rules import TokenRules

_NEVER: Final = np.float32(-np.inf)
MASKS_S: Final = 0.03  # of a step, for what its grammars allow


def columns(held: Resident, slots: NDArray[np.int64], indices: NDArray[np.int64]) -> SamplingColumns | None:
    """How the rows of `slots` (S,) are sampled, each at its output index; None when all of them are greedy."""
    temperature = held.temperature[slots]
    if not temperature.any():
        return None
    return SamplingColumns(
        temperature=temperature,
        top_k=held.top_k[slots],
        top_p=held.top_p[slots],
        min_p=held.min_p[slots],
        typical_p=held.typical_p[slots],
        seed=held.seed[slots],
        choice=held.choice[slots],
        index=indices,
    )


def edit(
    logits: NDArray[np.float32],
    held: Resident,
    slots: NDArray[np.int64],
    but: Sequence[int] = (),
    *,
    ahead: int = 0,
    guided: bool = True,
) -> None:
    """Apply the controls of each row's sequence. logits (S, vocab_size) are changed; slots (S,) says whose they are.

    Called before the new tokens are known. The rows `but`, which are `unready`, are left as they are. `ahead`: so many
    drafts, which were right, stand behind the known tokens and count as such. Not `guided`: but for its grammar, which
    goes on from known tokens alone.

    Rows are worked one by one, as the sampler does: a sequence's tokens lie side by side, and to gather those of many
    rows first takes longer than the calls that it would save.
    """
    if not held.controlled:
        return
    for row, slot in enumerate(slots.tolist()):
        if slot in held.controlled and row not in but:
            _edit(logits[row], held, slot, ahead, held.guides[slot] if guided else None)


def unready(held: Resident, slots: NDArray[np.int64], num_rows: int) -> list[int]:
    """Find out what the grammars of the sampled rows, slots (S,), allow; a device may compute their logits meanwhile.

    Returns for which of the rows that is not known in this step, so that nothing is chosen there yet: their grammars
    are still compiled, or those of the others took all the time that a step has for it, as they may be written to. Who
    was left out goes first in the next step.

    A moment is waited for grammars that are compiled where they are those of all `num_rows` of the step, so that
    scheduler and executor do not exchange steps as fast as they can meanwhile.
    """
    if not held.controlled:
        return []
    guides = {row: guide for row, slot in enumerate(slots.tolist()) if (guide := held.guides[slot]) is not None}
    late = [row for row, guide in guides.items() if not guide.is_ready()]
    if late and len(late) == num_rows:
        wait_for_one([guides[row] for row in late])
        late = [row for row in late if not guides[row].is_ready()]
    ready = sorted(guides.keys() - set(late), key=lambda row: (-guides[row].times_left_out, row))
    until_s = time.monotonic() + MASKS_S
    for number, row in enumerate(ready):
        if number and time.monotonic() > until_s:
            for left_out in ready[number:]:
                guides[left_out].times_left_out += 1
            return sorted(late + ready[number:])
        slot = slots[row]
        guides[row].times_left_out = 0
        guides[row].allowed(held.token_ids[slot, held.num_prompt[slot] : held.num_tokens[slot]])
    return late


def out_of_time(held: Resident, slots: NDArray[np.int64], until_s: float, *, ahead: int) -> list[int]:
    """Find out what the grammars of rows, slots (S,), allow behind `ahead` drafts that were right, as `unready` does.

    Returns for which rows that is not known at `until_s`, of the monotonic clock: nothing is chosen there.
    """
    if not held.controlled:
        return []
    late: list[int] = []
    for row, slot in enumerate(slots.tolist()):
        guide = held.guides[slot]
        if guide is None:
            continue
        if time.monotonic() > until_s:
            late.append(row)
        else:
            guide.allowed(held.token_ids[slot, held.num_prompt[slot] : held.num_tokens[slot] + ahead])
    return late


def _edit(row: NDArray[np.float32], held: Resident, slot: int, ahead: int, guide: Guide | None) -> None:
    known, num_prompt, rules = int(held.num_tokens[slot]) + ahead, int(held.num_prompt[slot]), held.rules[slot]
    tokens = held.token_ids[slot, :known]
    if rules is not None and len(rules.biased):
        row[rules.biased] += rules.biases
    if (penalty := held.repetition_penalty[slot]) != 1:
        _penalise_repetition(row, tokens, np.float32(penalty))
    presence, frequency = held.presence_penalty[slot], held.frequency_penalty[slot]
    if presence or frequency:
        said, counts = np.unique(tokens[num_prompt:], return_counts=True)
        row[said] -= (presence + frequency * counts).astype(np.float32)
    free = row.copy() if rules is not None and guide is not None else row
    if rules is not None:
        _take_away(row, known - num_prompt, rules)
    if guide is not None:
        _keep_grammatical(row, guide.allowed(tokens[num_prompt:]), free)
    if rules is not None and rules.bad_words.longest:
        _take_bad_words(row, tokens, rules)


def _penalise_repetition(row: NDArray[np.float32], tokens: NDArray[np.int32], penalty: np.float32) -> None:
    values = row[tokens]
    # a token that is there twice is read twice before it is written twice: the penalty counts once
    row[tokens] = np.where(values < 0, values * penalty, values / penalty)


def _take_away(row: NDArray[np.float32], num_output: int, rules: TokenRules) -> None:
    """Tokens that may not be chosen: their logits become -inf."""
    if num_output < rules.min_tokens:
        row[rules.ends] = _NEVER
    row[rules.banned] = _NEVER
    if len(rules.allowed):
        kept = row[rules.allowed]
        row.fill(_NEVER)
        row[rules.allowed] = kept


def _keep_grammatical(row: NDArray[np.float32], allowed: NDArray[np.bool_] | None, free: NDArray[np.float32]) -> None:
    """Leave what the grammar allows; of the row before tokens were taken away, `free`, where that would be nothing.

    A row whose grammar cannot go on is left nothing at all: it fails, and nobody else does.
    """
    if allowed is None:
        row.fill(_NEVER)
        return
    row[~allowed] = _NEVER
    if free is not row and row.max() == _NEVER:
        row[allowed] = free[allowed]


def _take_bad_words(row: NDArray[np.float32], tokens: NDArray[np.int32], rules: TokenRules) -> None:
    bad = rules.bad_words.next(tokens[-rules.bad_words.longest :].tolist())
    if bad:
        kept = row[bad]
        row[bad] = _NEVER
        if row.max() == _NEVER:
            row[bad] = kept
