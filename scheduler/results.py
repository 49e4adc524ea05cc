"""What an executor answered, against what it was asked. All of it is checked before any of it counts."""

from __future__ import annotations

import math
import struct
from collections import Counter

from common.step import Logprobs, Ranked, StepResult
from common.types import SlotRef
from scheduler.sequence import Sequence
from scheduler.steps import Outstanding, Row


class ProtocolError(Exception):
    """An executor answered what it was not asked. Its session cannot go on; its sequences can.

    `culprit` is the sequence whose row was wrong, where it was one row's token or index.
    """

    def __init__(self, message: str, culprit: Sequence | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


def read_result(
    flight: Outstanding, result: StepResult, vocab_size: int
) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
    """Tokens to commit, and sequences whose row failed. Raises ProtocolError when any row is not as it must be."""
    rows = flight.rows
    answered = {*result.refs, *result.failed, *result.unready}
    num_answers = len(result.refs) + len(result.failed) + len(result.unready) + len(result.embedded)
    if result.embedded:
        answered.update(embedded.ref for embedded in result.embedded)
    runs: dict[SlotRef, int] = {}  # tokens so far of each row that is there several times
    if len(answered) != num_answers:
        _check_runs(flight, result)
        runs = dict.fromkeys(result.refs, 0)
    tokens: list[tuple[Sequence, int]] = []
    for ref, token, index in zip(result.refs, result.tokens, result.indices, strict=True):
        row = rows.get(ref)
        if row is None or not row.samples or row.sequence.dimensions:
            raise ProtocolError(f"step {result.step}: row {ref:#x} was not asked for a token")
        if not 0 <= token < vocab_size:
            problem = f"step {result.step}: row {ref:#x} has a token that is none of {vocab_size}"
            raise ProtocolError(problem, row.sequence if row.is_current else None)
        if row.is_current:
            expected = row.sequence.num_output
            if runs:
                expected += runs[ref]
                runs[ref] += 1
            if index != expected:
                problem = f"step {result.step}: output {index} of row {ref:#x}, not {expected}"
                raise ProtocolError(problem, row.sequence)
            tokens.append((row.sequence, token))
    for ref in result.failed:
        if ref not in rows:
            raise ProtocolError(f"step {result.step}: row {ref:#x} failed but was not asked for")
    for ref in result.unready:
        row = rows.get(ref)
        if row is None or row.sequence.sampling.grammar is None or not (row.samples or row.sequence.beams is not None):
            raise ProtocolError(f"step {result.step}: row {ref:#x} waits for a grammar but has none")
    if len(answered) < len(rows):
        for ref, row in rows.items():
            if row.samples and ref not in answered and row.is_current:
                raise ProtocolError(f"step {result.step}: no token for row {ref:#x}")
    return tokens, [rows[ref].sequence for ref in result.failed if rows[ref].is_current]


def read_ranked(flight: Outstanding, result: StepResult, vocab_size: int) -> list[tuple[Sequence, Ranked]]:
    """The beams that were ranked. Raises ProtocolError when one is missing, or is not as it must be."""
    answered = {ranked.ref: ranked for ranked in result.ranked}
    if len(answered) != len(result.ranked):
        raise ProtocolError(f"step {result.step}: a beam is ranked twice")
    found: list[tuple[Sequence, Ranked]] = []
    for ref, row in flight.rows.items():
        sequence, ranked = row.sequence, answered.pop(ref, None)
        asked = sequence.beams is not None and row.is_current and row.stop == len(sequence.tokens)
        if ranked is None:
            if asked and ref not in result.failed and ref not in result.unready:
                raise ProtocolError(f"step {result.step}: beam {ref:#x} is not ranked")
            continue
        if sequence.beams is None or ref in result.failed or ref in result.unready:
            raise ProtocolError(f"step {result.step}: row {ref:#x} is ranked but was not to be")
        if not row.is_current:
            continue
        problem = _problem_of(ranked, sequence, asked=asked, vocab_size=vocab_size)
        if problem:
            raise ProtocolError(f"step {result.step}: beam {ref:#x} is ranked {problem}", sequence)
        found.append((sequence, ranked))
    if answered:
        raise ProtocolError(f"step {result.step}: row {min(answered):#x} is ranked but was not asked for")
    return found


def _problem_of(ranked: Ranked, sequence: Sequence, *, asked: bool, vocab_size: int) -> str:
    """What is wrong with it; empty for nothing."""
    assert sequence.beams is not None
    if not asked or ranked.output_index != sequence.num_output:
        return f"for output {ranked.output_index}, not {sequence.num_output}"
    most = sequence.beams.search.num_kept
    if len(ranked.token_ids) > most or len(set(ranked.token_ids)) != len(ranked.token_ids):
        return f"with {len(ranked.token_ids)} tokens that are not up to {most} different ones"
    if not all(0 <= token < vocab_size for token in ranked.token_ids):
        return f"with a token that is none of {vocab_size}"
    if not all(map(math.isfinite, (*ranked.logprobs, *ranked.raw, *ranked.top))):
        return "with a log-probability that is not finite"
    if len(ranked.raw) != len(ranked.token_ids) * (sequence.sampling.logprobs is not None):
        return f"with {len(ranked.raw)} log-probabilities to tell"
    return ""


def _check_runs(flight: Outstanding, result: StepResult) -> None:
    """A row may bring one token more than it may carry drafts, side by side, and none where it failed or is unready."""
    brought = Counter(result.refs)
    without = {*result.failed, *result.unready, *(embedded.ref for embedded in result.embedded)}
    num_without = len(result.failed) + len(result.unready) + len(result.embedded)
    if len(without) < num_without or not without.isdisjoint(brought):
        raise ProtocolError(f"step {result.step}: a row is answered twice")
    for ref, count in brought.items():
        row = flight.rows.get(ref)
        if count > 1 + (row.max_drafts if row is not None else 0):
            raise ProtocolError(f"step {result.step}: a row is answered twice")


def read_embedded(flight: Outstanding, result: StepResult) -> list[tuple[Sequence, bytes]]:
    """The vectors to keep. Raises ProtocolError for one that was not asked for, or is not as it must be."""
    found: list[tuple[Sequence, bytes]] = []
    for ref, vector in result.embedded:
        row = flight.rows.get(ref)
        if row is None or not row.samples or not row.sequence.dimensions:
            raise ProtocolError(f"step {result.step}: row {ref:#x} was not asked for a vector")
        if not row.is_current:
            continue
        sequence = row.sequence
        count = sequence.dimensions
        if len(vector) != 4 * count or not all(map(math.isfinite, struct.unpack(f"<{count}f", vector))):
            problem = f"step {result.step}: row {ref:#x} has a vector that is not {count} finite numbers"
            raise ProtocolError(problem, sequence)
        found.append((sequence, vector))
    return found


def read_drafts(flight: Outstanding, result: StepResult) -> list[tuple[Row, int, int]]:
    """The rows that might carry drafts, how many they did, and how many were right. Raises ProtocolError for others.

    Where no token was chosen yet, nobody knows whether they were: those are left out.
    """
    brought = Counter(result.refs)
    found: dict[SlotRef, tuple[Row, int, int]] = {}
    for ref, drafted in result.drafted:
        row = flight.rows.get(ref)
        if row is None or drafted > row.max_drafts or ref in found:
            raise ProtocolError(f"step {result.step}: row {ref:#x} was not asked for {drafted} drafts")
        found[ref] = row, drafted, max(0, brought[ref] - 1)
    for ref, count in brought.items():
        if count > 1 and (ref not in found or count > 1 + found[ref][1]):
            raise ProtocolError(f"step {result.step}: {count} tokens of row {ref:#x}, more than it had drafts for")
    for ref in result.unready:
        found.pop(ref, None)
    return list(found.values())


def read_scores(flight: Outstanding, result: StepResult) -> list[tuple[list[Logprobs], Logprobs]]:
    """Log-probabilities to keep, each with the list that it goes to.

    What is known already is passed over: a prompt that is computed again is scored again. Raises ProtocolError for one
    that was not asked for, or that leaves a gap.
    """
    found: list[tuple[list[Logprobs], Logprobs]] = []
    after: dict[int, int] = {}  # by list: the position that is next, where one was found already
    brought = Counter(result.refs) if flight.max_drafts else None
    for ref, position, logprobs in result.scored:
        row = flight.rows.get(ref)
        if row is None:
            raise ProtocolError(f"step {result.step}: row {ref:#x} is scored but was not asked for")
        if not row.is_current:
            continue
        sequence = row.sequence
        if position >= sequence.num_prompt:
            last = len(sequence.tokens) + (brought[ref] - 1 if brought else 0)
            asked = row.samples and sequence.sampling.logprobs is not None and position <= last
            scores, first = sequence.logprobs, sequence.num_prompt + sequence.logprobs_from
        else:
            asked = sequence.scores_prompt and position > 0
            scores, first = sequence.prompt_logprobs, 1
        expected = after.get(id(scores), first + len(scores))
        if asked and position < min(expected, sequence.num_prompt):
            continue
        if not asked or position != expected:
            problem = f"step {result.step}: the token at {position} of row {ref:#x} is scored, not that at {expected}"
            raise ProtocolError(problem, sequence)
        after[id(scores)] = expected + 1
        found.append((scores, logprobs))
    return found
